"""What stands behind the objects of a scene: a gradient, a texture, or a piece of a photograph."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random

import numpy
from numpy.typing import NDArray
from PIL import Image

from adafv.errors import AdaFVError
from adafv.extras import install_command

TEXTURES = ("gradient", "stripes", "dots", "checks")
BACKGROUNDS = (*TEXTURES, "photo")
"""Also the answers to "what is the background?"."""

_PHOTOS = {
    # Photographs that come inside the scikit-image package; none of them is stored here. Those of the test set are
    # others than those of training.
    "train": ("brick.png", "chelsea.png", "coffee.png", "grass.png", "motorcycle_left.png", "rocket.jpg"),
    "test": ("astronaut.png", "camera.png", "gravel.png", "moon.png"),
}


class MissingPhotographsError(AdaFVError):
    """A scene has a piece of a photograph behind it, and scikit-image is not installed."""


def paint(kind: str, side: int, seed: int, split: str) -> Image.Image:
    """A background of `side` x `side` pixels. The same seed gives the same pattern at every size.

    Args:
        kind: one of `BACKGROUNDS`.
        side: in pixels.
        seed: of the pattern's colours, directions and sizes.
        split: "train", "validation" or "test": which photographs may be used.
    """
    random = Random(seed)
    if kind == "photo":
        return _photo(side, random, "test" if split == "test" else "train")
    one, two = _muted(random), _muted(random)
    angle = random.uniform(0, numpy.pi)
    # Points of the picture in units of its side, so that the pattern does not depend on the resolution.
    steps = (numpy.arange(side, dtype=numpy.float32) + 0.5) / side
    across = steps[None, :] * numpy.cos(angle) + steps[:, None] * numpy.sin(angle)
    along = steps[:, None] * numpy.cos(angle) - steps[None, :] * numpy.sin(angle)
    period = random.uniform(0.1, 0.2)
    sharp = side * period / 4  # edges of a texture are as wide as a pixel: no staircase
    if kind == "gradient":
        share = (across - across.min()) / (across.max() - across.min())
    elif kind == "stripes":
        share = _edge(numpy.sin(2 * numpy.pi * across / period), sharp)
    elif kind == "checks":
        share = _edge(numpy.sin(numpy.pi * across / period) * numpy.sin(numpy.pi * along / period), sharp)
    else:
        assert kind == "dots"
        waves = numpy.cos(2 * numpy.pi * across / period) + numpy.cos(2 * numpy.pi * along / period)
        share = _edge(waves - 0.9, sharp)
    if kind != "gradient":
        two = one + (two - one) * random.uniform(0.35, 0.8)  # textures stay behind the objects
    pixels = one + (two - one) * share[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8))


def photographs_installed() -> bool:
    """Whether scikit-image, where the photographs are, is there (extra `eval`)."""
    return find_spec("skimage") is not None


def check_photographs() -> None:
    """Find out whether photographs can be had.

    Raises:
        MissingPhotographsError: they cannot; the message says how.
    """
    if not photographs_installed():
        raise MissingPhotographsError(
            "pieces of photographs stand behind some of the drawn scenes, and they come with scikit-image, which is not "
            f"installed; {install_command('eval')}, or leave them out with --no-photos (photos=False)"
        )


def _muted(random: Random) -> NDArray[numpy.float32]:
    level = random.uniform(70, 235)
    return numpy.array([level + random.uniform(-22, 22) for _ in range(3)], dtype=numpy.float32)


def _edge(wave: NDArray[numpy.float32], sharp: float) -> NDArray[numpy.float32]:
    return (wave * sharp + 0.5).clip(0, 1)


def _photo(side: int, random: Random, split: str) -> Image.Image:
    photo = _photograph(random.choice(_PHOTOS[split]))
    size = random.uniform(0.4, 1.0) * min(photo.size)
    left, top = random.uniform(0, photo.width - size), random.uniform(0, photo.height - size)
    piece = photo.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + size, top + size), reducing_gap=2)
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else piece


@cache
def _photograph(name: str) -> Image.Image:
    check_photographs()
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    return Image.open(Path(spec.origin).parent / "data" / name).convert("RGB")
