"""Where the visual tokens of an image come from."""

from dataclasses import dataclass

import torch
from torch import Tensor


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

    @property
    def tokens(self) -> int:
        """N, the number of visual tokens, and of placeholders in the prompt."""
        return self.source.numel()

    @property
    def shows_patch(self) -> Tensor:
        """[N] bool: False for tokens such as the newlines of LLaVA-NeXT, which are kept only when all else is."""
        return self.source >= 0

    def place(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Crop, row and column of the tokens at `index` ([K] long -> three [K] long, -1 where no patch is shown)."""
        source = self.source.to(index.device)[index]
        inside = source % (self.rows * self.columns)
        patch = source >= 0
        return tuple(  # type: ignore[return-value]
            value.where(patch, torch.full_like(value, -1))
            for value in (source // (self.rows * self.columns), inside // self.columns, inside % self.columns)
        )
