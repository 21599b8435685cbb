"""Accuracy against budget, with ground truth: 2,000 questions about generated scenes, each method at each budget.

    python -m benchmarks.budgets [--questions 2000] [--keep 0.5 0.25 0.1 0.05] [--family llava] [--json FILE]

The scenes are those of the test split, which training never drew, and every one holds two kinds of objects that never
met in training (`adafv.evaluation.world`). Two questions a scene. An answer is right when the first word that the model says,
out of its whole vocabulary, is the right one; all answers are one word. Intervals count scenes, not questions.

Two baselines stand beside: the most frequent answer to each kind of question, and the model with its picture blanked.
"""

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adafv import Pruner
from adafv.bundled import bundled_model
from adafv.evaluation.world.details import render
from adafv.evaluation.world.questions import QUESTION_KINDS, Question, ask
from adafv.evaluation.world.scenes import Scene, sample_scene
from benchmarks import accuracy
from benchmarks.accuracy import batch_of, first_answer_logits, interval

QUESTIONS_PER_SCENE = 2
BATCH = 20

CONFIGURATIONS = {
    "adafv (joint)": accuracy.CONFIGURATIONS["adafv"],
    **{
        name: accuracy.CONFIGURATIONS[name]
        for name in (
            "adafv, split",
            "adafv, published",
            "saliency",
            "text",
            "random",
            "uniform",
            "downsample",
        )
    },
}


@dataclass(frozen=True)
class Asked:
    """A question about a test scene, as it was counted."""

    scene: int
    kind: str
    text: str
    answer: str
    faint: bool


def held_out_questions(count: int, *, photos: bool = True) -> list[tuple[Scene, Question]]:
    """The first `count` questions of the test set: all kinds alike, two a scene."""
    made: list[tuple[Scene, Question]] = []
    kinds = [*QUESTION_KINDS]
    number = 0
    while len(made) < count:
        scene = sample_scene("test", number, photos=photos)
        random = Random(f"adafv test question {number}")
        for place in range(QUESTIONS_PER_SCENE):
            question = ask(scene, random, kinds[len(made) % len(kinds)])
            # A scene without an object that is clearly the biggest, say, leaves that question to a later scene.
            if question is not None and len(made) < count:
                made.append((scene, question))
            elif place == 0:
                break
        number += 1
    return made


class Answerer:
    """The bundled model, asked in batches.

    Args:
        family: "llava" or "llava-next", whose pictures are twice as large: a thumbnail and four crops.
    """

    def __init__(
        self, family: str = "llava", folder: Path | None = None, dtype: str = "float32", device: str = "cpu"
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = folder or bundled_model(family)
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()
        self.model.to(device)
        self.side = self.model.config.vision_config.image_size * (2 if family == "llava-next" else 1)

    def inputs(self, batch: list[tuple[Scene, Question]]) -> dict[str, Any]:
        images = [render(scene, self.side)[0] for scene, _ in batch]
        inputs = batch_of(self.processor, images, [question.text for _, question in batch])
        return dict(inputs.to(self.model.dtype))

    def answers(self, inputs: dict[str, Any], pruner: Pruner | None = None) -> list[str]:
        """The first word of each answer."""
        logits = first_answer_logits(self.model, inputs, pruner)
        return [self.processor.decode([token]) for token in logits.argmax(-1).tolist()]


def run(
    questions: list[tuple[Scene, Question]],
    answerer: Answerer,
    configurations: list[tuple[str, float]],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[bool]]:
    """Whether each question was answered rightly: "full", "blank" and every "method @ keep"."""
    pruners = {
        f"{name} @ {keep}": Pruner(
            CONFIGURATIONS[name][0], keep, processor=answerer.processor, **CONFIGURATIONS[name][1]
        )
        for name, keep in configurations
    }
    right: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, len(questions), BATCH):
        batch = questions[first : first + BATCH]
        inputs = answerer.inputs(batch)
        blank = inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
        runs: dict[str, tuple[dict[str, Any], Pruner | None]] = {"full": (inputs, None), "blank": (blank, None)}
        runs |= {name: (inputs, pruner) for name, pruner in pruners.items()}
        for name, (given, pruner) in runs.items():
            said = answerer.answers(given, pruner)
            right[name] += [word == question.answer for word, (_, question) in zip(said, batch, strict=True)]
        progress(first + len(batch))
    return dict(right)


def majority(asked: list[Asked]) -> list[bool]:
    """Whether the most frequent answer to questions of its kind, counted on these very questions, is right."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in asked:
        counts[question.kind][question.answer] += 1
    return [question.answer == counts[question.kind].most_common(1)[0][0] for question in asked]


@dataclass(frozen=True)
class _Job:
    number: int
    questions: list[tuple[Scene, Question]]
    configurations: list[tuple[str, float]]
    family: str
    folder: Path | None
    dtype: str


def _part(job: _Job) -> dict[str, list[bool]]:
    torch.set_num_threads(1)
    start = time.monotonic()

    def progress(done: int) -> None:
        if done % (10 * BATCH) == 0:
            print(f"part {job.number}: {done} of {len(job.questions)}, {time.monotonic() - start:.0f} s", flush=True)

    return run(job.questions, Answerer(job.family, job.folder, job.dtype), job.configurations, progress)


def _percent(values: list[float], scenes: list[int], sign: str = "") -> str:
    mean, half = interval(values, scenes)
    return f"{100 * mean:{sign}.1f} ± {100 * half:.1f}"


def report(asked: list[Asked], right: dict[str, list[bool]], console: Console) -> None:
    def cell(name: str, chosen: list[int], minus: str | None = None) -> str:
        values = [float(right[name][i]) - (float(right[minus][i]) if minus else 0.0) for i in chosen]
        return _percent(values, [asked[i].scene for i in chosen], "+" if minus else "")

    everything = list(range(len(asked)))
    faint = [i for i in everything if asked[i].faint]
    kinds = {kind: [i for i in everything if asked[i].kind == kind] for kind in QUESTION_KINDS}
    table = Table(title=f"{len(asked)} questions about test scenes, unpruned; percent right, 95 % intervals")
    for heading in ("", "all", "faint objects", *kinds):
        table.add_column(heading, justify="right")
    for name, label in (("full", "model"), ("blank", "picture blanked"), ("majority", "most frequent answer")):
        table.add_row(label, *(cell(name, chosen) for chosen in (everything, faint, *kinds.values())))
    console.print(table)

    runs = [name.rsplit(" @ ", 1) for name in right if " @ " in name]
    for title, chosen in (("all questions", everything), ("questions about small, faint objects", faint)):
        table = Table(title=f"Percent right at each budget: {len(chosen)} {title}; unpruned {cell('full', chosen)}")
        budgets = sorted({float(keep) for _, keep in runs}, reverse=True)
        table.add_column("method")
        for keep in budgets:
            table.add_column(f"{keep:.0%}", justify="right")
            table.add_column("- saliency", justify="right")
        for method in dict.fromkeys(name for name, _ in runs):
            cells = []
            for keep in budgets:
                saliency = f"saliency @ {keep}"
                paired = (
                    ""
                    if method == "saliency" or saliency not in right
                    else cell(f"{method} @ {keep}", chosen, saliency)
                )
                cells += [cell(f"{method} @ {keep}", chosen), paired]
            table.add_row(method, *cells)
        console.print(table)

    table = Table(title="Percent right by kind of question")
    for heading in ("method", "budget", *kinds):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, kept in runs:
        share = f"{float(kept):.0%}"
        table.add_row(method, share, *(cell(f"{method} @ {kept}", chosen).split(" ")[0] for chosen in kinds.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy against budget on generated scenes.")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--keep", type=float, nargs="*", default=[0.5, 0.25, 0.1, 0.05])
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--family", choices=("llava", "llava-next"), default="llava")
    parser.add_argument("--model", type=Path, help="another folder with a model of this world")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--no-photos", action="store_true", help="no photographic backgrounds; they need scikit-image")
    parser.add_argument("--json", type=Path, help="write every question and whether each run was right")
    options = parser.parse_args()

    questions = held_out_questions(options.questions, photos=not options.no_photos)
    asked = [Asked(scene.number, q.kind, q.text, q.answer, q.faint) for scene, q in questions]
    configurations = [(name, keep) for keep in options.keep for name in options.only]
    parts = [range(len(questions))[n :: options.processes] for n in range(options.processes)]
    jobs = [
        _Job(number, [questions[i] for i in part], configurations, options.family, options.model, options.dtype)
        for number, part in enumerate(parts, 1)
    ]
    if len(jobs) == 1:
        results = [_part(jobs[0])]
    else:
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(_part, jobs))
    right: dict[str, list[bool]] = {"majority": majority(asked)}
    for name in results[0]:
        right[name] = [False] * len(questions)
        for part, result in zip(parts, results, strict=True):
            for place, found in zip(part, result[name], strict=True):
                right[name][place] = found
    if options.json:
        options.json.write_text(json.dumps({"asked": [asdict(question) for question in asked], "right": right}))
    report(asked, right, Console(width=150))


if __name__ == "__main__":
    main()
