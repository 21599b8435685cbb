"""Scenes: a few large, striking objects and some small, faint ones, with everything about them known.

A scene is a list of facts; `render` makes the picture at any size. Scene number i of a split is always the same, and no
two splits share one: the split's name is part of the seed.

Training and validation scenes never hold two kinds of a pair in `HELD_OUT` together; every test scene holds at least
one such pair. A model that has learned scenes by heart, not objects, fails there.
"""

from dataclasses import dataclass
from itertools import combinations
from random import Random

from PIL import Image

from adafv.evaluation.world.backgrounds import BACKGROUNDS, TEXTURES, paint
from adafv.evaluation.world.objects import COLOURS, KINDS, draw

SPLITS = ("train", "validation", "test")
HELD_OUT = frozenset(frozenset(pair) for pair in Random("held-out pairings").sample([*combinations(KINDS, 2)], 40))
"""Pairs of kinds that only test scenes show together: 40 of 276."""

LARGE, SMALL = (0.29, 0.44), (0.16, 0.22)
"""Longer side of an object, as a share of the picture's."""
FAINT = (0.5, 0.75)
"""Opacity of the small, faint objects."""


@dataclass(frozen=True)
class Thing:
    """An object in a scene. Lengths are shares of the picture's side."""

    kind: str
    colour: str
    x: float
    y: float
    """Of the middle, from the left and from the top."""
    size: float
    """The longer side."""
    opacity: float
    angle: float
    stretch: float
    shade: float
    flip: bool

    @property
    def faint(self) -> bool:
        """Small and faint, as opposed to large and striking."""
        return self.opacity < 1


@dataclass(frozen=True)
class Scene:
    split: str
    number: int
    things: tuple[Thing, ...]
    background: str
    background_seed: int

    def of(self, kind: str, colour: str | None = None) -> list[Thing]:
        """The things of a kind, and of a colour where one is given."""
        return [thing for thing in self.things if thing.kind == kind and colour in (None, thing.colour)]


Box = tuple[int, int, int, int]


def render(scene: Scene, side: int) -> tuple[Image.Image, list[Box]]:
    """The picture, `side` x `side` pixels, and the box (left, top, right, bottom) of every thing in pixels."""
    picture = paint(scene.background, side, scene.background_seed, scene.split)
    boxes = []
    for thing in scene.things:
        drawn = draw(
            thing.kind,
            COLOURS[thing.colour],
            max(4, round(thing.size * side)),
            angle=thing.angle,
            stretch=thing.stretch,
            shade=thing.shade,
            flip=thing.flip,
        )
        mask = drawn.getchannel("A")
        if thing.faint:
            mask = mask.point([round(level * thing.opacity) for level in range(256)])
        left, top = round(thing.x * side - drawn.width / 2), round(thing.y * side - drawn.height / 2)
        picture.paste(drawn.convert("RGB"), (left, top), mask)
        boxes.append((max(0, left), max(0, top), min(side, left + drawn.width), min(side, top + drawn.height)))
    return picture, boxes


def sample_scene(split: str, number: int, *, photos: bool = True) -> Scene:
    """Scene `number` of a split.

    Args:
        split: one of `SPLITS`.
        number: any integer >= 0; every number is another scene.
        photos: False leaves out photographic backgrounds, which need an extra package.
    """
    assert split in SPLITS, split
    random = Random(f"adafv scene {split} {number} {photos}")
    backgrounds = BACKGROUNDS if photos else TEXTURES
    while True:
        kinds = _kinds(random, split)
        things = _place(random, kinds)
        if things is not None:
            return Scene(split, number, things, random.choice(backgrounds), random.getrandbits(32))


def _kinds(random: Random, split: str) -> list[tuple[str, bool]]:
    """(kind, faint) of every thing to place: large ones first. Now and then a kind comes several times, to be counted."""
    chosen: list[str] = []
    if split == "test":
        chosen = sorted(random.choice(sorted(map(sorted, HELD_OUT))))
        random.shuffle(chosen)
    wanted = random.randint(3, 5)
    while len(chosen) < wanted:
        kind = random.choice(KINDS)
        pairs = [frozenset((kind, other)) for other in chosen]
        if kind not in chosen and (split == "test" or not any(pair in HELD_OUT for pair in pairs)):
            chosen.append(kind)
    random.shuffle(chosen)
    large = random.randint(1, min(3, wanted - 1))
    things = [(kind, number >= large) for number, kind in enumerate(chosen)]
    if random.random() < 0.6:
        kind, faint = random.choice(things)
        copies = random.randint(1, 3 if faint else 1 if large > 1 else 2)
        things += [(kind, faint)] * copies
    return sorted(things, key=lambda thing: thing[1])


def _place(random: Random, kinds: list[tuple[str, bool]]) -> tuple[Thing, ...] | None:
    """Give every thing a place where it touches no other; None where they do not fit."""
    things: list[Thing] = []
    for kind, faint in kinds:
        for _ in range(40):
            size = random.uniform(*(SMALL if faint else LARGE))
            x, y = random.uniform(size / 2, 1 - size / 2), random.uniform(size / 2, 1 - size / 2)
            if all(max(abs(x - other.x), abs(y - other.y)) > 0.48 * (size + other.size) for other in things):
                break
        else:
            return None
        things.append(
            Thing(
                kind,
                random.choice([*COLOURS]),
                x,
                y,
                size,
                opacity=random.uniform(*FAINT) if faint else 1.0,
                angle=random.uniform(-20, 20),
                stretch=random.uniform(0.87, 1.15),
                shade=random.uniform(-1, 1),
                flip=random.random() < 0.5,
            )
        )
    return tuple(things)
