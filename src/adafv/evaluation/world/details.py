"""Details that only a crop can show: every object of a detailed scene bears a tag with a letter or a fine pattern.

A tag is drawn for a picture of `FINE` pixels, which the twin sees as four crops. In the thumbnail, half as large, nothing
is left of a pattern: its lines are one pixel wide, and two of them make one pixel of the plain grey that "plain" is made
of. Of a letter, 5 x 7 pixels with strokes of one, a smear is left. What can be told of it is a matter of measurement
(`adafv bench accuracy --details`).

These scenes are a layer of their own, with seeds of their own: scenes, pictures and questions of `scenes` and `questions`
are untouched by them. Their questions are for models that see crops; for others they have no answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy
from numpy.typing import NDArray
from PIL import Image

from adafv.evaluation.world import scenes
from adafv.evaluation.world.questions import Question, only
from adafv.evaluation.world.scenes import Box, Scene, Thing, sample_scene

FINE = 288
"""Pixels of the side of the picture that tags are drawn for."""
CELL = 12
"""Side of a tag in these pixels, and of a patch of a crop."""
JITTER = 2
"""How far the middle of a tag may lie from the middle of a patch, in these pixels. What is written on it so lies in one
patch: the tower is too small to learn letters that are cut in two."""

LETTERS = {
    "b": ("####.", "#...#", "#...#", "####.", "#...#", "#...#", "####."),
    "e": ("#####", "#....", "#....", "####.", "#....", "#....", "#####"),
    "h": ("#...#", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "k": ("#...#", "#..#.", "#.#..", "##...", "#.#..", "#..#.", "#...#"),
    "m": ("#...#", "##.##", "#.#.#", "#.#.#", "#...#", "#...#", "#...#"),
    "n": ("#...#", "##..#", "##..#", "#.#.#", "#..##", "#..##", "#...#"),
    "r": ("####.", "#...#", "#...#", "####.", "#.#..", "#..#.", "#...#"),
    "w": ("#...#", "#...#", "#...#", "#.#.#", "#.#.#", "##.##", "#...#"),
}
PATTERNS = ("barred", "checked", "lined", "plain")
"""Upright lines, single pixels, level lines, and the grey that all of these have in the mean."""
MARKS = (*LETTERS, *PATTERNS)

_INK, _PLATE = 28, 250
_FIRST = 10**9
"""Number of the scene that detailed scene 0 of a split is made of: no other use draws so many."""


@dataclass(frozen=True)
class Tag:
    mark: str
    """One of `MARKS`."""
    left: int
    top: int
    """In pixels of a picture of side `FINE`."""

    @property
    def middle(self) -> tuple[int, int]:
        """From the left and from the top, in the same pixels."""
        return self.left + CELL // 2, self.top + CELL // 2


@dataclass(frozen=True)
class DetailedScene(Scene):
    tags: tuple[Tag, ...]
    """One a thing, in their order."""

    def tag_of(self, thing: Thing) -> Tag:
        return self.tags[self.things.index(thing)]

    def with_mark(self, mark: str) -> list[Thing]:
        return [thing for thing, tag in zip(self.things, self.tags, strict=True) if tag.mark == mark]


def sample_detailed_scene(split: str, number: int, *, photos: bool = True) -> DetailedScene:
    """Detailed scene `number` of a split; arguments as for `sample_scene`. It holds the same pairs of kinds as others."""
    return with_tags(sample_scene(split, _FIRST + number, photos=photos))


def with_tags(scene: Scene) -> DetailedScene:
    """The scene with a tag on every thing; the same ones each time."""
    random = Random(f"adafv tags {scene.split} {scene.number} {scene.background_seed}")
    tags = []
    for thing in scene.things:
        mark = random.choice([*LETTERS]) if random.random() < 0.6 else random.choice(PATTERNS)
        left, top = (
            int(middle * FINE) // CELL * CELL + random.randint(-JITTER, JITTER) for middle in (thing.x, thing.y)
        )
        tags.append(Tag(mark, left, top))
    return DetailedScene(
        scene.split, scene.number, scene.things, scene.background, scene.background_seed, tags=tuple(tags)
    )


def render(scene: Scene, side: int) -> tuple[Image.Image, list[Box]]:
    """The picture and the boxes of its things, of scenes with tags and without, as `scenes.render` gives them.

    Raises:
        ValueError: the scene has tags, and `side` is neither half of `FINE` nor a multiple of it; they would be blurred.
    """
    if not isinstance(scene, DetailedScene):
        return scenes.render(scene, side)
    if side == FINE // 2:
        picture, boxes = render(scene, FINE)
        return picture.reduce(2), [(left // 2, top // 2, right // 2, bottom // 2) for left, top, right, bottom in boxes]
    if side % FINE:
        raise ValueError(f"detailed scenes are drawn {FINE // 2} pixels wide or a multiple of {FINE}, not {side}")
    factor = side // FINE
    picture, boxes = scenes.render(scene, side)
    for tag in scene.tags:
        drawn = Image.fromarray(_drawn(tag.mark).repeat(factor, 0).repeat(factor, 1))
        picture.paste(drawn.convert("RGB"), (tag.left * factor, tag.top * factor))
    return picture, boxes


def _drawn(mark: str) -> NDArray[numpy.uint8]:
    """[CELL, CELL] grey levels."""
    down, across = numpy.mgrid[:CELL, :CELL]
    if mark in LETTERS:
        ink = numpy.zeros((CELL, CELL), dtype=bool)
        ink[2:9, 3:8] = [[dot == "#" for dot in row] for row in LETTERS[mark]]
    elif mark == "plain":
        return numpy.full((CELL, CELL), (_INK + _PLATE) // 2, dtype=numpy.uint8)
    else:
        ink = {"barred": across, "checked": across + down, "lined": down}[mark] % 2 == 1
    return numpy.where(ink, _INK, _PLATE).astype(numpy.uint8)


def letter(scene: DetailedScene, random: Random) -> Question | None:
    return _mark(scene, random, "letter")


def pattern(scene: DetailedScene, random: Random) -> Question | None:
    return _mark(scene, random, "pattern")


def marked(scene: DetailedScene, random: Random) -> Question | None:
    """Which object bears a mark that no other bears."""
    single = [mark for mark in MARKS if len(scene.with_mark(mark)) == 1]
    if not single:
        return None
    mark = random.choice(single)
    what = "letter" if mark in LETTERS else "pattern"
    [thing] = scene.with_mark(mark)
    return Question("marked", f"what object has the {what} {mark}?", thing.kind, (thing,))


def _mark(scene: DetailedScene, random: Random, what: str) -> Question | None:
    marks = LETTERS if what == "letter" else PATTERNS
    things = [thing for thing in only(scene) if scene.tag_of(thing).mark in marks]
    if not things:
        return None
    thing = random.choice(things)
    verb = "are" if thing.kind == "scissors" else "is"
    return Question(what, f"what {what} {verb} on the {thing.kind}?", scene.tag_of(thing).mark, (thing,))


DETAIL_KINDS: dict[str, Callable[[DetailedScene, Random], Question | None]] = {
    "letter": letter,
    "pattern": pattern,
    "marked": marked,
}


def ask_detail(scene: DetailedScene, random: Random, kind: str) -> Question | None:
    """A question that only a crop can answer; None where the scene allows none of that kind."""
    return DETAIL_KINDS[kind](scene, random)
