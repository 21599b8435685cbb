"""Answers to questions about generated scenes, found from the question's words and the scene's facts alone.

On purpose not the code that asks the questions, so that each can find a mistake in the other.
"""

import re

from adafv.evaluation.world.details import DetailedScene
from adafv.evaluation.world.scenes import Scene, Thing

_SINGULAR = {"leaves": "leaf", "fish": "fish", "scissors": "scissors"}
_NUMBERS = ["zero", "one", "two", "three", "four"]
_SIDES = {"left": ("x", -1), "right": ("x", 1), "above": ("y", -1), "below": ("y", 1)}


class AmbiguousError(Exception):
    """The question has no answer, or more than one."""


def right_answer(scene: Scene, text: str) -> str:
    """The one right answer.

    Raises:
        AmbiguousError: two people could disagree about it.
    """
    if text == "what is the background?":
        return scene.background
    if found := re.fullmatch(r"(?:(?:is|are) there|do you see) (?:an? )?(?:(\w+) )?(\w+)\?", text):
        colour, kind = found.groups()
        there = any(thing.kind == kind and colour in (None, thing.colour) for thing in scene.things)
        return "yes" if there else "no"
    if found := re.fullmatch(r"what colou?r (?:is|are) the (\w+)\?", text):
        return _only(scene, found[1]).colour
    if found := re.fullmatch(r"how many (\w+) are there\?", text):
        kind = _SINGULAR.get(found[1], found[1].removesuffix("s"))
        return _NUMBERS[sum(thing.kind == kind for thing in scene.things)]
    if found := re.fullmatch(r"(?:is|are) the (\w+) (left|right|above|below)(?: of)? the (\w+)\?", text):
        return "yes" if _lies(_only(scene, found[1]), found[2], _only(scene, found[3])) else "no"
    if found := re.fullmatch(r"(?:is|are) the (\w+) (\w+)(?: of)? or (\w+)(?: of)? the (\w+)\?", text):
        one, two = _only(scene, found[1]), _only(scene, found[4])
        return found[2] if _lies(one, found[2], two) else found[3]
    if found := re.fullmatch(r"(?:is|are) the (\w+) (\w+) or (\w+) in the picture\?", text):
        return found[2] if _lies_in_picture(_only(scene, found[1]), found[2]) else found[3]
    if found := re.fullmatch(r"what is the (biggest|smallest) object\?", text):
        return _extreme(scene, found[1])
    if isinstance(scene, DetailedScene):
        written = [(thing.kind, tag.mark) for thing, tag in zip(scene.things, scene.tags, strict=True)]
        if found := re.fullmatch(r"what (letter|pattern) (?:is|are) on the (\w+)\?", text):
            [mark] = [mark for kind, mark in written if kind == _only(scene, found[2]).kind]
            if (len(mark) == 1) == (found[1] == "letter"):
                return mark
        if found := re.fullmatch(r"what object has the (letter|pattern) (\w+)\?", text):
            kinds = [kind for kind, mark in written if mark == found[2]]
            if len(kinds) == 1 and (len(found[2]) == 1) == (found[1] == "letter"):
                return kinds[0]
    raise AmbiguousError(f"no such question: {text}")


def _only(scene: Scene, kind: str) -> Thing:
    things = [thing for thing in scene.things if thing.kind == kind]
    if len(things) != 1:
        raise AmbiguousError(f"{len(things)} of the kind {kind}")
    return things[0]


def _lies(one: Thing, side: str, two: Thing) -> bool:
    axis, sign = _SIDES[side]
    distance = getattr(one, axis) - getattr(two, axis)
    if abs(distance) < 0.1:  # of the picture's side: nearly level, or one nearly over the other
        raise AmbiguousError(f"only {distance:.2f} apart")
    return distance * sign > 0


def _lies_in_picture(thing: Thing, side: str) -> bool:
    axis, sign = _SIDES[side]
    distance = getattr(thing, axis) - 0.5
    if abs(distance) < 0.05:
        raise AmbiguousError("in the middle")
    return distance * sign > 0


def _extreme(scene: Scene, which: str) -> str:
    largest_first = sorted(scene.things, key=lambda thing: thing.size, reverse=which == "biggest")
    extreme = largest_first[0]
    for other in scene.things:
        larger, smaller = max(extreme.size, other.size), min(extreme.size, other.size)
        if other.kind != extreme.kind and larger < 1.2 * smaller:
            raise AmbiguousError(f"{extreme.kind} and {other.kind} are nearly of a size")
    return extreme.kind
