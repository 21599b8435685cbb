"""What crops are worth at a budget: all of them, the thumbnail alone, one or two, and "auto".

    python -m benchmarks.crops [--questions 400] [--first 0] [--plain 300] [--keep 0.1 0.05] [--numbers 1 2] [--model DIR]

Questions about scenes with details, which a crop alone can show, are asked of `--model` (default: the bundled twin); those
about scenes without, of the bundled twin. "auto" is what `crops="auto"` does: the answer with the thumbnail where its first
token has a probability of `CERTAIN` or more, else that with all crops. Images are encoded once, whole, and crops chosen
from them, which gives the same answers (tests/test_crops.py). An answer is right when its first word is; intervals count
scenes. `--first` leaves out the questions that `CERTAIN` was chosen on.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import adafv
from adafv import Pruner
from adafv.core.crops import CERTAIN
from adafv.evaluation.world.details import render
from adafv.evaluation.world.questions import Question
from adafv.evaluation.world.scenes import Scene
from benchmarks.accuracy import batch_of, first_answer_logits, interval
from benchmarks.budgets import Answerer, held_out_questions
from benchmarks.details import detailed_questions

BATCH = 50


def answered(
    questions: list[tuple[Scene, Question]],
    answerer: Answerer,
    budgets: list[float],
    among: list[str],
    file: Path | None,
) -> dict[str, list[tuple[bool, float]]]:
    """ "crops @ budget" -> whether each question was answered rightly, and how probable the answer was."""
    found: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    processor = answerer.processor
    for first in range(0, len(questions), BATCH):
        batch = questions[first : first + BATCH]
        images = [render(scene, answerer.side)[0] for scene, _ in batch]
        inputs = dict(batch_of(processor, images, [question.text for _, question in batch]))
        inputs["images"] = adafv.encode(answerer.model, inputs)
        del inputs["pixel_values"]
        for keep in budgets:
            for crops in among:
                pruner = Pruner("adafv", keep, processor=processor, crops=crops)
                chances, tokens = first_answer_logits(answerer.model, inputs, pruner).softmax(-1).max(-1)
                said = [processor.decode([token]) for token in tokens.tolist()]
                right = [word == question.answer for word, (_, question) in zip(said, batch, strict=True)]
                found[f"{crops} @ {keep}"] += zip(right, chances.tolist(), strict=True)
        done = questions[: first + len(batch)]
        print(f"{len(done)} of {len(questions)}", flush=True)
        if file is not None:  # as far as it is
            entry = {"kinds": [question.kind for _, question in done], "scenes": [scene.number for scene, _ in done]}
            file.write_text(json.dumps(entry | {"found": found}))
    return found


def report(
    title: str, questions: list[tuple[Scene, Question]], found: dict[str, list[tuple[bool, float]]], console: Console
) -> None:
    kinds = [*dict.fromkeys(question.kind for _, question in questions)]
    table = Table(title=f"{title}: {len(questions)} questions, percent right, 95 % intervals")
    for heading in ("crops", "budget", "more than the thumbnail", "all kinds", *kinds):
        table.add_column(heading, justify="left" if heading == "crops" else "right")
    among = [*dict.fromkeys(name.split(" @ ")[0] for name in found)]
    for keep in dict.fromkeys(name.split(" @ ")[1] for name in found):
        certain = [chance >= CERTAIN for _, chance in found[f"thumbnail @ {keep}"]]
        rows = {crops: [right for right, _ in found[f"{crops} @ {keep}"]] for crops in among}
        pairs = zip(certain, rows["thumbnail"], rows["all"], strict=True)
        rows["auto"] = [alone if sure else whole for sure, alone, whole in pairs]
        again = {"auto": 1 - sum(certain) / len(certain), "thumbnail": 0.0}
        for crops, right in rows.items():
            cells = []
            for kind in (None, *kinds):
                chosen = [i for i, (_, question) in enumerate(questions) if kind in (None, question.kind)]
                mean, half = interval([float(right[i]) for i in chosen], [questions[i][0].number for i in chosen])
                cells.append(f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if kind is None else ""))
            table.add_row(crops, f"{float(keep):.0%}", f"{again.get(crops, 1.0):.0%}", *cells)
        for other in ("all", "thumbnail"):
            differences = [float(a) - float(b) for a, b in zip(rows["auto"], rows[other], strict=True)]
            mean, half = interval(differences, [scene.number for scene, _ in questions])
            table.add_row(f"auto - {other}", f"{float(keep):.0%}", "", f"{100 * mean:+.1f} ± {100 * half:.1f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="What crops are worth at a budget.")
    parser.add_argument("--questions", type=int, default=400, help="about scenes with details")
    parser.add_argument("--plain", type=int, default=300, help="about scenes without")
    parser.add_argument("--first", type=int, default=0, help="leave out so many of the questions about details")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.1, 0.05])
    parser.add_argument("--numbers", nargs="*", default=["1", "2"], help="of crops, beside all and the thumbnail")
    parser.add_argument("--model", type=Path, help="a folder with llava-next, asked about details")
    parser.add_argument("--no-photos", action="store_true", help="no photographic backgrounds; they need scikit-image")
    parser.add_argument("--json", type=Path, help="a folder for every question and what was found")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=190)
    photos = not options.no_photos
    folder = None if options.model is None else options.model / "llava-next"
    detailed = detailed_questions(options.first + options.questions, photos=photos)[options.first :]
    for title, questions, where in (
        ("scenes with details", detailed, folder),
        ("scenes without", held_out_questions(options.plain, photos=photos), None),
    ):
        if questions:
            among = ["all", "thumbnail", *options.numbers]
            file = None if options.json is None else options.json / f"{title.replace(' ', '-')}.json"
            report(
                title, questions, answered(questions, Answerer("llava-next", where), options.keep, among, file), console
            )


if __name__ == "__main__":
    main()
