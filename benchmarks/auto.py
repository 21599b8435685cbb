"""Does a budget of each question's own beat the same number for all? On drawn scenes, at an equal mean.

    python -m benchmarks.auto --store FILE [--questions 4000] [--first 0] [--keep 0.1 0.05] [--methods facet adafv]

A sign says for every K how much of something the K best tokens hold. A question gets the fewest tokens at which its sign
reaches a threshold, between a floor and a cap. The threshold is the one at which the scenes that choose get `keep` in the
mean; the others are asked at their own number, and at the same number for all. docs/evidence.md has what came of it.

Differences are paired, and their intervals count scenes. Where the means of the two differ, the number for all is paid what
the difference would be worth on a line from the smaller to the larger `keep`.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import adafv
from adafv import Pruner, compress
from adafv.core import ImageLayout, text_to_image_attention
from adafv.core.facets import worth
from adafv.core.greedy import coverage_search, max_min_search
from adafv.core.likeness import self_cosines, unit_vectors
from adafv.core.tokens import HIDDEN, SALIENCY, WORDS, Kept, Plan, VisualTokens
from adafv.methods import Method
from adafv.methods.options import method_from_text
from benchmarks.accuracy import first_answer_logits, interval
from benchmarks.methods import Batch, World, belongs

FLOOR, CAP = 1 / 36, 0.25
"""Shares of the tokens that no question goes below or above."""


def _held(scores: Tensor) -> Tensor:
    """[G, N]: share of the sum that the K largest hold."""
    return scores.sort(-1, descending=True).values.cumsum(-1) / scores.sum(-1, keepdim=True)


def _text(tokens: VisualTokens) -> Tensor:
    words = tokens.text
    return _held(text_to_image_attention(words.embeddings, tokens.features, words.mask, tokens.candidates))


def _worth(tokens: VisualTokens) -> Tensor:
    return worth(tokens, unit_vectors(tokens.features))


def _novelty(tokens: VisualTokens) -> Tensor:
    """Minus the gain of the next token in `facet`'s search, in units of the first."""
    gains = max_min_search(unit_vectors(tokens.features), tokens.source.shape[1], _worth(tokens), start="weight").gains
    return -gains / gains[:, :1]


def _coverage(tokens: VisualTokens) -> Tensor:
    """Share of what three quarters of the tokens gain in the search of `facet:cover=true`."""
    alike, shown = self_cosines(unit_vectors(tokens.signals[HIDDEN])), tokens.candidates
    most = tokens.source.shape[1]
    gains = coverage_search(alike, 3 * most // 4, _worth(tokens).square(), shown.float(), shown).gains
    return torch.nn.functional.pad(
        gains.cumsum(-1) / gains.sum(-1, keepdim=True), (0, most - gains.shape[1]), value=1.0
    )


SIGNS: dict[str, Callable[[VisualTokens], Tensor]] = {
    "text": _text,
    "saliency": lambda tokens: _held(tokens.saliency),
    "worth": lambda tokens: _held(_worth(tokens).square()),
    "novelty": _novelty,
    "coverage": _coverage,
}
"""[G, N] each, rising with K."""


@dataclass(frozen=True)
class Looking(Method):
    """Sees the tokens, and keeps the first."""

    name: ClassVar[str] = "looking"
    summary: ClassVar[str] = "none"
    needs = frozenset({WORDS, SALIENCY, HIDDEN})
    seen: Any = None

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        self.seen.append(tokens)
        return Kept(torch.arange(keep).expand(len(tokens.features), keep).contiguous())


@dataclass(frozen=True)
class Counted(Method):
    """Another method, with a number of tokens for each image of the batch."""

    of: Any = None
    counts: Any = None

    name: ClassVar[str] = "counted"
    summary: ClassVar[str] = "none"

    @property
    def needs(self) -> Any:  # type: ignore[override]
        return self.of.needs

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        return Plan(None)

    def count(self, tokens: VisualTokens, keep: int) -> Tensor:
        assert isinstance(self.counts, Tensor)
        return self.counts

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        kept = self.of.select(tokens, keep)
        assert isinstance(kept, Kept)
        return kept


def encoded(world: World, batch: Batch, methods: list[Method]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The batch with its images encoded once, and the signs of each question."""
    looking = Looking([])
    with torch.no_grad():
        images = adafv.encode(world.model, batch.inputs, method=[looking, *methods])
        given = {name: value for name, value in batch.inputs.items() if name != "pixel_values"} | {"images": images}
        compress(world.model, given, 1, method=looking, processor=world.processor)
        [tokens] = looking.seen
        return given, {name: sign(tokens) for name, sign in SIGNS.items()}


def numbers(sign: Tensor, threshold: float) -> Tensor:
    """[G] long: the fewest tokens at which the sign reaches the threshold, between floor and cap."""
    most = sign.shape[1]
    return ((sign < threshold).sum(-1) + 1).clamp(round(FLOOR * most), round(CAP * most))


def threshold(sign: Tensor, keep: float) -> float:
    """Where the mean number is the share `keep`; by bisection."""
    low, high = float(sign.min()), float(sign.max())
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if numbers(sign, middle).float().mean() > keep * sign.shape[1] else (middle, high)
    return low


def run(options: argparse.Namespace) -> None:
    methods = {word: method_from_text(word)[0] for word in options.methods}
    world, start = World(options.questions, "all", "llava", None, size=options.batch), time.monotonic()
    asked = world.asked
    # Answers are not needed for the thresholds.
    world.asked = [pair for pair in asked if belongs(str(pair[0].number), "choose")][: options.choose]
    chosen = defaultdict(list)
    for batch in world.batches(0, 1):
        for name, sign in encoded(world, batch, list(methods.values()))[1].items():
            chosen[name].append(sign)
    thresholds = {(name, keep): threshold(torch.cat(chosen[name]), keep) for name in SIGNS for keep in options.keep}
    print(f"{thresholds}, {time.monotonic() - start:.0f} s", flush=True)
    world.asked = [
        pair for pair in asked if pair[0].number >= options.first and belongs(str(pair[0].number), "confirm")
    ]
    with options.store.open("a") as file:
        for batch in world.batches(0, 1):
            given, signs = encoded(world, batch, list(methods.values()))

            def write(
                batch: Batch, given: Any, word: str, keep: float, name: str, method: Method, counts: Tensor
            ) -> None:
                pruner = Pruner(method, int(counts.max()), processor=world.processor)
                right, _ = world.right(first_answer_logits(world.model, given, pruner), batch)
                entry = {"method": word, "keep": keep, "sign": name, "images": batch.images, "kinds": batch.kinds}
                file.write(json.dumps(entry | {"right": list(map(int, right)), "counts": counts.tolist()}) + "\n")

            for word, method in methods.items():
                for keep in options.keep:
                    same = torch.full((len(batch.names),), round(keep * signs["text"].shape[1]))
                    write(batch, given, word, keep, "", method, same)
                    for name in options.signs:
                        counts = numbers(signs[name], thresholds[name, keep])
                        write(batch, given, word, keep, name, Counted(method, counts), counts)
            file.flush()
            print(f"{len(batch.names)} questions, {time.monotonic() - start:.0f} s", flush=True)
            if time.monotonic() - start > options.seconds:
                break


def report(options: argparse.Namespace) -> None:
    """The store as a table: own number minus the same for all."""
    found: dict[Any, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for line in options.store.read_text().splitlines():
        entry = json.loads(line)
        for what in ("images", "kinds", "right", "counts"):
            found[entry["method"], entry["keep"], entry["sign"]][what] += entry[what]
    keeps = sorted({keep for _, keep, _ in found})
    for (word, keep, name), own in found.items():
        if name:
            continue
        kinds = sorted(set(own["kinds"]))
        table = Table(
            title=f"{word}, {keep:.0%}: {100 * sum(own['right']) / len(own['right']):.1f}, same number for all"
        )
        for heading in ("sign", "mean K", "fewest to most", "all", *kinds):
            table.add_column(heading, justify="right")
        for other in sorted({sign for _, _, sign in found if sign}):
            mine = found[word, keep, other]
            counts = mine["counts"]
            # What the tokens above the mean that was wanted are worth, at the slope between two budgets for all.
            little, much = found[word, keeps[0], ""], found[word, keeps[-1], ""]
            step = max(1, much["counts"][0] - little["counts"][0])
            slope = (sum(much["right"]) - sum(little["right"])) / len(own["right"]) / step
            excess = (sum(counts) / len(counts) - own["counts"][0]) * max(0.0, slope)
            cells = []
            for kind in (None, *kinds):
                places = [i for i, each in enumerate(own["kinds"]) if kind in (None, each)]
                values = [mine["right"][i] - own["right"][i] - excess for i in places]
                mean, half = interval(values, [own["images"][i] for i in places])
                cells.append(f"{100 * mean:+.1f} ± {100 * half:.1f}{'*' if abs(mean) > half else ''}")
            ordered = sorted(counts)
            span = f"{ordered[len(counts) // 20]} to {ordered[-len(counts) // 20]}"
            table.add_row(other, f"{sum(counts) / len(counts):.1f}", span, *cells)
        Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="A number of tokens for each question.")
    parser.add_argument("--store", required=True, type=Path, help="answers are added here")
    parser.add_argument("--questions", type=int, default=4000, help="about, of both halves")
    parser.add_argument("--first", type=int, default=0, help="scenes before this one are not asked about")
    parser.add_argument("--choose", type=int, default=750, help="questions that thresholds are set on")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.1, 0.05])
    parser.add_argument("--methods", nargs="+", default=["facet", "adafv"])
    parser.add_argument("--signs", nargs="+", choices=SIGNS, default=list(SIGNS))
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no batch is begun after so many")
    parser.add_argument("--report", action="store_true", help="of what is in the store, and ask nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        run(options)
    report(options)


if __name__ == "__main__":
    main()
