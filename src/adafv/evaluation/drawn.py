"""The drawn world as pictures and questions, as everything else in this package takes them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from PIL import Image

from adafv.evaluation.questions import Question
from adafv.evaluation.world.questions import QUESTION_KINDS, ask
from adafv.evaluation.world.questions import Question as Asked
from adafv.evaluation.world.scenes import Scene, render, sample_scene

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

    @property
    def name(self) -> str:
        return f"scene {self.number}"

    def load(self) -> Image.Image:
        return render(sample_scene(self.split, self.number, photos=self.photos), self.side)[0]

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


def drawn_questions(count: int, side: int, *, photos: bool = True) -> list[Question]:
    """Questions about test scenes, which no training met, in pictures of `side` pixels."""
    return [
        Question(
            name=f"{scene.number} {asked.text}",
            picture=DrawnPicture("test", scene.number, side, photos),
            text=asked.text,
            answers=(asked.answer,),
            kind=asked.kind,
            group=str(scene.number),
            where=f"scene {scene.number}",
        )
        for scene, asked in held_out(count, photos=photos)
    ]


def faint_ones(count: int, *, photos: bool = True) -> frozenset[str]:
    """Names of the questions whose answer hangs on a small, faint object."""
    return frozenset(f"{scene.number} {asked.text}" for scene, asked in held_out(count, photos=photos) if asked.faint)


def side_for(model: Any) -> int:
    """How large to draw for a model: as its tower sees a picture, or twice that where it sees it in crops as well.

    Nothing is then scaled on the way. `SIDE` where the model does not say.
    """
    size = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    if not isinstance(size, int):
        return SIDE
    return size * (2 if getattr(model.config, "image_grid_pinpoints", None) else 1)
