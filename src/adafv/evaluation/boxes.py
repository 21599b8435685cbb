"""Pictures with boxes around what can be asked for, from a JSON file or from the drawn world."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from adafv.errors import AdaFVError
from adafv.evaluation.drawn import DrawnPicture
from adafv.evaluation.places import Box
from adafv.evaluation.questions import FilePicture, Picture
from adafv.evaluation.world.questions import a as with_article
from adafv.evaluation.world.scenes import render, sample_scene
from adafv.printable import shortened


class BoxesError(AdaFVError, ValueError):
    """A file of boxes cannot be read, or is none."""


@dataclass(frozen=True)
class BoxedPicture:
    """A picture, and where things are in it."""

    picture: Picture
    boxes: Mapping[str, tuple[Box, ...]]
    """Per class the boxes (left, top, right, bottom) of its objects, in shares of the picture's width and height."""

    def load(self) -> Image.Image:
        return self.picture.load()


@dataclass(frozen=True)
class Boxed:
    """A data set."""

    name: str
    pictures: list[BoxedPicture]


def article(phrase: str) -> str:
    """The phrase with its article."""
    return with_article(phrase)


def read_boxes(source: Path, images: Path | None = None) -> Boxed:
    """Read {"photo.jpg": {"width": 512, "height": 342, "boxes": [["bird", x0, y0, x1, y1], ...]}, ...}, boxes in pixels.

    Other entries, such as captions, are passed over. Sides of boxes that stand out of the picture are cut.

    Args:
        source: the JSON file, or a folder with `images.json`.
        images: where the pictures are. None: in `images/` beside the file, or beside it.

    Raises:
        BoxesError: there is no such file, it is none, or a picture that it names is missing.
    """
    file = source / "images.json" if source.is_dir() else source
    shown = shortened(file)
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BoxesError(f"there is no file {shown}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise BoxesError(f"{shown} is not JSON ({shortened(error)}); see docs/analyze.md for its form") from error
    except OSError as error:
        raise BoxesError(f"{shown} cannot be read ({shortened(error.strerror)}); check the path") from error
    if not isinstance(listed, dict) or not listed:
        raise BoxesError(f'{shown} is no object of pictures; write {{"photo.jpg": {{"width": ..., "boxes": [...]}}}}')
    folders = [images] if images is not None else [file.parent / "images", file.parent]
    pictures = []
    for name, about in listed.items():
        path = next((folder / name for folder in folders if _is_file(folder / name)), None)
        if path is None:
            raise BoxesError(
                f"{shown} names the picture {shortened(name)}, which is not in {shortened(folders[0])}; --images DIR"
            )
        pictures.append(BoxedPicture(FilePicture(path, name), _boxes_of(about, f"{shown}, {shortened(name)}")))
    label = file.parent.name if file.name == "images.json" else file.stem
    return Boxed(label or file.stem, pictures)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def _boxes_of(about: Any, where: str) -> dict[str, tuple[Box, ...]]:
    def wrong(what: str) -> BoxesError:
        return BoxesError(f"{where}: {what}; see docs/analyze.md for the form of the file")

    if not isinstance(about, dict):
        raise wrong("is no object")
    sides = [about.get("width"), about.get("height")]
    if not all(isinstance(side, (int, float)) and not isinstance(side, bool) and side > 0 for side in sides):
        raise wrong("has no width and height above 0")
    try:
        width, height = (float(side) for side in sides)  # type: ignore[arg-type]
    except OverflowError:
        raise wrong("has a width or height that no picture has") from None
    found: dict[str, list[Box]] = {}
    boxes = about.get("boxes")
    if not isinstance(boxes, list):
        raise wrong("has no list of boxes")
    for box in boxes:
        if not (isinstance(box, list) and len(box) == 5 and isinstance(box[0], str) and box[0].strip()):
            raise wrong(f"has the box {shortened(box, 60)}, which is not [class, x0, y0, x1, y1]")
        try:
            left, top, right, bottom = (float(side) for side in box[1:])
        except (TypeError, ValueError, OverflowError):
            raise wrong(f"has the box {shortened(box, 60)}, whose sides are not numbers") from None
        left, right = (min(max(side / width, 0.0), 1.0) for side in (left, right))
        top, bottom = (min(max(side / height, 0.0), 1.0) for side in (top, bottom))
        if not (left < right and top < bottom):
            raise wrong(f"has the box {shortened(box, 60)}, which holds nothing: x0 < x1 and y0 < y1, in the picture")
        found.setdefault(box[0].strip(), []).append((left, top, right, bottom))
    return {name: tuple(own) for name, own in found.items()}


def drawn_boxes(count: int, side: int, *, photos: bool = True, split: str = "test") -> Boxed:
    """Drawn scenes, `side` pixels wide and high, with the boxes of their things."""
    return Boxed("drawn scenes", list(_drawn(count, side, photos, split)))


def _drawn(count: int, side: int, photos: bool, split: str) -> Iterator[BoxedPicture]:
    for number in range(count):
        scene = sample_scene(split, number, photos=photos)
        _, places = render(scene, side)
        found: dict[str, list[Box]] = {}
        for thing, box in zip(scene.things, places, strict=True):
            found.setdefault(thing.kind, []).append(tuple(edge / side for edge in box))
        yield BoxedPicture(
            DrawnPicture(split, number, side, photos), {kind: tuple(boxes) for kind, boxes in found.items()}
        )
