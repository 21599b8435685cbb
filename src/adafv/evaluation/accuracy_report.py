"""What `adafv bench accuracy` says of the answers: tables, figure 1 of the paper, Markdown, CSV and JSON.

A row is a method at a budget: percent right, and that minus other rows, paired question by question. All intervals are of
95 % and count pictures, as questions on one picture share its luck. A star marks differences whose interval does not hold 0:
of dozens of rows, one in twenty gets one by luck. Two stars hold for all rows together: of all differences to one method, at
all budgets of a data set, the chance that one has them wrongly is at most 5 % (Holm 1979).
"""

import csv
import io
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adafv.evaluation.accuracy import RANDOM, Data
from adafv.evaluation.answers import BLANK, UNPRUNED, Configuration
from adafv.evaluation.chart import Level, Line, Point, line_chart
from adafv.evaluation.first_token import chance_of_right
from adafv.evaluation.matching import score
from adafv.evaluation.statistics import share_interval
from adafv.evaluation.store import Given, Store
from adafv.printable import printable

VERSION = 1
"""Of the JSON; see docs/accuracy.md."""
GUESS = "most frequent answer"
"""Of its kind, counted on these very questions: what knowing nothing but the answers is worth."""
RIGHT, SURE = "right", "sure"
SHORT = {UNPRUNED: "unpruned", BLANK: "picture blanked", GUESS: GUESS}
LEVEL = 0.05
_LINES_WITH_INTERVALS = 4
"""In a figure; with more lines, those of the methods that are compared with alone."""


@dataclass(frozen=True)
class Mean:
    """A mean over questions and half of its 95 % interval, which counts pictures."""

    mean: float
    half: float
    count: int

    @property
    def stands_out(self) -> bool:
        """Whether the interval does not hold 0."""
        return abs(self.mean) > self.half

    @property
    def p_value(self) -> float:
        """Of the two-sided test that the mean is 0, from the same normal approximation as the interval."""
        if self.half == 0 or self.mean == 0:
            return float(self.mean == 0)
        return math.erfc(1.96 * abs(self.mean) / self.half / math.sqrt(2))

    def text(self, *, signed: bool = False, among_all: bool = False) -> str:
        star = ("**" if among_all else "*") if signed and self.stands_out else ""
        return f"{100 * self.mean:{'+' if signed else ''}.1f} ± {100 * self.half:.1f}{star}"

    def as_dict(self) -> dict[str, Any]:
        return {"mean": round(self.mean, 6), "half_of_95": round(self.half, 6), "questions": self.count}


Key = tuple[str, str]
"""(method in one word, or `UNPRUNED`, `BLANK`, `GUESS`; key of its budget)."""


class Scores:
    """How right each way was, question by question, on one data set.

    Args:
        keys: of the questions in the store, by name.
        what: `RIGHT`: right or wrong by `rule`; `SURE`: how likely the model found what is right.
    """

    def __init__(
        self,
        data: Data,
        ways: Sequence[Configuration],
        store: Store,
        keys: Mapping[str, str],
        *,
        what: str = RIGHT,
        rule: str = "auto",
    ) -> None:
        self.data, self.what, self.rule = data, what, rule
        self.questions = {each.name: each for each in data.questions if each.name in keys}
        self.values: dict[Key, dict[str, float]] = {}
        self.kept: dict[Key, tuple[float, float]] = {}
        """(mean tokens read, mean share of the picture's)."""
        self.replaced: Counter[Key] = Counter()
        """Questions for which another method chose, as no word counts."""
        self.ways = {way.way: way for way in ways}
        for way in ways:
            own: dict[str, float] = {}
            given: list[Given] = []
            for name, question in self.questions.items():
                answer = store.get(keys[name], way.stored)
                if answer is not None:
                    value = self._value(answer, question)
                    if value is not None:
                        own[name] = value
                        given.append(answer)
            if own:
                self.values[way.way] = own
                tokens = statistics.fmean(each.kept for each in given)
                self.kept[way.way] = (tokens, statistics.fmean(each.kept / each.tokens for each in given))
                self.replaced[way.way] = sum(bool(each.chosen_by) for each in given)
        if what == RIGHT:
            self.values[GUESS, "1.0"] = self._guesses()

    def _value(self, given: Given, question: Any) -> float | None:
        if self.what == RIGHT:
            return score(given.answer, question, self.rule)
        return chance_of_right(given.chances, question, self.rule)

    def _guesses(self) -> dict[str, float]:
        by_kind: dict[Any, list[Any]] = defaultdict(list)
        for question in self.questions.values():
            by_kind[question.kind].append(question)
        found: dict[str, float] = {}
        for own in by_kind.values():
            answers = Counter(answer for question in own for answer in question.answers or ())
            best = max(answers, key=lambda answer: answers[answer])
            found |= {question.name: score(best, question, self.rule) or 0.0 for question in own}
        return found

    def mean(self, key: Key, minus: Key | None = None, column: str | None = None) -> Mean | None:
        """Mean of a way, or that minus another's on the same questions; in one of `columns`. None: nothing is there."""
        mine, other = self.values.get(key, {}), self.values.get(minus, {}) if minus else {}
        names = [
            name
            for name in mine
            if (minus is None or name in other) and (column is None or name in self.columns()[column])
        ]
        if not names:
            return None
        values = [mine[name] - (other[name] if minus else 0.0) for name in names]
        clusters = [self.questions[name].cluster for name in names]
        return Mean(*share_interval(values, clusters), len(names))

    def columns(self) -> dict[str, frozenset[str]]:
        """Kinds of questions and the marks of the data set, with the names of their questions."""
        if not hasattr(self, "_columns"):
            kinds: dict[str, set[str]] = defaultdict(set)
            for name, question in self.questions.items():
                kinds[question.kind or (question.answers or ("",))[0]].add(name)
            found: dict[str, frozenset[str]] = {}
            found |= {kind: frozenset(names) for kind, names in sorted(kinds.items())} if 1 < len(kinds) <= 20 else {}
            found |= {mark: frozenset(names & self.questions.keys()) for mark, names in self.data.marks.items()}
            self._columns = {name: names for name, names in found.items() if names}
        return self._columns

    @property
    def pictures(self) -> int:
        return len({question.cluster for question in self.questions.values()})

    def references(self) -> list[Key]:
        """The rows that are no methods."""
        return [key for key in ((UNPRUNED, "1.0"), (BLANK, "1.0"), (GUESS, "1.0")) if key in self.values]

    def budgets(self) -> list[str]:
        """Keys of the budgets, the most tokens first."""
        own = {key: [share for (_, other), (_, share) in self.kept.items() if other == key] for _, key in self.pruned()}
        return sorted(own, key=lambda key: -max(own[key]))

    def pruned(self) -> list[Key]:
        return [key for key in self.values if key[0] not in SHORT]

    def ranked(self, budget: str) -> list[Key]:
        """Methods at a budget, the best first."""
        own = [key for key in self.pruned() if key[1] == budget]
        return sorted(own, key=lambda key: -statistics.fmean(self.values[key].values()))


@dataclass(frozen=True)
class AccuracyReport:
    """Answers on one or several data sets, counted."""

    model: str
    scores: list[Scores]
    against: Sequence[str]
    """Methods that every other one is compared with."""
    part: str
    kinds: bool
    """Whether there are columns by kind of question."""
    refused: Mapping[str, str]
    """Ways that the model does not take, and why."""
    settings: Mapping[str, Any]

    def columns(self, scores: Scores) -> list[str]:
        return list(scores.columns()) if self.kinds else []

    def among_all(self, scores: Scores) -> dict[str, frozenset[Key]]:
        """The rows whose difference is not 0, the number of rows considered; by what it is to, `UNPRUNED` or a method."""
        return {name: self._apart_from(scores, name) for name in (UNPRUNED, *self.against)}

    @staticmethod
    def _apart_from(scores: Scores, name: str) -> frozenset[Key]:
        differences: dict[Key, Mean] = {}
        for key in scores.pruned():
            other = (name, "1.0" if name == UNPRUNED else key[1])
            mean = scores.mean(key, other) if other != key else None
            if mean is not None:
                differences[key] = mean
        keys = sorted(differences, key=lambda key: differences[key].p_value)
        passed = [differences[key].p_value <= LEVEL / (len(keys) - place) for place, key in enumerate(keys)]
        return frozenset(keys[: passed.index(False) if False in passed else len(keys)])

    def tables(self, scores: Scores) -> list[tuple[str, list[list[str]]]]:
        """(title, rows with their heading): the references, then one table a budget."""
        what = "percent right" if scores.what == RIGHT else "probability of what is right, in percent"
        columns = self.columns(scores)
        rows = [["", what, *columns]]
        for key in scores.references():
            cells = [_said(scores.mean(key)), *(_said(scores.mean(key, column=column)) for column in columns)]
            rows.append([SHORT[key[0]], *cells])
        title = f"{scores.data.name}: {len(scores.questions):,} questions on {scores.pictures:,} pictures"
        tables = [(title + ("" if self.part == "all" else f", the half that {self.part}s"), rows)]
        stars = self.among_all(scores)

        def difference(key: Key, name: str, other: Key) -> str:
            mean = scores.mean(key, other)
            return "" if mean is None else mean.text(signed=True, among_all=key in stars[name])

        for budget in scores.budgets():
            rows = [["method", what, "- unpruned", *(f"- {name}" for name in self.against), "tokens", *columns]]
            for key in scores.ranked(budget):
                cells = [_said(scores.mean(key)), difference(key, UNPRUNED, (UNPRUNED, "1.0"))]
                for name in self.against:
                    other = (name, budget)
                    cells.append("" if other == key else difference(key, name, other))
                cells.append(f"{scores.kept[key][0]:.4g}")
                rows.append([key[0], *cells, *(_said(scores.mean(key, column=column)) for column in columns)])
            tables.append((f"{scores.data.name}, keep {scores.ways[scores.ranked(budget)[0]].budget}", rows))
        return tables

    def figure(self, scores: Scores) -> str:
        """Accuracy against budget, one line a method; empty where nothing was pruned."""
        methods = list(dict.fromkeys(name for name, _ in scores.pruned()))
        methods.sort(key=lambda name: (name == RANDOM, name not in self.against))  # colours by the order
        if not methods:
            return ""
        lines = []
        for name in methods:
            strong = name in self.against
            shown = len(methods) <= _LINES_WITH_INTERVALS or strong
            points = []
            for budget in reversed(scores.budgets()):
                mean = scores.mean((name, budget))
                if mean is not None:
                    share = scores.kept[name, budget][1]
                    points.append(Point(share, 100 * mean.mean, 100 * mean.half if shown else None))
            points.sort(key=lambda point: point.x)
            lines.append(Line(name, points, strong=name == self.against[0], band=strong, grey=name == RANDOM))
        values = [point.y for line in lines for point in line.points]
        levels, below = [], []
        for key in scores.references():
            mean = scores.mean(key)
            assert mean is not None
            # What lies far below the lines would press them together; then it is said in words.
            far = 100 * mean.mean < min(values) - (max(values) - min(values) or 10.0)
            if far:
                below.append(f"{SHORT[key[0]]} {100 * mean.mean:.1f}")
            else:
                levels.append(Level(SHORT[key[0]], 100 * mean.mean))
        ticks = []
        for budget in scores.budgets():
            exact = [scores.kept[key][1] for key in scores.ranked(budget) if key[0] == RANDOM]
            if exact:
                ticks.append((exact[0], str(scores.ways[RANDOM, budget].budget)))
        what = "percent right" if scores.what == RIGHT else "probability of what is right, %"
        bands = " and ".join(name for name in self.against if name in methods)
        return line_chart(
            f"Accuracy against budget: {scores.data.name}",
            f"{len(scores.questions):,} questions; {self.model}" + (f"; bands: 95 % of {bands}" if bands else ""),
            lines,
            x_label="visual tokens kept" + (f" (below: {', '.join(below)})" if below else ""),
            y_label=what,
            x_ticks=ticks,
            levels=levels,
            falling=True,
        )

    def markdown(self, figures: Mapping[str, str] = {}) -> str:
        """The report.

        Args:
            figures: files, by name of the data set.
        """
        parts = [f"# Accuracy of pruning: {_cell(self.model)}"]
        for scores in self.scores:
            parts.append(f"## {_cell(scores.data.name)}")
            if scores.data.name in figures:
                parts.append(f"![Accuracy against budget]({figures[scores.data.name]})")
            for title, rows in self.tables(scores):
                lines = [[_cell(cell) for cell in row] for row in rows]
                lines.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
                parts += [f"**{_cell(title)}**", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
            parts += [_cell(note) for note in self.notes(scores)]
        parts.append(
            "95 % intervals count pictures. Differences are paired, question by question; \\*: the interval does not hold 0, "
            "as one in twenty would by luck; \\*\\*: also with all rows and budgets counted (Holm)."
        )
        parts += [f"Not run: {_cell(name)}: {_cell(why)}" for name, why in self.refused.items()]
        return "\n\n".join(parts) + "\n"

    def notes(self, scores: Scores) -> list[str]:
        """What is to be said beside the tables."""
        notes = []
        for key, count in scores.replaced.items():
            if count:
                of = len(scores.values[key])
                notes.append(
                    f"{scores.ways[key]}: no word counted for {count} of {of} questions, so another method chose."
                )
        if scores.data.bad:
            notes.append(f"{scores.data.bad} records of {scores.data.name} could not be used and were left out.")
        return notes

    def rows(self) -> list[dict[str, Any]]:
        """One a data set and way, for JSON."""
        found = []
        for scores in self.scores:
            stars = self.among_all(scores)
            for key in [*scores.references(), *(key for budget in scores.budgets() for key in scores.ranked(budget))]:
                pruned = key[0] not in SHORT
                row: dict[str, Any] = {"data": scores.data.name, "method": key[0]}
                row["keep"] = key[1] if pruned else None
                row[scores.what] = _dict(scores.mean(key))
                if pruned:
                    row["tokens"], row["share"] = (round(value, 6) for value in scores.kept[key])
                    others = {UNPRUNED: (UNPRUNED, "1.0"), **{name: (name, key[1]) for name in self.against}}
                    row["minus"] = {
                        name: {**(_dict(scores.mean(key, other)) or {}), "among_all": key in stars[name]}
                        for name, other in others.items()
                        if other != key and other in scores.values
                    }
                    row["chosen_by_another"] = scores.replaced[key]
                row["kinds"] = {column: _dict(scores.mean(key, column=column)) for column in scores.columns()}
                found.append(row)
        return found

    def as_dict(self) -> dict[str, Any]:
        """JSON; its form is described in docs/accuracy.md."""
        return {
            "bench": VERSION,
            "what": "accuracy",
            "model": self.model,
            "part": self.part,
            "settings": dict(self.settings),
            "data": [
                {
                    "name": each.data.name,
                    "questions": len(each.questions),
                    "pictures": each.pictures,
                    "bad": each.data.bad,
                }
                for each in self.scores
            ],
            "not_run": dict(self.refused),
            "rows": self.rows(),
        }

    def csv(self) -> str:
        """One line a data set, way and column ("all", or a kind of question)."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        others = [UNPRUNED, *self.against]
        head = ["data", "method", "keep", "tokens", "kind", "questions", "mean", "half_of_95"]
        writer.writerow([*head, *(f"minus {name}{suffix}" for name in others for suffix in ("", ", half_of_95"))])
        for row in self.rows():
            what = RIGHT if RIGHT in row else SURE
            for kind, mean in {"all": row[what], **row["kinds"]}.items():
                if mean is None:
                    continue
                cells = [row["data"], row["method"], row["keep"] or "", row.get("tokens", ""), kind]
                cells += [mean["questions"], mean["mean"], mean["half_of_95"]]
                for name in others:
                    paired = row.get("minus", {}).get(name) if kind == "all" else None
                    cells += ["", ""] if paired is None else [paired["mean"], paired["half_of_95"]]
                writer.writerow(cells)
        return file.getvalue()


def _said(mean: Mean | None) -> str:
    return "" if mean is None else mean.text()


def _dict(mean: Mean | None) -> dict[str, Any] | None:
    return None if mean is None else mean.as_dict()


def _cell(text: str) -> str:
    """Text of others, in a table or a line of Markdown; stars of our own stay."""
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
