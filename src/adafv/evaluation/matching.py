"""Whether an answer is right: the rules of VQA's and LLaVA's evaluations, stated.

Normalising (as the VQA evaluation does): lower case; articles, signs and double blanks out; numbers up to ten as digits.

    exact    the whole answer is one of those that are right
    first    it begins with one of them: "Yes, there is." is "yes", "two dogs" is "two"
    choice   of lettered choices: it is the letter ("B", "(B)", "B. a dog"), or the text of the choice
    vqa      several people's answers, some given more than once: min(1, those that said so / 3)
    auto     choice where there are choices; vqa for three answers or more of which one is there twice; first where what is
             right is "yes" or "no"; else exact

What is right is decided by text alone: "couch" is wrong where "sofa" was asked for. Such mistakes hit the unpruned and the
pruned model alike; differences, which are what `adafv check` is about, suffer little.
"""

import re
from collections import Counter
from collections.abc import Sequence

from adafv.evaluation.questions import Question, letter_of

RULES = ("auto", "exact", "first", "vqa")

_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = dict(
    zip(
        ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
        ("0", *map(str, range(11))),
        strict=True,
    )
)
_BETWEEN_DIGITS = re.compile(r"(?<=\d)[,](?=\d{3})")
_POINT = re.compile(r"(?<!\d)\.|\.(?!\d)")
_SIGNS = re.compile(r"[^\w\s.:/%$€£°+-]|(?<!\w)[-:/+](?!\w)")
_LETTER = re.compile(r"\(?([A-Za-z])(?:[).:,]|$)(?!\w)")


def normalised(text: str) -> str:
    """`text` as answers are compared."""
    text = _BETWEEN_DIGITS.sub("", re.sub("['\u2019]", "", text.lower()))
    text = _SIGNS.sub(" ", _POINT.sub(" ", text))
    words = [_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES]
    return " ".join(words)


def agree(one: str, other: str) -> bool:
    """Whether two answers say the same, as far as text tells."""
    return (normalised(one) or one.strip()) == (normalised(other) or other.strip())


def score(answer: str, question: Question, rule: str = "auto") -> float | None:
    """How right an answer is, 0 to 1; None where nobody said what is right.

    Args:
        rule: one of `RULES`.
    """
    if question.answers is None:
        return None
    right = [_compared(each) for each in question.answers]
    said = _compared(answer)
    if question.choices and rule == "auto":
        return float(_chosen(answer, question.choices) in right_choices(question.answers, question.choices))
    counts = Counter(right)
    if rule == "vqa" or (rule == "auto" and len(right) >= 3 and max(counts.values()) > 1):
        return min(1.0, counts[said] / 3)
    if rule == "first" or (rule == "auto" and set(right) <= {"yes", "no"}):
        return float(any(said == each or said.startswith(f"{each} ") for each in right))
    return float(said in counts)


def _chosen(answer: str, choices: Sequence[str]) -> int | None:
    """The place of the choice that an answer names."""
    place = place_of(answer, choices)
    if place is None and (found := _LETTER.match(answer.strip())):
        place = ord(found[1].upper()) - ord("A")
    return place if place is not None and place < len(choices) else None


def place_of(answer: str, choices: Sequence[str]) -> int | None:
    """The place of the choice whose text or letter an answer is: its text to the last sign, its letter, or else its text
    as answers are compared. "A" is a letter, though it would be an article, and "-" a text, though it would be a sign."""
    said = answer.strip()
    if said in choices:
        return list(choices).index(said)
    if (letter := said.upper()) in (letters := [letter_of(place) for place in range(len(choices))]):
        return letters.index(letter)
    texts = [_compared(choice) for choice in choices]
    return texts.index(_compared(answer)) if _compared(answer) in texts else None


def _compared(text: str) -> str:
    return normalised(text) or text.strip().lower()


def right_choices(answers: Sequence[str], choices: Sequence[str]) -> set[int | None]:
    """Places of the choices that are right, by their texts or letters; empty where an answer is none of them."""
    return {place for answer in answers if (place := place_of(answer, choices)) is not None}
