"""Which crops of an image are worth a run of the tower, told from its thumbnail.

LLaVA-NeXT and its like see an image as a thumbnail and as crops of a larger copy; a crop shows again, enlarged, what a part
of the thumbnail shows. So the scores of the thumbnail's tokens, which cost one crop, say where something is that the
question asks for, before the other crops cost anything. They do not say whether it must be seen enlarged: that is for the
model to say, by how certain it is of its answer. See docs/crops.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adafv.core.layout import ImageLayout
from adafv.core.sending import sent
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
    source = layout.source.numpy()
    counts = np.bincount(source[source >= 0] // (layout.rows * layout.columns), minlength=layout.crops)
    return counts.tolist()  # type: ignore[no-any-return]


def of_some_crops(layout: ImageLayout, crops: Sequence[int]) -> tuple[Tensor, ImageLayout]:
    """(which tokens show a patch of these crops, [n] long; the layout of these alone)."""
    source = layout.source.numpy()
    places = torch.from_numpy(np.isin(source // (layout.rows * layout.columns), list(crops)).nonzero()[0])
    return places, replace(layout, source=torch.from_numpy(source[places.numpy()]))


def mixes_crops(layout: ImageLayout) -> bool:
    """Whether tokens are made of patches of several crops: then their raster was scaled down, and some places are missing."""
    if layout.tiling is None:
        return False
    down, across = _in_raster(layout)
    return bool(len(down)) and (np.ptp(down).item() + 1) * (np.ptp(across).item() + 1) != len(down)


def enlarged_in(layout: ImageLayout) -> Tensor:
    """[tokens of the thumbnail] long: the crop in which the middle of each token's patch lies, from 1 on; in their order.

    The thumbnail is the whole image squeezed into one crop; the other crops are a raster of a copy that may have kept its
    proportions, with padding around it that the model cuts off. So the rows and columns of the raster that are left are
    what the thumbnail shows.
    """
    assert layout.tiling is not None
    down, across = _in_raster(layout)
    source = layout.source.numpy()
    own = source[(source >= 0) & (source < layout.rows * layout.columns)]

    def tile(index: Any, count: int, tiles: int, there: Any) -> Any:
        # An image as thin as a line is cut off as a whole, padding and all: then no crop shows more than another.
        first, end = (there.min(), there.max() + 1) if there.size else (0, count * tiles)
        return (first + (2 * index + 1) * (end - first) // (2 * count)) // count

    rows = tile(own // layout.columns, layout.rows, layout.tiling[0], down)
    columns = tile(own % layout.columns, layout.columns, layout.tiling[1], across)
    return torch.from_numpy(1 + rows * layout.tiling[1] + columns)


def _in_raster(layout: ImageLayout) -> tuple[Any, Any]:
    """Row and column of every patch of the other crops that is left, in the raster that they make."""
    assert layout.tiling is not None
    source = layout.source.numpy()
    per_crop = layout.rows * layout.columns
    source = source[source >= per_crop] - per_crop
    crop, inside = source // per_crop, source % per_crop
    row = crop // layout.tiling[1] * layout.rows + inside // layout.columns
    return row, crop % layout.tiling[1] * layout.columns + inside % layout.columns


def masses(scores: Tensor, layout: ImageLayout) -> Tensor:
    """[G, crops - 1] float32: what part of a score ([G, tokens of the thumbnail]) lies where each other crop enlarges it."""
    crop = sent(enlarged_in(layout) - 1, scores.device)
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
