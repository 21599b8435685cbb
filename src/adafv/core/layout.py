"""Where the visual tokens of an image come from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adafv.core.sending import sent


@dataclass(frozen=True)
class ImageLayout:
    """Where each visual token of one image comes from, in the order in which the model places them.

    A tower sees an image as C crops of rows x columns patches. `source` numbers them crop by crop, row by row.
    """

    source: Tensor
    """[N] long, on the CPU: crop * rows * columns + row * columns + column; -1 for a token that shows no patch."""
    crops: int
    rows: int
    columns: int
    tiling: tuple[int, int] | None = None
    """(vertical, horizontal) arrangement of the crops after the first, which is then a thumbnail. None where there is one
    crop, where crops are the frames of a video, and where nothing says how they lie."""
    frames: bool = False
    """Whether the crops are the frames of a video."""

    @property
    def tokens(self) -> int:
        """N, the number of visual tokens, and of placeholders in the prompt."""
        return self.source.numel()

    @property
    def shows_patch(self) -> Tensor:
        """[N] bool: False for tokens such as the newlines of LLaVA-NeXT, which are kept only when all else is."""
        return self.source >= 0

    def of_crops(self, crops: Sequence[int]) -> Tensor:
        """[N] bool: tokens that show a patch of one of these crops."""
        crop = self.source.div(self.rows * self.columns, rounding_mode="floor")
        return self.shows_patch & torch.isin(crop, torch.tensor(crops, dtype=torch.long))

    def place(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Crop, row and column of the tokens at `index` ([K] long -> three [K] long, -1 where no patch is shown)."""
        source = sent(self.source, index.device)[index]
        inside = source % (self.rows * self.columns)
        patch = source >= 0
        return tuple(  # type: ignore[return-value]
            value.where(patch, torch.full_like(value, -1))
            for value in (source // (self.rows * self.columns), inside // self.columns, inside % self.columns)
        )


def anyres_places(tiling: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Where each patch lies in an image of a thumbnail and `tiling` crops, to be packed as a model packs its features.

    Returns:
        [1 + V * H, rows * columns, 3] float64: (0, row, column) in the thumbnail, then (1, row, column) in the raster that
        the other crops make. Where a model scales that raster down, these are scaled with it.
    """
    vertical, horizontal = tiling
    down, across = torch.arange(vertical * rows), torch.arange(horizontal * columns)
    raster = torch.stack(torch.meshgrid(torch.tensor([1]), down, across, indexing="ij"), dim=-1)[0]
    crops = raster.unflatten(0, (vertical, rows)).unflatten(2, (horizontal, columns)).transpose(1, 2).flatten(0, 1)
    thumbnail = crops[:1] * torch.tensor([0, 1, 1])
    return torch.cat((thumbnail, crops)).flatten(1, 2).double()


def anyres_layout(packed: Tensor, tiling: tuple[int, int], rows: int, columns: int) -> ImageLayout:
    """The layout of an image whose `anyres_places` ended up in this order.

    Args:
        packed: [N, 3], negative at tokens that show no patch. A place between patches is that of the nearest one.
    """
    in_raster, row, column = packed.round().long().unbind(-1)
    crop = (1 + row // rows * tiling[1] + column // columns).where(in_raster == 1, 0)
    source = (crop * rows + row % rows) * columns + column % columns
    return ImageLayout(source.where(in_raster >= 0, -1), 1 + tiling[0] * tiling[1], rows, columns, tiling)
