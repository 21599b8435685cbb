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
from torch.nn.functional import adaptive_avg_pool2d

from adafv.core.encoded import EncodedImage
from adafv.core.layout import ImageLayout
from adafv.core.scores import text_to_image_attention
from adafv.core.select import Chooser, words_of
from adafv.core.sending import sent
from adafv.core.tokens import SALIENCY, Plan
from adafv.errors import MethodError, OptionError, UnsupportedCallError

ALL, AUTO, THUMBNAIL = "all", "auto", "thumbnail"
CERTAIN = 0.9
"""Probability of an answer's first token from which on "auto" is content with the thumbnail; chosen in docs/crops.md."""
MEND = 'leave crops out, or give crops="all"'
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


def check_thumbnails(images: Sequence[Tensor]) -> None:
    """Raise UnsupportedCallError unless the first tile of each image shows, smaller, what the others show together.

    Where nothing else says so: tiles that were cut by other hands than the checkpoint's processor may come without one, and
    then a part of the image would be taken for all of it. One wait for the device.

    Args:
        images: [tiles, 3, H, W] each, the thumbnail first, the others row by row in a raster of unknown shape.
    """
    found = [_differs(image) for image in images if len(image) > 1]
    if found and bool((torch.stack(found) > _DIFFERS).any()):
        raise UnsupportedCallError(
            "the tile that would be the thumbnail does not show what the others show together; let the processor of this "
            f"checkpoint cut images into tiles, or {MEND}"
        )


_DIFFERS = 0.15
"""32 photographs and drawings in four shapes, cut by a stock processor into tiles of 224 pixels, differed by 0.06 at most; of
864 cases in which a tile was taken for the thumbnail, those of chessboards alone differed by less than this."""
_LIKE = 0.01
"""In units of normalised pixels; what two blank pictures may differ by."""


def _differs(image: Tensor) -> Tensor:
    """Mean difference of the coarse first tile from the raster that fits it best, in units of its own spread."""
    whole, tiles = image[0].float(), image[1:].float()
    side = 2  # means along each side of a tile; processors squeeze thumbnails, so that these lie where they should
    coarse = adaptive_avg_pool2d(tiles, (side, side))
    ratios = []
    for rows in (rows for rows in range(1, len(tiles) + 1) if len(tiles) % rows == 0):
        columns = len(tiles) // rows
        raster = coarse.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        own = adaptive_avg_pool2d(whole, (rows * side, columns * side))
        spread = (own - own.mean((-1, -2), keepdim=True)).abs().mean()
        ratios.append(((own - raster).abs().mean() - _LIKE) / (spread + _LIKE))
    return torch.stack(ratios).min()


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


def chooses(crops: Crops, layout: ImageLayout, plan: Plan, method: Chooser, arranged: bool = False) -> bool:
    """Whether some crops of an image that loses tokens need not be encoded.

    Args:
        arranged: whether its tokens are laid out in another way than the model's own.

    Raises:
        MethodError: the method looks at another image.
        UnsupportedCallError: the model mixes tokens of several crops.
    """
    if not crops.chosen or layout.crops == 1:
        return False
    if plan.grid is not None or arranged or method.may_repeat:
        raise MethodError(
            f"the method {method.name} sees the image at another resolution, or laid out in another way, and knows "
            f"nothing of crops that were not encoded; {MEND}"
        )
    if crops.most != 0 and mixes_crops(layout):
        raise UnsupportedCallError(
            "this image has so many crops that the model scales their tokens down, and mixes some of several crops; give "
            f"crops={THUMBNAIL!r}, or {MEND}"
        )
    # So many tokens that newlines stay, too: there is nothing to choose.
    return plan.keep is None or plan.keep <= sum(tokens_of_crops(layout))


def first_crops(plan: Plan | None) -> tuple[int, ...]:
    """Those that are encoded whatever the scores say: the thumbnail, or what a method plans to look at."""
    return (0,) if plan is None or plan.crops is None else plan.crops


def decides(crops: Crops, plan: Plan | None) -> bool:
    """Of an image whose crops are chosen, whether its thumbnail says which ones."""
    return crops.most != 0 and plan is not None and plan.crops is None


def shares_of_crops(layout: ImageLayout, thumbnails: Sequence[EncodedImage], texts: Sequence[Tensor]) -> Tensor:
    """[G, crops - 1] float32: of what question and tower look at in the thumbnails of G like images, the part that each
    other crop enlarges.

    Args:
        layout: of the whole image.
        texts: embeddings of the words that count ([T, D] each); empty where the method asks for none.
    """
    scores = [torch.stack([thumbnail.signals[SALIENCY] for thumbnail in thumbnails])]
    if texts:
        words, mask = words_of(texts)
        features = torch.stack([thumbnail.features.detach() for thumbnail in thumbnails])
        scores.append(text_to_image_attention(words, features, mask))
    # The geometric mean of the masses, as the objective of AdaFV has it; without words there is one.
    return torch.stack([masses(each, layout) for each in scores]).log().mean(0).exp()


def joined(layout: ImageLayout, parts: Sequence[tuple[EncodedImage, Sequence[int]]], left: ImageLayout) -> EncodedImage:
    """Parts of an image, each with the crops that it holds, in the order of its tokens; of the signals, those that all have.

    Args:
        layout: of the whole image.
        left: of all these crops.
    """
    if len(parts) == 1:
        return replace(parts[0][0], layout=left)
    places = np.concatenate([of_some_crops(layout, crops)[0].numpy() for _, crops in parts])
    order = places.argsort()
    ascending = bool((np.diff(places) > 0).all())  # as where the thumbnail comes first

    def together(values: Sequence[Tensor]) -> Tensor:
        row = torch.cat(list(values))
        return row if ascending else row.index_select(0, sent(torch.from_numpy(order), row.device))

    common = [signal for signal in parts[0][0].signals if all(signal in image.signals for image, _ in parts)]
    signals = {signal: together([image.signals[signal] for image, _ in parts]) for signal in common}
    return EncodedImage(together([image.features for image, _ in parts]), signals, left)
