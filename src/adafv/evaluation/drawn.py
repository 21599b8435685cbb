"""The drawn world as pictures and questions, as everything else in this package takes them."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from random import Random
from typing import Any

from PIL import Image

from adafv.evaluation.questions import Question
from adafv.evaluation.world.details import DETAIL_KINDS, DetailedScene, ask_detail, render, sample_detailed_scene
from adafv.evaluation.world.questions import QUESTION_KINDS, ask
from adafv.evaluation.world.questions import Question as Asked
from adafv.evaluation.world.scenes import Scene, sample_scene

QUESTIONS_PER_SCENE = 2
SIDE = 336
"""Pixels of a picture for models that do not say how large they see one."""


@dataclass(frozen=True)
class DrawnPicture:
    """A scene, drawn when it is needed."""

    split: str
    number: int
    side: int
    photos: bool = True
    detailed: bool = False
    """Whether its things bear tags that only a crop can show."""

    @property
    def name(self) -> str:
        return f"{'detailed ' if self.detailed else ''}scene {self.number}"

    def load(self) -> Image.Image:
        sample = sample_detailed_scene if self.detailed else sample_scene
        return render(sample(self.split, self.number, photos=self.photos), self.side)[0]

    def digest(self) -> str:
        return _digest(self)


@lru_cache(maxsize=65536)
def _digest(picture: DrawnPicture) -> str:
    """Of the pixels: what a scene looks like may change from one release to the next."""
    return hashlib.sha256(picture.load().tobytes() + repr(picture.side).encode()).hexdigest()


def held_out(count: int, *, photos: bool = True) -> Iterator[tuple[Scene, Asked]]:
    """The first `count` questions of the test set: all kinds alike, two a scene."""
    kinds = [*QUESTION_KINDS]
    made, number = 0, 0
    while made < count:
        scene = sample_scene("test", number, photos=photos)
        random = Random(f"adafv test question {number}")
        for place in range(QUESTIONS_PER_SCENE):
            question = ask(scene, random, kinds[made % len(kinds)])
            # A scene without an object that is clearly the biggest, say, leaves that question to a later scene.
            if question is not None and made < count:
                made += 1
                yield scene, question
            elif place == 0:
                break
        number += 1


def held_out_details(count: int, *, photos: bool = True) -> Iterator[tuple[int, Asked]]:
    """(number of the detailed scene, question): the first `count` of the test set, all kinds and details alike."""
    makers: list[Callable[[DetailedScene, Random], Asked | None]] = [
        *(partial(ask, kind=kind) for kind in QUESTION_KINDS),
        *(partial(ask_detail, kind=kind) for kind in DETAIL_KINDS),
    ]
    made, number = 0, 0
    while made < count:
        scene = sample_detailed_scene("test", number, photos=photos)
        random = Random(f"adafv detailed test question {number}")
        for _ in range(QUESTIONS_PER_SCENE):
            question = makers[made % len(makers)](scene, random)
            if question is None:  # a later scene may allow it
                break
            if made < count:
                made += 1
                yield number, question
        number += 1


def drawn_questions(
    count: int, side: int, *, photos: bool = True, detailed: bool = False, skip: int = 0
) -> list[Question]:
    """Questions about test scenes, which no training met, in pictures of `side` pixels.

    Args:
        count: how many, of those that `skip` leaves.
        skip: how many of the first are left out, as those that something was chosen on.
        detailed: scenes whose things bear tags, and questions about these among the others. `side` is then one that tags can
            be drawn at, see `world.details.render`.
    """
    numbered: Iterator[tuple[int, Asked]] = (
        held_out_details(skip + count, photos=photos)
        if detailed
        else ((scene.number, asked) for scene, asked in held_out(skip + count, photos=photos))
    )
    return [
        Question(
            name=f"{number} {asked.text}",
            picture=DrawnPicture("test", number, side, photos, detailed),
            text=asked.text,
            answers=(asked.answer,),
            kind=asked.kind,
            group=str(number),
            where=f"scene {number}",
        )
        for number, asked in islice(numbered, skip, None)
    ]


def faint_ones(count: int, *, photos: bool = True, detailed: bool = False) -> frozenset[str]:
    """Names of the questions whose answer hangs on a small, faint object."""
    if detailed:
        return frozenset(
            f"{number} {asked.text}" for number, asked in held_out_details(count, photos=photos) if asked.faint
        )
    return frozenset(f"{scene.number} {asked.text}" for scene, asked in held_out(count, photos=photos) if asked.faint)


def side_for(model: Any) -> int:
    """How large to draw for a model: as its tower sees a picture, or twice that where it sees it in crops as well.

    Nothing is then scaled on the way. `SIDE` where the model does not say.
    """
    size = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    if not isinstance(size, int):
        return SIDE
    return size * (2 if getattr(model.config, "image_grid_pinpoints", None) else 1)
