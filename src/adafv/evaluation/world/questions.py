"""Questions about a scene, with their answers, and captions.

Every question has exactly one right answer: what would be ambiguous (the colour of a key where there are two keys, left
of by a hair, biggest by a little) is not asked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from adafv.evaluation.world.objects import COLOURS, KINDS
from adafv.evaluation.world.scenes import Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")
APART = 0.14
"""How far apart two middles must lie for "left of" and the like, as a share of the picture's side."""
BIGGER = 1.25
"""How many times longer the biggest must be than the next, and the next than the smallest."""


@dataclass(frozen=True)
class Question:
    kind: str
    """One of `QUESTION_KINDS`."""
    text: str
    answer: str
    things: tuple[Thing, ...] = ()
    """The things of the scene that the answer hangs on."""

    @property
    def faint(self) -> bool:
        """Whether the answer hangs on a small, faint object."""
        return any(thing.faint for thing in self.things)


def plural(kind: str) -> str:
    return {"leaf": "leaves", "fish": "fish", "scissors": "scissors"}.get(kind, f"{kind}s")


def a(phrase: str) -> str:
    """The phrase with its article."""
    if phrase.endswith("scissors"):
        return phrase
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def presence(scene: Scene, random: Random) -> Question | None:
    present = sorted({thing.kind for thing in scene.things})
    if random.random() < 0.4:
        yes = random.random() < 0.5
        kind = random.choice(present if yes else [kind for kind in KINDS if kind not in present])
        return _yes_no("presence", _there(random, kind), yes, scene.of(kind))
    thing = random.choice(scene.things)
    yes = random.random() < 0.5
    if yes:
        return _yes_no("presence", _there(random, f"{thing.colour} {thing.kind}"), True, [thing])
    # No: of the wrong colour, where the picture has that colour if it can be.
    others = [other.colour for other in scene.things if not scene.of(thing.kind, other.colour)]
    free = [colour for colour in COLOURS if not scene.of(thing.kind, colour)]
    colour = random.choice(others) if others and random.random() < 0.7 else random.choice(free)
    return _yes_no("presence", _there(random, f"{colour} {thing.kind}"), False, scene.of(thing.kind))


def colour(scene: Scene, random: Random) -> Question | None:
    thing = _single(scene, random)
    if thing is None:
        return None
    word = random.choice(("colour", "color"))
    verb = "are" if thing.kind == "scissors" else "is"
    return Question("colour", f"what {word} {verb} the {thing.kind}?", thing.colour, (thing,))


def counting(scene: Scene, random: Random) -> Question | None:
    kinds = sorted({thing.kind for thing in scene.things})
    # Counts above one are rarer in scenes than in questions, else "one" would be the answer.
    weights = [4 ** (min(len(scene.of(kind)), 3) - 1) for kind in kinds]
    [kind] = random.choices(kinds, weights)
    things = scene.of(kind)
    # A lone kind of a scene with no group is asked for less often than not: "one" would be most answers.
    if len(things) == 1 and random.random() < 0.6:
        return None
    return Question("counting", f"how many {plural(kind)} are there?", NUMBERS[len(things)], tuple(things))


def relation(scene: Scene, random: Random) -> Question | None:
    singles = only(scene)
    pairs = []
    for one in singles:
        for two in singles:
            if abs(one.x - two.x) > APART and one is not two:
                pairs.append((one, two, "left of" if one.x < two.x else "right of"))
            if abs(one.y - two.y) > APART and one is not two:
                pairs.append((one, two, "above" if one.y < two.y else "below"))
    if not pairs:
        return None
    one, two, truth = random.choice(pairs)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    verb = "are" if one.kind == "scissors" else "is"
    if random.random() < 0.5:
        yes = random.random() < 0.5
        said = truth if yes else opposite[truth]
        return _yes_no("relation", f"{verb} the {one.kind} {said} the {two.kind}?", yes, [one, two])
    choice = "left of or right of" if truth in ("left of", "right of") else "above or below"
    answer = truth.removesuffix(" of")
    return Question("relation", f"{verb} the {one.kind} {choice} the {two.kind}?", answer, (one, two))


def place(scene: Scene, random: Random) -> Question | None:
    thing = _single(scene, random)
    if thing is None:
        return None
    sides = []
    if abs(thing.x - 0.5) > APART / 2:
        sides.append(("left or right", "left" if thing.x < 0.5 else "right"))
    if abs(thing.y - 0.5) > APART / 2:
        sides.append(("above or below", "above" if thing.y < 0.5 else "below"))
    if not sides:
        return None
    sides_asked, answer = random.choice(sides)
    verb = "are" if thing.kind == "scissors" else "is"
    return Question("place", f"{verb} the {thing.kind} {sides_asked} in the picture?", answer, (thing,))


def size(scene: Scene, random: Random) -> Question | None:
    ordered = sorted(scene.things, key=lambda thing: thing.size)
    askable = []
    if ordered[-1].size >= BIGGER * ordered[-2].size:
        askable.append(("biggest", ordered[-1]))
    # The smallest may be one of several of its kind: the answer is the kind.
    smallest = ordered[0]
    if all(thing.kind == smallest.kind or thing.size >= BIGGER * smallest.size for thing in ordered):
        askable.append(("smallest", smallest))
    if not askable:
        return None
    which, thing = random.choice(askable)
    return Question("size", f"what is the {which} object?", thing.kind, (thing,))


def background(scene: Scene, random: Random) -> Question | None:
    return Question("background", "what is the background?", scene.background)


QUESTION_KINDS: dict[str, Callable[[Scene, Random], Question | None]] = {
    "presence": presence,
    "colour": colour,
    "counting": counting,
    "place": place,
    "relation": relation,
    "size": size,
    "background": background,
}


def ask(scene: Scene, random: Random, kind: str | None = None) -> Question | None:
    """A question about the scene, of a kind or of any; None where the scene allows none of that kind."""
    if kind is not None:
        return QUESTION_KINDS[kind](scene, random)
    while True:
        question = random.choice([*QUESTION_KINDS.values()])(scene, random)
        if question is not None:
            return question


def caption(scene: Scene, random: Random) -> str:
    """What a person would say of the picture: every striking object, and one faint object in two; its background last."""
    groups: dict[tuple[str, str, bool], int] = {}
    for thing in scene.things:
        if not thing.faint or random.random() < 0.5:
            key = (thing.colour, thing.kind, thing.faint)
            groups[key] = groups.get(key, 0) + 1
    phrases = []
    for (paint, kind, faint), count in groups.items():
        word = "small" if faint else "large"
        if count == 1:
            phrases.append(a(f"{word} {paint} {kind}"))
        else:
            phrases.append(f"{NUMBERS[count]} {word} {paint} {plural(kind)}")
    return f"{', '.join(phrases)} on {scene.background}"


def _there(random: Random, phrase: str) -> str:
    verb = "are" if phrase.endswith("scissors") else "is"
    return random.choice((f"{verb} there {a(phrase)}?", f"do you see {a(phrase)}?"))


def _yes_no(kind: str, text: str, yes: bool, things: list[Thing]) -> Question:
    return Question(kind, text, "yes" if yes else "no", tuple(things))


def only(scene: Scene) -> list[Thing]:
    """The things that are the only ones of their kind."""
    return [thing for thing in scene.things if len(scene.of(thing.kind)) == 1]


def _single(scene: Scene, random: Random) -> Thing | None:
    singles = only(scene)
    return random.choice(singles) if singles else None
