"""Which crops of an image are worth a run of the tower, told from its thumbnail.

LLaVA-NeXT and its like see an image as a thumbnail and as crops of a larger copy; a crop shows again, enlarged, what a part
of the thumbnail shows. So the scores of the thumbnail's tokens, which cost one crop, say where something is that the
question asks for, before the other crops cost anything. They do not say whether it must be seen enlarged: that is for the
model to say, by how certain it is of its answer. See docs/crops.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adafv.core.layout import ImageLayout
from adafv.errors import OptionError

ALL, AUTO, THUMBNAIL = "all", "auto", "thumbnail"
CERTAIN = 0.9
"""Probability of an answer's first token from which on "auto" is content with the thumbnail; chosen in docs/crops.md."""
_WAYS = f'give "{ALL}", "{AUTO}", "{THUMBNAIL}", or how many crops beside the thumbnail at most, such as 1'


@dataclass(frozen=True)
class Crops:
    """How many crops of an image the tower may see beside its thumbnail."""

    most: int | None = None
    """None: as many as there are."""
    chosen: bool = False
    """Whether the thumbnail is looked at first, and its scores say which ones. False: all are encoded, as ever."""
    certain: float | None = None
    """Where an answer's first token is less probable than this, it is asked again with all crops. None: it never is."""

    @classmethod
    def of(cls, value: Any) -> "Crops":
        """Read what somebody gave: "all", "auto", "thumbnail", 2, "2".

        Raises:
            OptionError: it is none of these.
        """
        if isinstance(value, Crops):
            return value
        named = {ALL: cls(), AUTO: cls(0, True, CERTAIN), THUMBNAIL: cls(0, True)}
        if isinstance(value, str) and value in named:
            return named[value]
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**9:
            given = repr(value) if len(repr(value)) < 60 else type(value).__name__
            raise OptionError(f"crops={given} is no number of crops; {_WAYS}")
        return cls(value, True)

    def __str__(self) -> str:
        """`of` reads it back."""
        if not self.chosen:
            return ALL
        return AUTO if self.certain is not None else THUMBNAIL if self.most == 0 else str(self.most)

    def tokens(self, layout: ImageLayout) -> int:
        """The tokens of an image that are there whichever crops are chosen: K is at most that, and known beforehand."""
        if self.most is None or layout.crops == 1:
            return layout.tokens
        thumbnail, *others = tokens_of_crops(layout)
        if self.most >= len(others):
            return layout.tokens
        return thumbnail + sum(sorted(others)[: self.most])


ALL_CROPS = Crops()


def tokens_of_crops(layout: ImageLayout) -> list[int]:
    """How many tokens show a patch of each crop; the thumbnail is crop 0."""
    crop = layout.source[layout.shows_patch] // (layout.rows * layout.columns)
    return torch.bincount(crop, minlength=layout.crops).tolist()


def mixes_crops(layout: ImageLayout) -> bool:
    """Whether tokens are made of patches of several crops: then their raster was scaled down, and some places are missing."""
    crop, row, column = layout.place(torch.arange(layout.tokens))
    others = crop > 0
    if layout.tiling is None or not bool(others.any()):
        return False
    down = (crop[others] - 1) // layout.tiling[1] * layout.rows + row[others]
    across = (crop[others] - 1) % layout.tiling[1] * layout.columns + column[others]
    height, width = (int(place.max() - place.min()) + 1 for place in (down, across))
    return height * width != int(others.sum())


def enlarged_in(layout: ImageLayout) -> Tensor:
    """[tokens of the thumbnail] long: the crop in which the middle of each token's patch lies, from 1 on; in their order.

    The thumbnail is the whole image squeezed into one crop; the other crops are a raster of a copy that may have kept its
    proportions, with padding around it that the model cuts off. So the rows and columns of the raster that are left are
    what the thumbnail shows.
    """
    assert layout.tiling is not None
    _, horizontal = layout.tiling
    crop, row, column = layout.place(torch.arange(layout.tokens))
    others, own = crop > 0, crop == 0
    down = (crop[others] - 1) // horizontal * layout.rows + row[others]
    across = (crop[others] - 1) % horizontal * layout.columns + column[others]
    if not len(down):
        return torch.zeros(int(own.sum()), dtype=torch.long)

    def place(index: Tensor, count: int, there: Tensor, size: int) -> Tensor:
        first, last = int(there.min()), int(there.max()) + 1
        return (first + (2 * index + 1) * (last - first) // (2 * count)) // size

    tile_row = place(row[own], layout.rows, down, layout.rows)
    tile_column = place(column[own], layout.columns, across, layout.columns)
    return 1 + tile_row * horizontal + tile_column


def masses(scores: Tensor, layout: ImageLayout) -> Tensor:
    """[G, crops - 1] float32: what part of a score ([G, tokens of the thumbnail]) lies where each other crop enlarges it."""
    crop = (enlarged_in(layout) - 1).to(scores.device)
    sums = scores.new_zeros(len(scores), layout.crops - 1, dtype=torch.float32)
    sums = sums.index_add(1, crop, scores.float())
    return sums / sums.sum(-1, keepdim=True).clamp_min(1e-30)


def chosen_crops(shares: Sequence[float], most: int) -> tuple[int, ...]:
    """The crops beside the thumbnail that are encoded, ascending: those that the scores rank first.

    Args:
        shares: of what the question and the tower look at in the thumbnail, the part that each other crop enlarges.
        most: how many there may be.
    """
    ranked = sorted(range(1, len(shares) + 1), key=lambda crop: (-shares[crop - 1], crop))
    return tuple(sorted(ranked[:most]))
