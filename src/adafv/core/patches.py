"""From the patches that a tower sees to the tokens that a projector makes of them, for values of any width.

A tap gives values per patch, [all patches, C] over all images of a call; every family says once where its patches go,
by one of these, and that holds for the saliency (C = 1), for keys and for hidden states alike. A token that is made of
several patches has their mean.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.sending import sent
from adafv.errors import UnsupportedCallError


def by_image(tokens: Tensor, layouts: list[ImageLayout]) -> list[Tensor]:
    """[all tokens, C], image after image -> per image [N, C]."""
    return list(tokens.split([layout.tokens for layout in layouts]))


def by_crops(patches: Tensor, layouts: list[ImageLayout]) -> list[Tensor]:
    """[all patches, C] of crops of one size -> per image [its crops, patches of a crop, C]."""
    crops = patches.unflatten(0, (sum(layout.crops for layout in layouts), -1))
    return list(crops.split([layout.crops for layout in layouts]))


def of_some_crops(patches: Tensor, layouts: list[ImageLayout], wanted: Sequence[Sequence[int]]) -> list[Tensor]:
    """[all patches, C] of some crops of every image, in the order of `wanted` -> per image [n, C], its tokens that show a
    patch of these crops, in the layout's order."""
    per_crop = layouts[0].rows * layouts[0].columns
    places, counts, first = [], [], 0
    for layout, crops in zip(layouts, wanted, strict=True):
        source = layout.source.numpy()
        number = np.full(layout.crops + 1, -1)  # the last one is of tokens that show no patch
        number[list(crops)] = np.arange(first, first + len(crops))
        number = number[source // per_crop]
        places.append((number * per_crop + source % per_crop)[number >= 0])
        counts.append(len(places[-1]))
        first += len(crops)
    chosen = sent(torch.from_numpy(np.concatenate(places)), patches.device)
    return list(patches.index_select(0, chosen).split(counts))


def crops_in_a_row(images: Iterable[Tensor], wanted: Sequence[Sequence[int]]) -> Tensor:
    """[crops, 3, H, W], of every image ([its crops, 3, H, W]) those that are wanted, in their order."""
    return torch.stack([image[crop] for image, crops in zip(images, wanted, strict=True) for crop in crops])


def of_images(values: Tensor, counts: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Of rows that belong to images, so many to each, those of the images at the positions `wanted`."""
    parts = values.split(list(counts))
    return torch.cat([parts[i] for i in wanted])


def square_side(grid: tuple[int, int], factor: int) -> int:
    """Tokens along one side of a tile of `grid` (rows, columns) patches, factor x factor of which become a token.

    Raises:
        UnsupportedCallError: the tile is not square, or is not a whole number of tokens.
    """
    rows, columns = grid
    if rows != columns or rows % factor:
        raise UnsupportedCallError(
            f"tiles of {rows} x {columns} patches cannot be pruned: the model joins {factor} x {factor} patches of "
            "square tiles only; prepare the images with the processor of this checkpoint"
        )
    return rows // factor


def neighbours(patches: Tensor, count: int) -> Tensor:
    """[tokens * count, C] -> [tokens, C]: the `count` patches of a token follow one another."""
    return patches.unflatten(0, (-1, count)).mean(1)


def numbered(patches: Tensor, squares: Tensor) -> Tensor:
    """[patches, C] -> [tokens, C], where `squares` ([..., count] long) names the patches of every token.

    Found by sending the numbers of the patches through the model's own shuffle of them.
    """
    return patches[squares.flatten(0, -2).to(patches.device)].mean(1)


def pooled(patches: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """[crops * rows * columns, C], each crop in rows from left to right -> [tokens, C], squares of side x side patches.

    What is left over at the right and the bottom is dropped.
    """
    crops = patches.unflatten(0, (-1, *grid)).movedim(-1, 1)
    return torch.nn.functional.avg_pool2d(crops, side).movedim(1, -1).flatten(0, 2)


def blocks(patches: Tensor, layouts: list[ImageLayout], block: tuple[int, int]) -> list[Tensor]:
    """Per image [N, C], of images of any size, each in rows from left to right, frame after frame.

    Args:
        block: (rows, columns) of patches that make a token.
    """
    height, width = block
    parts = patches.split([layout.tokens * height * width for layout in layouts])
    return [
        part.unflatten(0, (layout.crops, layout.rows, height, layout.columns, width)).mean((2, 4)).flatten(0, 2)
        for part, layout in zip(parts, layouts, strict=True)
    ]
