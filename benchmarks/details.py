"""What crops are worth: the single-view model, the twin with all crops, and the twin with its thumbnail alone, unpruned.

    python -m benchmarks.details [--questions 600] [--plain 300] [--model training/run/exported] [--json FILE]

Questions of all kinds about scenes with details (`adafv.evaluation.world.details`), and of the usual kinds about scenes
without.
Letters, patterns and their bearers can be told from the crops alone: where the thumbnail does better than "blank" there,
it is by what the smear of a letter still says. Scenes are those of the test split; an answer is right when its first word
is; intervals count scenes.

- single view: the model for one view, given the picture at half the size.
- crops: the twin, with all that it sees.
- thumbnail: the twin with the tokens of its thumbnail alone, all of them.
- blank: the twin, its picture blanked.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.table import Table

from adafv import Pruner
from adafv.evaluation.world.details import DETAIL_KINDS, DetailedScene, ask_detail, sample_detailed_scene
from adafv.evaluation.world.questions import QUESTION_KINDS, Question, ask
from adafv.evaluation.world.scenes import Scene
from benchmarks.accuracy import interval
from benchmarks.budgets import BATCH, QUESTIONS_PER_SCENE, Answerer, Asked, held_out_questions, majority

RUNS = {
    "single view": "model, single view",
    "crops": "twin, all crops",
    "thumbnail": "twin, thumbnail alone",
    "blank": "twin, picture blanked",
    "majority": "most frequent answer",
}


def detailed_questions(count: int, *, photos: bool = True) -> list[tuple[Scene, Question]]:
    """The first `count` questions about detailed test scenes: all kinds alike, two a scene at most."""
    makers: list[Callable[[DetailedScene, Random], Question | None]] = [
        *((lambda scene, random, kind=kind: ask(scene, random, kind)) for kind in QUESTION_KINDS),
        *((lambda scene, random, kind=kind: ask_detail(scene, random, kind)) for kind in DETAIL_KINDS),
    ]
    made: list[tuple[Scene, Question]] = []
    number = 0
    while len(made) < count:
        scene = sample_detailed_scene("test", number, photos=photos)
        random = Random(f"adafv detailed test question {number}")
        for _ in range(QUESTIONS_PER_SCENE):
            question = makers[len(made) % len(makers)](scene, random)
            if question is None:  # a later scene may allow it
                break
            if len(made) < count:
                made.append((scene, question))
        number += 1
    return made


@dataclass(frozen=True)
class _Job:
    questions: list[tuple[Scene, Question]]
    folder: Path | None


def answered(job: _Job) -> dict[str, list[bool]]:
    """Whether each question was answered rightly, of every run but "majority"."""
    torch.set_num_threads(1)
    model, twin = (
        Answerer(family, None if job.folder is None else job.folder / family) for family in ("llava", "llava-next")
    )
    thumbnail = Pruner("thumbnail", model.model.config.image_seq_length, processor=twin.processor)
    right: dict[str, list[bool]] = {name: [] for name in RUNS if name != "majority"}
    for first in range(0, len(job.questions), BATCH):
        batch = job.questions[first : first + BATCH]
        crops = twin.inputs(batch)
        said = {
            "single view": model.answers(model.inputs(batch)),
            "crops": twin.answers(crops),
            "thumbnail": twin.answers(crops, thumbnail),
            "blank": twin.answers(crops | {"pixel_values": torch.zeros_like(crops["pixel_values"])}),
        }
        for name, words in said.items():
            right[name] += [word == question.answer for word, (_, question) in zip(words, batch, strict=True)]
    return right


def measure(questions: list[tuple[Scene, Question]], folder: Path | None, processes: int) -> dict[str, list[bool]]:
    """As `answered`, in several processes, and "majority"."""
    processes = max(1, min(processes, len(questions) // BATCH))
    jobs = [_Job(questions[part::processes], folder) for part in range(processes)]
    if processes == 1:
        parts = [answered(jobs[0])]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            parts = list(pool.map(answered, jobs))
    right: dict[str, list[bool]] = {}
    for name in parts[0]:
        right[name] = [False] * len(questions)
        for place, part in enumerate(parts):
            right[name][place::processes] = part[name]
    return right | {"majority": majority([_asked(scene, question) for scene, question in questions])}


def _asked(scene: Scene, question: Question) -> Asked:
    return Asked(scene.number, question.kind, question.text, question.answer, question.faint)


def report(title: str, asked: list[Asked], right: dict[str, list[bool]], console: Console) -> None:
    kinds = [*dict.fromkeys(question.kind for question in asked)]
    table = Table(title=f"{title}: {len(asked)} questions, percent right, 95 % intervals")
    for heading in ("", "all", *kinds):
        table.add_column(heading, justify="right")
    for name, label in RUNS.items():
        cells = []
        for kind in (None, *kinds):
            chosen = [place for place, question in enumerate(asked) if kind in (None, question.kind)]
            mean, half = interval([float(right[name][i]) for i in chosen], [asked[i].scene for i in chosen])
            cells.append(f"{100 * mean:.1f} ± {100 * half:.1f}")
        table.add_row(label, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="What crops are worth, on generated scenes with details.")
    parser.add_argument("--questions", type=int, default=600, help="about scenes with details")
    parser.add_argument("--plain", type=int, default=300, help="about scenes without")
    parser.add_argument("--model", type=Path, help="a folder with llava and llava-next (default: the bundled models)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--no-photos", action="store_true", help="no photographic backgrounds; they need scikit-image")
    parser.add_argument("--json", type=Path, help="write every question and whether each run was right")
    options = parser.parse_args()
    console = Console(width=170)
    written = {}
    for title, questions in (
        ("scenes with details", detailed_questions(options.questions, photos=not options.no_photos)),
        ("scenes without", held_out_questions(options.plain, photos=not options.no_photos)),
    ):
        if not questions:
            continue
        right = measure(questions, options.model, options.processes)
        asked = [_asked(scene, question) for scene, question in questions]
        written[title] = {"asked": [asdict(question) for question in asked], "right": right}
        report(title, asked, right, console)
    if options.json:
        options.json.write_text(json.dumps(written))


if __name__ == "__main__":
    main()
