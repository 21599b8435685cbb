"""What `adafv analyze` says of what was measured: three figures, each with a table and a paragraph, and all of it as JSON.

All means are over objects (a class in a picture); all intervals count pictures, as objects in one picture share its luck.
The paper's numbers: figure 2 is the areas, figure 3 the similarities, figure 4 the fewest tokens (arXiv 2501.09532).
"""

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adafv.evaluation.alignment import (
    ADAFV,
    BINS,
    MIDDLE,
    QUESTION,
    RANDOM,
    SALIENCY,
    SCORES,
    WAYS,
    WORD,
    Left,
    Measured,
    reached_by_chance,
)
from adafv.evaluation.chart import Line, Point, Value, line_chart, value_chart
from adafv.evaluation.statistics import interval, share_interval
from adafv.printable import printable

VERSION = 1
"""Of the JSON; see docs/analyze.md."""
SIZES = (("small, below 1 %", 0.0, 0.01), ("medium, 1 to 10 %", 0.01, 0.1), ("large, from 10 %", 0.1, math.inf))
"""Of objects, as shares of the picture."""
BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of the tokens in the table of reached objects."""
FEWEST = 10
"""Pictures below which no row is made: their interval would say nothing."""
NAMES = {
    WORD: "the object's word",
    QUESTION: "the whole question",
    SALIENCY: "saliency",
    MIDDLE: "distance to the border",
    ADAFV: "adafv",
    RANDOM: "random",
}
_DRAWS = 1000
"""Of pictures, for the interval of a median."""


@dataclass(frozen=True)
class Mean:
    """A mean over objects and half of its 95 % interval, which counts pictures."""

    mean: float
    half: float

    @classmethod
    def of(
        cls,
        found: Sequence[Measured],
        value: Callable[[Measured], float],
        estimate: Callable[[Sequence[float], Sequence[tuple[str, str]]], tuple[float, float]] = interval,
    ) -> "Mean":
        """`estimate`: `interval`, or `share_interval` where values are shares."""
        return cls(*estimate([float(value(each)) for each in found], [(each.data, each.picture) for each in found]))

    def text(self, digits: int = 1, times: float = 100.0, sign: str = "") -> str:
        return f"{times * self.mean:{sign}.{digits}f} ± {times * self.half:.{digits}f}"

    def as_dict(self) -> dict[str, float | None]:
        return {"mean": _rounded(self.mean), "half_of_95": _rounded(self.half)}


@dataclass(frozen=True)
class Analysis:
    """What was measured, and how."""

    model: str
    template: str
    """Of the questions."""
    found: list[Measured]
    left: dict[str, Left]
    """Per data set."""

    @property
    def data(self) -> list[str]:
        """Names of the data sets."""
        return list(self.left)

    def of(self, data: str) -> list[Measured]:
        return [each for each in self.found if each.data == data]

    def groups(self) -> list[tuple[str, list[Measured]]]:
        """All objects of a data set, then those of each size; groups of few pictures are left out."""
        made = []
        for data in self.data:
            own = self.of(data)
            made.append((data, own))
            for name, low, high in SIZES:
                some = [each for each in own if low <= each.size < high]
                if len({each.picture for each in some}) >= FEWEST and len(some) < len(own):
                    made.append((f"{data}: {name}", some))
        return [(name, some) for name, some in made if some]

    def asked(self) -> list[tuple[str, list[Measured]]]:
        """`groups` without objects that are on every token; those have no area, and nothing elsewhere."""
        made = [(name, [each for each in own if each.areas]) for name, own in self.groups()]
        return [(name, own) for name, own in made if own]

    # Figure 2

    def areas(self) -> list[tuple[str, int, dict[str, Mean]]]:
        """Of every group: name, objects, and the mean area of every score."""
        return [(name, len(own), {score: _area(own, score) for score in SCORES}) for name, own in self.asked()]

    def areas_figure(self) -> str:
        groups = [
            (f"{name} ({count} objects)", [Value(NAMES[score], mean.mean, mean.half) for score, mean in means.items()])
            for name, count, means in self.areas()
        ]
        return value_chart(
            "Does a score know where the object is?",
            f"area under the ROC curve of tokens on the object, 95 % intervals; {self.model}",
            groups,
            x_label="area under the curve; 0.5: as a coin",
            reference=0.5,
        )

    def areas_table(self) -> list[list[str]]:
        head = ["objects", "number", *(NAMES[score] for score in SCORES), "word - saliency"]
        rows = [head]
        for name, own in self.asked():
            paired = _area(own, WORD, SALIENCY)
            rows.append([name, f"{len(own):,}", *(_area(own, score).text() for score in SCORES), paired.text(sign="+")])
        return rows

    def areas_text(self) -> str:
        said = []
        for data, own in self.asked():
            if data not in self.data:
                continue
            word = _area(own, WORD)
            words = f"{printable(data)}: {_knows(word, 'the word')} ({word.text()}); "
            words += f"{_against(_area(own, WORD, SALIENCY), 'the word', 'saliency')}."
            best = max((QUESTION, SALIENCY), key=lambda score: _area(own, score).mean)
            ahead = _area(own, best, MIDDLE)
            if ahead.mean - ahead.half <= 0:
                words += f" {NAMES[best].capitalize()}, the better of the method's two scores, is not surely better than the "
                words += f"distance to the border ({ahead.text(sign='+')}), which looks at nothing."
            diluted = _area(own, WORD, QUESTION)
            if diluted.mean - diluted.half > 0:
                words += f" The question's other words cost {diluted.text()}: they draw attention elsewhere."
            said.append(words)
        return " ".join(said)

    # Figure 3

    def similarities_figure(self) -> str:
        lines, edges = [], []
        middles = (BINS[:-1] + BINS[1:]) / 2
        width = float(BINS[1] - BINS[0])
        for data, own in self.asked():
            if data not in self.data:
                continue
            for place, where in enumerate(("on the object", "elsewhere")):
                shares = torch.stack([each.histograms[place] for each in own])
                filled = shares.mean(0).nonzero().flatten()
                low, high = max(0, int(filled[0]) - 1), min(len(middles) - 1, int(filled[-1]) + 1)
                points = []
                for number in range(low, high + 1):
                    mean, half = interval(shares[:, number].tolist(), [each.picture for each in own])
                    points.append(Point(float(middles[number]), mean / width, half / width))
                lines.append(Line(f"{data}: {where}" if len(self.data) > 1 else where, points, band=True))
                edges += [float(BINS[low]), float(BINS[high + 1])]
        if not lines:
            return ""
        step = next(step for step in (0.05, 0.1, 0.2, 0.25, 0.5) if (max(edges) - min(edges)) / step <= 8)
        first = math.floor(min(edges) / step)
        ticks = [(n * step, f"{n * step:g}") for n in range(first, math.ceil(max(edges) / step) + 1)]
        return line_chart(
            "How similar are an object's word and the tokens?",
            f"distribution of cosines, mean over objects, bands: 95 % intervals; {self.model}",
            lines,
            x_label="cosine of the object's word with a visual token",
            y_label="density",
            x_ticks=ticks,
            y_range=(0.0, 1.08 * max(point.y + (point.half or 0) for line in lines for point in line.points)),
            log=False,
        )

    def similarities(self) -> list[tuple[str, int, dict[str, Mean]]]:
        """Of every group: name, objects; the mean cosines, their difference, and how peaked the scores are."""
        rows = []
        for name, own in self.asked():
            means = {
                "on": Mean.of(own, lambda each: each.similarity[0]),
                "elsewhere": Mean.of(own, lambda each: each.similarity[1]),
                "difference": Mean.of(own, lambda each: each.similarity[0] - each.similarity[1]),
                "text peak": Mean.of(own, lambda each: each.peaks[QUESTION]),
                "saliency peak": Mean.of(own, lambda each: each.peaks[SALIENCY]),
            }
            rows.append((name, len(own), means))
        return rows

    def similarities_table(self) -> list[list[str]]:
        head = ["objects", "number", "cosine on the object", "elsewhere", "difference"]
        rows = [[*head, "t: % in the highest tenth", "s: % in the highest tenth"]]
        for name, count, means in self.similarities():
            cosines = [means["on"].text(3, 1), means["elsewhere"].text(3, 1), means["difference"].text(3, 1, "+")]
            rows.append([name, f"{count:,}", *cosines, means["text peak"].text(), means["saliency peak"].text()])
        return rows

    def similarities_text(self) -> str:
        said = []
        for name, _, means in self.similarities():
            if name not in self.data:
                continue
            gap, text, saliency = means["difference"], means["text peak"], means["saliency peak"]
            words = f"{printable(name)}: an object's word is "
            if gap.mean - gap.half > 0:
                words += f"more similar to the tokens on the object than to the others (by {gap.text(3, 1)})."
            elif gap.mean + gap.half < 0:
                words += f"less similar to the tokens on the object than to the others ({gap.text(3, 1)}), the sign reversed."
            else:
                words += (
                    f"as similar to other tokens as to those on the object ({gap.text(3, 1, '+')}): it points nowhere."
                )
            words += (
                f" The highest tenth of the tokens has {text.text(0)} % of the text attention t, and {saliency.text(0)} % of "
                "the saliency s; where one is much more peaked than the other, it decides what is kept."
            )
            said.append(words)
        return " ".join(said)

    # Figure 4

    def reached(self, found: Sequence[Measured], way: str, share: float) -> Mean:
        """How many of the objects have a token on them when this share of the tokens is kept (one at least)."""
        known = share == 1  # then each has one
        return Mean.of(found, lambda each: _reached(each, way, share), interval if known else share_interval)

    def fewest_figures(self) -> list[tuple[str, str]]:
        """(data set, figure) of each."""
        return [(data, self._fewest_figure(data)) for data in self.data if self.of(data)]

    def _fewest_figure(self, data: str) -> str:
        own = self.of(data)
        low = max(1 / statistics.median(each.tokens for each in own), 0.001)
        shares = [low * (1 / low) ** (step / 24) for step in range(25)]
        lines = []
        for way in (*WAYS, RANDOM):
            means = [self.reached(own, way, share) for share in shares]
            points = [
                Point(share, 100 * mean.mean, None if way == RANDOM else 100 * mean.half)
                for share, mean in zip(shares, means, strict=True)
            ]
            lines.append(Line(NAMES[way], points, strong=way == ADAFV, band=True, grey=way == RANDOM))
        ticks = [(tick, f"{100 * tick:g} %") for tick in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if tick >= low]
        return line_chart(
            f"How many tokens until one is on the object? {data}",
            f"objects with a kept token on them, bands: 95 % intervals; {self.model}",
            lines,
            x_label="visual tokens kept",
            y_label="percent of objects",
            x_ticks=ticks,
            y_range=(0.0, 101.0),
        )

    def fewest_table(self) -> list[list[str]]:
        head = ["objects", "chosen by", "median of the fewest tokens"]
        rows = [[*head, *(f"% reached with {100 * share:g} %" for share in BUDGETS)]]
        for name, own in self.groups():
            for way in (*WAYS, RANDOM):
                middle, low, high = self.median(own, way)
                cells = [self.reached(own, way, share).text() for share in BUDGETS]
                rows.append([name, NAMES[way], f"{middle:.3g} ({low:.3g} to {high:.3g})", *cells])
        return rows

    def median(self, found: Sequence[Measured], way: str) -> tuple[float, float, float]:
        """The median over objects of the fewest tokens, and its 95 % interval by drawing pictures anew.

        Of random tokens it is the expected number, (N + 1) / (M + 1).
        """
        by_picture: dict[str, list[float]] = defaultdict(list)
        for each in found:
            fewest = (each.tokens + 1) / (each.on + 1) if way == RANDOM else float(each.fewest[way])
            by_picture[each.picture].append(fewest)
        pictures, draw = list(by_picture.values()), random.Random(0)
        medians = sorted(
            statistics.median([value for own in draw.choices(pictures, k=len(pictures)) for value in own])
            for _ in range(_DRAWS)
        )
        whole = statistics.median([value for own in pictures for value in own])
        return whole, medians[int(0.025 * _DRAWS)], medians[int(0.975 * _DRAWS) - 1]

    def fewest_text(self) -> str:
        said = []
        for data in self.data:
            own = self.of(data)
            if not own:
                continue
            parts = []
            for way in (QUESTION, SALIENCY, ADAFV, RANDOM):
                parts.append(f"{self.median(own, way)[0]:.3g} by {NAMES[way]}")
            tokens = statistics.median(each.tokens for each in own)
            words = f"{printable(data)}: of {tokens:g} tokens, half of the objects have one on them after {', '.join(parts)}."
            gap = Mean.of(own, lambda each: _reached(each, ADAFV, 0.05) - _reached(each, RANDOM, 0.05))
            words += f" With 5 % kept, {_against(gap, 'adafv', 'random', ' % of the objects reached')}."
            said.append(words)
        return " ".join(said)

    # All of it

    def markdown(self, files: dict[str, str]) -> str:
        """The report.

        Args:
            files: of the figures, by "areas", "similarities" and "fewest: <data set>".
        """
        parts = [
            f"# Do the scores know where things are? {_escaped(self.model)}",
            f"Asked: {_escaped(self.template)} for every class of object in every picture; "
            f"{len(self.found):,} objects. Means over objects; 95 % intervals count pictures. "
            f"{self._left_out()}".strip(),
            "## Areas under the ROC curve (figure 2 of the paper)",
            _pictured(files.get("areas")),
            self.areas_text(),
            _as_markdown(self.areas_table(), "Times 100."),
            "## Distribution of similarities (figure 3)",
            _pictured(files.get("similarities")),
            self.similarities_text(),
            _as_markdown(self.similarities_table()),
            "## Fewest tokens until one is on the object (figure 4)",
            *(_pictured(file) for name, file in files.items() if name.startswith("fewest")),
            self.fewest_text(),
            _as_markdown(self.fewest_table(), "Of random tokens the expected number."),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _left_out(self) -> str:
        total = sum(self.left.values(), Left())
        said = []
        if total.cropped:
            said.append(f"{total.cropped} are not in what the tower sees")
        if total.wordless:
            said.append(f"of {total.wordless} no word counts")
        return f"Left out: {' and '.join(said)}." if said else ""

    def as_dict(self) -> dict[str, Any]:
        """JSON; its form is described in docs/analyze.md."""
        return {
            "analysis": VERSION,
            "model": self.model,
            "question": self.template,
            "left_out": {
                name: {"cropped": left.cropped, "wordless": left.wordless} for name, left in self.left.items()
            },
            "areas": [
                {"objects": name, "number": count, "scores": {key: mean.as_dict() for key, mean in means.items()}}
                for name, count, means in self.areas()
            ],
            "similarities": [
                {"objects": name, "number": count, **{key.replace(" ", "_"): m.as_dict() for key, m in means.items()}}
                for name, count, means in self.similarities()
            ],
            "fewest": [
                {
                    "objects": name,
                    "by": way,
                    "median": dict(zip(("median", "low", "high"), self.median(own, way), strict=True)),
                    "reached": {f"{share:g}": self.reached(own, way, share).as_dict() for share in BUDGETS},
                }
                for name, own in self.groups()
                for way in (*WAYS, RANDOM)
            ],
            "measured": [
                {
                    "data": each.data,
                    "picture": each.picture,
                    "object": each.object,
                    "size": _rounded(each.size),
                    "tokens": each.tokens,
                    "on": each.on,
                    "areas": {key: _rounded(value) for key, value in each.areas.items()},
                    "fewest": each.fewest,
                    "similarity": [_rounded(value) for value in each.similarity],
                }
                for each in self.found
            ],
        }


def _area(found: Sequence[Measured], score: str, minus: str | None = None) -> Mean:
    """Mean area of a score; or by how much it is above another's, paired."""
    return Mean.of(found, lambda each: each.areas[score] - (each.areas[minus] if minus else 0.0))


def _reached(measured: Measured, way: str, share: float) -> float:
    """Whether, or how likely, one of this share of the tokens (one at least) is on the object."""
    keep = max(1, math.floor(share * measured.tokens + 1e-9))
    return (
        reached_by_chance(measured.tokens, measured.on, keep) if way == RANDOM else float(measured.fewest[way] <= keep)
    )


def _knows(mean: Mean, what: str) -> str:
    if mean.mean - mean.half > 0.5:
        return f"{what} finds the object better than chance"
    if mean.mean + mean.half < 0.5:
        return f"{what} finds the object worse than chance: the sign is reversed"
    return f"{what} finds the object no better than chance, as far as these pictures tell"


def _against(paired: Mean, one: str, other: str, what: str = "") -> str:
    if abs(paired.mean) <= paired.half:
        return f"{one} and {other} cannot be told apart ({paired.text(sign='+')}{what})"
    better = "better" if paired.mean > 0 else "worse"
    return f"{one} is {better} than {other} by {Mean(abs(paired.mean), paired.half).text()}{what}"


def _pictured(file: str | None) -> str:
    return f"![{file}]({file})" if file else ""


def _escaped(text: str) -> str:
    """Text of others, in a table or a line of Markdown."""
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _as_markdown(rows: list[list[str]], note: str = "") -> str:
    if len(rows) < 2:
        return ""
    lines = [[_escaped(cell) for cell in row] for row in rows]
    lines.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{note}" if note else table


def _rounded(value: float) -> float | None:
    """Six digits; None for what JSON has no number for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
