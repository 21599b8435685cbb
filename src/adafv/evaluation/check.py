"""What was answered, counted: what pruning loses at each budget, and the smallest budget that is safe.

The result is one JSON object (`check.schema.json`, described in docs/check.md). It holds no times and no places on this
machine, so the same answers and the same seed give the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from random import Random
from typing import Any

from adafv.evaluation.answers import BLANK, UNPRUNED, Configuration
from adafv.evaluation.matching import agree, score
from adafv.evaluation.questions import SKIP, BadRecord, Question, Questions, QuestionsError
from adafv.evaluation.statistics import CONFIDENCE, Paired, Step, fixed_sequences
from adafv.evaluation.store import Given, Store

SCHEMA = "adafv-check/1"
BY = ("auto", "accuracy", "agreement")
CASES = 24
"""Changed answers that are shown, at most."""
_DIGITS = 6


@dataclass(frozen=True)
class Wish:
    """What is to be found out."""

    max_loss: float = 0.01
    """The loss that must not be reached, as a share: 0.01 is one point."""
    by: str = "accuracy"
    """What is lost: "accuracy", or "agreement" with the unpruned model."""
    rule: str = "auto"
    """Of `adafv.evaluation.matching`."""
    seed: int = 0
    confidence: float = CONFIDENCE


def decided(questions: Questions, by: str, policy: str) -> tuple[Questions, str]:
    """What is counted, and the questions that it can be counted on.

    Args:
        by: one of `BY`; "auto" is accuracy where answers are given.

    Raises:
        QuestionsError: accuracy is to be counted, and some questions come without answers.
    """
    lacking = [each for each in questions.questions if each.answers is None]
    if by == "agreement" or (by == "auto" and len(lacking) == len(questions.questions)):
        return questions, "agreement"
    if lacking and policy != SKIP:
        raise QuestionsError(
            f"{len(lacking)} of {len(questions.questions)} questions have no answer, the first of them {lacking[0].where}; "
            "add the answers, leave these questions out with --bad-records skip, or count agreement with the unpruned model: "
            "--by agreement"
        )
    bad = [BadRecord(each.where or each.name, "has no answer, and accuracy is counted") for each in lacking]
    return questions.without(bad, {each.name for each in lacking}).checked(policy), "accuracy"


class Counted:
    """Answers to the same questions in several ways, compared with those of the unpruned model."""

    def __init__(
        self,
        questions: Sequence[Question],
        keys: Mapping[str, str],
        store: Store,
        ways: Sequence[Configuration],
        wish: Wish,
    ) -> None:
        self.questions, self.ways, self.wish = list(questions), list(ways), wish
        self.groups = [question.cluster for question in self.questions]
        self.given: dict[Configuration, list[Given]] = {}
        for way in self.ways:
            found = [store.get(keys[each.name], way.stored) for each in self.questions]
            assert None not in found, "every question was asked"
            self.given[way] = [each for each in found if each is not None]
        self.unpruned = next(way for way in self.ways if way.name == UNPRUNED)
        self.blank = next((way for way in self.ways if way.name == BLANK), None)
        answered = all(each.answers is not None for each in self.questions)
        self.right: dict[Configuration, list[float]] | None = None
        if answered:
            self.right = {
                way: [
                    score(one.answer, each, wish.rule) or 0.0 for one, each in zip(given, self.questions, strict=True)
                ]
                for way, given in self.given.items()
            }
        self.same = {
            way: [
                float(agree(one.answer, other.answer))
                for one, other in zip(given, self.given[self.unpruned], strict=True)
            ]
            for way, given in self.given.items()
        }

    def tokens(self, way: Configuration) -> float:
        """Visual tokens that the language model reads, on average."""
        return _mean([each.kept for each in self.given[way]])

    def accuracy(self, way: Configuration) -> Paired | None:
        """How often an answer is right."""
        if self.right is None:
            return None
        return Paired.of(self.right[way], self.groups, worst=0.0, best=1.0, seed=self.wish.seed)

    def agreement(self, way: Configuration) -> Paired:
        """How often an answer is that of the unpruned model."""
        return Paired.of(self.same[way], self.groups, worst=0.0, best=1.0, seed=self.wish.seed)

    def difference(self, way: Configuration) -> Paired:
        """Of what is counted: minus what is lost."""
        if self.wish.by == "agreement":
            values = [same - 1.0 for same in self.same[way]]
            return Paired.of(values, self.groups, worst=-1.0, best=0.0, seed=self.wish.seed)
        assert self.right is not None
        values = [mine - full for mine, full in zip(self.right[way], self.right[self.unpruned], strict=True)]
        return Paired.of(values, self.groups, seed=self.wish.seed)

    def sequences(self) -> dict[str, list[Configuration]]:
        """Per method its budgets, from the most tokens to the fewest; that is the order in which they are tested."""
        found: dict[str, list[Configuration]] = {}
        for way in self.ways:
            if way.pruned:
                found.setdefault(way.name, []).append(way)
        return {name: sorted(ways, key=lambda way: -self.tokens(way)) for name, ways in found.items()}

    def changes(self, way: Configuration) -> dict[str, list[int]]:
        """Questions (by their places) whose answer is another than that of the unpruned model.

        "lost": it was right, or more so; "gained": it is right now, or more so; "other": neither, or nobody said what is.
        """
        found: dict[str, list[int]] = {"lost": [], "gained": [], "other": []}
        for number, same in enumerate(self.same[way]):
            change = 0.0
            if self.right is not None:
                change = self.right[way][number] - self.right[self.unpruned][number]
            if change or not same:
                found["lost" if change < 0 else "gained" if change > 0 else "other"].append(number)
        return found


def result(counted: Counted, about: Mapping[str, Any], bad: Sequence[BadRecord]) -> dict[str, Any]:
    """The JSON object.

    Args:
        about: "model" (its name), "fingerprint", "source" (of the questions) and "settings".
    """
    wish, sequences = counted.wish, counted.sequences()
    differences = {way: counted.difference(way) for ways in sequences.values() for way in ways}
    steps = fixed_sequences(
        [[differences[way].p_value(wish.max_loss) for way in ways] for ways in sequences.values()], 1 - wish.confidence
    )
    first_level = (1 - wish.confidence) / max(1, len(sequences))
    rows, verdicts = [], []
    for (name, ways), tests in zip(sequences.items(), steps, strict=True):
        for way, step in zip(ways, tests, strict=True):
            rows.append(_row(counted, way, differences[way], step, first_level))
        verdicts.append(_verdict(counted, name, ways, tests, differences, first_level))
    unpruned, blank = counted.unpruned, counted.blank
    return {
        "schema": SCHEMA,
        "model": {"name": about["model"], **about["fingerprint"]},
        "questions": {
            "source": about["source"],
            "count": len(counted.questions),
            "pictures": len(set(counted.groups)),
            "with_answers": counted.right is not None,
            "left_out": [{"where": each.where, "problem": each.problem} for each in bad],
        },
        "settings": {
            "counted": wish.by,
            "max_loss": _rounded(wish.max_loss),
            "confidence": _rounded(wish.confidence),
            "matching": wish.rule,
            "seed": wish.seed,
            **about["settings"],
        },
        "unpruned": {"tokens": _rounded(counted.tokens(unpruned)), "accuracy": _estimate(counted.accuracy(unpruned))},
        "blank": None
        if blank is None
        else {
            "accuracy": _estimate(counted.accuracy(blank)),
            "agreement": _estimate(counted.agreement(blank)),
        },
        "rows": rows,
        "verdicts": verdicts,
        "cases": _cases(counted, [way for ways in sequences.values() for way in ways]),
    }


def as_text(result: Mapping[str, Any]) -> str:
    """The JSON text, the same bytes for the same result."""
    return json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def schema() -> dict[str, Any]:
    """JSON Schema of the result."""
    text = (files("adafv.evaluation") / "check.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def _row(
    counted: Counted, way: Configuration, difference: Paired, step: Step | None, first_level: float
) -> dict[str, Any]:
    level = first_level if step is None else step.level
    lower, upper = difference.interval()
    changes = counted.changes(way)
    given, whole = counted.given[way], counted.tokens(counted.unpruned)
    return {
        "method": way.name,
        "keep": str(way.budget),
        "tokens": _rounded(counted.tokens(way)),
        "share": _rounded(counted.tokens(way) / whole),
        "kept_whole": sum(each.kept >= each.tokens for each in given),
        "chosen_without_text": sum(bool(each.chosen_by) for each in given),
        "accuracy": _estimate(counted.accuracy(way)),
        "agreement": _estimate(counted.agreement(way)),
        "loss": {"mean": _rounded(-difference.mean), "low": _rounded(-upper), "high": _rounded(-lower)},
        "loss_bound": {"at_most": _rounded(-difference.lower(1 - level)), "confidence": _rounded(1 - level)},
        "test": None
        if step is None
        else {"p": _rounded(step.p_value), "level": _rounded(step.level), "passed": step.passed},
        "changed": {kind: len(places) for kind, places in changes.items()},
        "kinds": _kinds(counted, way),
    }


def _kinds(counted: Counted, way: Configuration) -> dict[str, Any]:
    """By kind of question, where records name kinds: what was lost, and how often the answer stayed. No claims."""
    places: dict[str, list[int]] = {}
    for number, question in enumerate(counted.questions):
        if question.kind is not None:
            places.setdefault(question.kind, []).append(number)
    found = {}
    for kind in sorted(places):
        loss = None
        if counted.right is not None:
            mine, full = counted.right[way], counted.right[counted.unpruned]
            loss = _rounded(_mean([full[number] - mine[number] for number in places[kind]]))
        same = _mean([counted.same[way][number] for number in places[kind]])
        found[kind] = {"questions": len(places[kind]), "loss": loss, "agreement": _rounded(same)}
    return found


def _verdict(
    counted: Counted,
    name: str,
    ways: Sequence[Configuration],
    tests: Sequence[Step | None],
    differences: Mapping[Configuration, Paired],
    first_level: float,
) -> dict[str, Any]:
    passed = [way for way, step in zip(ways, tests, strict=True) if step is not None and step.passed]
    failed = next((way for way, step in zip(ways, tests, strict=True) if step is None or not step.passed), None)
    level = next((step.level for way, step in zip(ways, tests, strict=True) if way is failed and step), first_level)
    more, unsafe, wanted = None, False, counted.wish.max_loss
    if failed is not None:
        difference = differences[failed]
        unsafe = -difference.upper(1 - level) > wanted
        if not unsafe:
            pictures = difference.enough(wanted, level)
            if pictures is None and counted.wish.by == "accuracy":
                # Too much was lost, but that may be chance: as many as would do if nothing were lost.
                pictures = difference.mirrored().enough(wanted, level)
            elif pictures is None:
                pictures = difference.enough_to_refute(wanted, level)
            if pictures is not None:
                each = len(counted.questions) / difference.pictures
                more = max(1, _two_figures(pictures * each - len(counted.questions)))
    return {
        "method": name,
        "safe": str(passed[-1].budget) if passed else None,
        "safe_tokens": _rounded(counted.tokens(passed[-1])) if passed else None,
        "first_not_shown": None if failed is None else str(failed.budget),
        "shown_unsafe": unsafe,
        "more_questions": more,
    }


def _two_figures(number: float) -> int:
    """Rounded up to two figures: it is a rough number."""
    if number <= 10:
        return max(0, int(-(-number // 1)))
    unit = 10 ** (len(str(int(number))) - 2)
    return int(-(-number // unit)) * unit


def _cases(counted: Counted, ways: Sequence[Configuration]) -> list[dict[str, Any]]:
    """Some of the changed answers, each question once: by the first method that changed its answer, at the most tokens."""
    random = Random(f"cases {counted.wish.seed}")
    shown: dict[int, tuple[Configuration, str]] = {}
    found: dict[tuple[str, str], list[int]] = {}
    for way in ways:
        for kind, numbers in counted.changes(way).items():
            for number in numbers:
                if number not in shown:
                    shown[number] = way, kind
                    found.setdefault((kind, way.name), []).append(number)
    for numbers in found.values():
        random.shuffle(numbers)
    # The methods by turns.
    by_kind = {
        kind: [
            each
            for group in _by_turns(*(numbers for (own, _), numbers in found.items() if own == kind))
            for each in group
        ]
        for kind in ("lost", "gained", "other")
    }
    # Half of the room for what was lost, where there is so much of it; the rest by turns.
    lost, gained, other = by_kind["lost"], by_kind["gained"], by_kind["other"]
    chosen = lost[: CASES // 2]
    rest = [each for group in _by_turns(gained, other, lost[CASES // 2 :]) for each in group]
    chosen = [*chosen, *rest[: CASES - len(chosen)]]
    chosen.sort(key=lambda number: (("lost", "other", "gained").index(shown[number][1]), number))
    return [_case(counted, number, *shown[number], ways) for number in chosen]


def _by_turns(*lists: Sequence[int]) -> list[list[int]]:
    """The first of each, the second of each, and so on; of the shorter ones nothing once they end."""
    longest = max(map(len, lists), default=0)
    return [[each[place] for each in lists if place < len(each)] for place in range(longest)]


def _case(
    counted: Counted, number: int, way: Configuration, kind: str, ways: Sequence[Configuration]
) -> dict[str, Any]:
    question, full = counted.questions[number], counted.unpruned

    def said(which: Configuration) -> dict[str, Any]:
        right = None if counted.right is None else _rounded(counted.right[which][number])
        return {"answer": counted.given[which][number].answer, "right": right}

    return {
        "question": question.name,
        "picture": question.picture.name,
        "text": question.asked,
        "answers": None if question.answers is None else list(dict.fromkeys(question.answers)),
        "change": kind,
        "method": way.name,
        "keep": str(way.budget),
        "unpruned": said(full),
        "pruned": said(way),
        "all": [{"method": other.name, "keep": str(other.budget), **said(other)} for other in ways],
    }


def _estimate(values: Paired | None) -> dict[str, float] | None:
    if values is None:
        return None
    low, high = values.interval()
    return {"mean": _rounded(values.mean), "low": _rounded(low), "high": _rounded(high)}


def _rounded(value: float) -> float:
    """Without a minus in front of zero."""
    return round(float(value), _DIGITS) + 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
