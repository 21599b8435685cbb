"""Where in a picture each visual token lies, whatever the processor does to the picture before the tower sees it.

Processors scale, crop, pad, tile and pack. Rather than to model what each of them does, a picture is shown to them in which
every pixel says where it is: red rises from left to right, green from top to bottom. What arrives at a patch is the
mean place of what it shows. A second picture, with all colours inverted, tells picture from padding: inverted colours add
up to white inside the picture, and padding is the same in both. (Scaling is linear, so that a rising colour stays one.)

A token shows the patches that its family's layout says, so places are refused where a family cannot show the pixels in the
order of its layout, and where the two pictures do not come out as they must.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adafv.core import ImageLayout
from adafv.errors import AdaFVError

if TYPE_CHECKING:
    from adafv.asking.session import Session

_TOLERANCE = 24.0
"""Of 255: by how much the two pictures may fail to add up to white, in the mean of a patch. Scaled edges ring."""
Box = Sequence[float]
"""(left, top, right, bottom)."""


class PlacesError(AdaFVError, ValueError):
    """It cannot be told where the tokens of a picture lie."""


@dataclass(frozen=True)
class Places:
    """Where the tokens of a picture lie. Lengths are shares of the picture's width or height."""

    x: Tensor
    """[N] float32, the middle of what a token shows, from the left; NaN where it shows nothing of the picture."""
    y: Tensor
    """[N] float32, from the top."""
    width: Tensor
    """[N] float32, of what it shows."""
    height: Tensor
    """[N] float32."""

    @property
    def seen(self) -> Tensor:
        """[N] bool: tokens that show a part of the picture, and not padding or a newline."""
        return ~self.x.isnan()

    def on(self, boxes: Sequence[Box]) -> Tensor:
        """[N] bool: tokens on one of the boxes.

        A token is on a box if its middle is. A box smaller than a patch may hold no middle: then the tokens that show its
        middle are. None are where the processor crops it away.

        Args:
            boxes: in shares of the picture's width and height.
        """
        found = torch.zeros_like(self.seen)
        for left, top, right, bottom in boxes:
            inside = (self.x >= left) & (self.x < right) & (self.y >= top) & (self.y < bottom)
            x, y = (left + right) / 2, (top + bottom) / 2
            around = ((self.x - x).abs() <= self.width / 2) & ((self.y - y).abs() <= self.height / 2)
            found |= inside if bool(inside.any()) else around
        return found

    @property
    def border(self) -> Tensor:
        """[N] float32, the distance of a token's middle to the picture's nearest edge; 0 where it shows nothing of it."""
        nearest = torch.minimum(torch.minimum(self.x, 1 - self.x), torch.minimum(self.y, 1 - self.y))
        return nearest.nan_to_num(0.0).clamp_min(0.0)


def places_of(session: "Session", layout: ImageLayout, size: tuple[int, int], question: str = "?") -> Places:
    """Where the tokens lie of a picture of this size.

    Args:
        layout: of such a picture, see `adafv.encode`.
        size: (width, height) of the picture in pixels.
        question: any that the model can be asked.

    Raises:
        PlacesError: the model's processor, or family, does not let itself be read so.
    """
    one, other = (_by_patch(session, layout, picture, question) for picture in _rulers(size))
    covered = ((one[..., 2] - other[..., 2]) / 255.0).clamp(0, 1)  # [patches, h, w]
    together = (one + other)[..., :2]
    inside = covered > 0.98
    if not bool(inside.any()):
        raise PlacesError("nothing of a picture arrives at the tower; where its tokens lie cannot be told")
    means = [(together[..., channel] * inside).sum((1, 2)) / inside.sum((1, 2)).clamp_min(1) for channel in (0, 1)]
    whole = inside.any(2).any(1)
    if any(bool(((mean - 255.0).abs() > _TOLERANCE)[whole].any()) for mean in means):
        raise PlacesError(
            "the model's processor changes colours in a way that does not let places be read off them; where its tokens lie "
            "cannot be told"
        )
    weight = covered / covered.sum((1, 2), keepdim=True).clamp_min(1e-6)
    # Half of the difference of the two pictures: without what is added to both.
    share = ((one - other)[..., :2] / covered.clamp_min(1e-3).unsqueeze(-1) / 255.0 + 1) / 2
    x, y = (((share[..., channel]) * weight).sum((1, 2)) for channel in (0, 1))
    whole = covered.amin((1, 2)) > 0.98
    width, height = (_spacing(value, layout, 2 - axis, whole) for axis, value in ((0, x), (1, y)))
    seen = covered.mean((1, 2)) >= 0.5
    source = layout.source.cpu()
    there = source.clamp_min(0)
    shown = (source >= 0) & seen[there]
    nan = torch.full_like(x[there], float("nan"))
    return Places(x[there].where(shown, nan), y[there].where(shown, nan), width[there], height[there])


def _rulers(size: tuple[int, int]) -> list[Image.Image]:
    """The picture whose pixels say where they are, and its inverse."""
    width, height = size
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    # Of the middle of a pixel.
    pixels[..., 0] = (255 * (np.arange(width) + 0.5) / width).round()[None, :]
    pixels[..., 1] = (255 * (np.arange(height) + 0.5) / height).round()[:, None]
    return [Image.fromarray(pixels), Image.fromarray(255 - pixels)]


def _by_patch(session: "Session", layout: ImageLayout, picture: Image.Image, question: str) -> Tensor:
    """[crops * rows * columns, h, w, 3] in 0..255: the pixels of every patch, as the tower sees them."""
    inputs = session.inputs(picture, question)
    try:
        view: Any = session.tower_view(inputs)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise PlacesError(
            "what the vision tower of this model sees cannot be drawn, so where its tokens lie cannot be told; use a model "
            "with which `adafv ask --picture` works"
        ) from error
    if view.dim() != 4 or view.shape[0] < layout.crops:
        raise PlacesError(
            f"the pixels come as {list(view.shape)}, but the picture has {layout.crops} crops; they do not fit"
        )
    view = view[: layout.crops].float()
    height, width = (max(2, -(-view.shape[2] // layout.rows)), max(2, -(-view.shape[3] // layout.columns)))
    size = (height * layout.rows, width * layout.columns)
    if tuple(view.shape[2:]) != size:  # patches of whole pixels
        view = torch.nn.functional.interpolate(view, size=size, mode="bilinear", align_corners=False)
    cells = view.unflatten(3, (layout.columns, width)).unflatten(2, (layout.rows, height))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(0, 2)


def _spacing(middles: Tensor, layout: ImageLayout, along: int, whole: Tensor) -> Tensor:
    """[patches]: how much of the picture a patch shows along one axis: the distance of neighbours, the same all over a crop.

    Args:
        middles: [patches] places along that axis.
        along: 1 for rows, 2 for columns.
        whole: [patches] bool, those that show the picture alone.
    """
    shape = (layout.crops, layout.rows, layout.columns)
    steps = middles.view(shape).diff(dim=along)
    length = shape[along]
    both = whole.view(shape).narrow(along, 1, length - 1) & whole.view(shape).narrow(along, 0, length - 1)
    found = torch.empty(shape)
    for crop in range(layout.crops):
        own, inside = steps[crop], both[crop]
        # A single row or column shows all that there is.
        found[crop] = own[inside].median() if bool(inside.any()) else (own.median() if own.numel() else 1.0)
    return found.flatten()
