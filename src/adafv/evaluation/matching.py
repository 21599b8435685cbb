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
    right = [normalised(each) or each.strip().lower() for each in question.answers]
    said = normalised(answer) or answer.strip().lower()
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
    texts = [normalised(choice) for choice in choices]
    said = normalised(answer)
    if said in texts:
        return texts.index(said)
    found = _LETTER.match(answer.strip())
    if found is not None:
        place = ord(found[1].upper()) - ord("A")
        return place if place < len(choices) else None
    return None


def right_choices(answers: Sequence[str], choices: Sequence[str]) -> set[int | None]:
    """Places of the choices that are right, by their texts or letters; empty where an answer is none of them."""
    texts = [normalised(choice) for choice in choices]
    places: set[int | None] = set()
    for answer in answers:
        letters = [place for place in range(len(choices)) if answer.strip().upper() == letter_of(place)]
        places.update(letters or [place for place, text in enumerate(texts) if text == normalised(answer)])
    return places
