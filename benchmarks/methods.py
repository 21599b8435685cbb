"""Every method at every budget, on drawn scenes with ground truth and on photographs: right or wrong, question by question.

    python -m benchmarks.methods world  --store world.jsonl  [--questions 2000] [--keep 0.25 0.1 0.05] [--methods adafv ...]
    python -m benchmarks.methods photos --store photos.jsonl --model DIR --photos FOLDER [FOLDER ...] [--part choose]
    python -m benchmarks.methods report --store FILE [FILE ...] [--part confirm] [--against adafv random]

Why it looks like this. Comparing dozens of methods takes hours on a small machine, so every answer is written down as it is
given: a run that was stopped goes on where it was, and methods can be added later. Every image is encoded once for all
methods that choose between tower and language model. Methods that need more than that (down-sampling, or pruning inside the
language model) run on the pixels.

With dozens of methods the best one is partly lucky. Scenes and photographs with an even number choose, the others confirm.

- world: questions about test scenes (`adafv.evaluation.world`), asked of the bundled model. Right: the answer's first word.
- photos: yes / no questions on photographs (a folder has `images/` and `presence.jsonl`). Right: the larger of two logits.
- report: percent right, and minus other methods, paired, with 95 % intervals that count images.

A method is written as on the command line, with its options: `adafv`, `adafv:objective=split`, `random:seed=1`. `full` is
the unpruned model, `blank` the model with its picture blanked.
"""

import argparse
import json
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import adafv
from adafv import Pruner
from adafv.evaluation.world.details import render
from adafv.images import load_image
from adafv.methods import Method, known_methods
from adafv.methods.base import TOKENS
from adafv.methods.options import method_from_text
from benchmarks import candidates
from benchmarks.accuracy import SUFFIX, Asker, batch_of, first_answer_logits, interval
from benchmarks.budgets import BATCH, Answerer, held_out_questions
from benchmarks.details import detailed_questions

PARTS = ("all", "choose", "confirm")
UNPRUNED = ("full", "blank")


@dataclass(frozen=True)
class Batch:
    """Questions that are asked together."""

    names: list[str]
    """Of the questions, unique."""
    images: list[str]
    """What each is about; intervals count these."""
    kinds: list[str]
    inputs: dict[str, Any]
    labels: list[Any]


class World:
    """Questions about drawn scenes, and the bundled model."""

    def __init__(
        self,
        count: int,
        part: str,
        family: str,
        folder: Path | None,
        device: str = "cpu",
        size: int = BATCH,
        details: bool = False,
    ) -> None:
        questions = detailed_questions(count) if details else held_out_questions(count)
        self.asked = [pair for pair in questions if belongs(str(pair[0].number), part)]
        self.answerer, self.size = Answerer(family, folder, device=device), size
        self.model, self.processor = self.answerer.model, self.answerer.processor

    def batches(self, process: int, processes: int) -> Iterator[Batch]:
        starts = range(0, len(self.asked), self.size)[process::processes]
        for first in starts:
            batch = self.asked[first : first + self.size]
            images = [render(scene, self.answerer.side)[0] for scene, _ in batch]
            inputs = batch_of(self.processor, images, [question.text for _, question in batch])
            scenes = [str(scene.number) for scene, _ in batch]
            names = [f"{scene} {question.text}" for scene, (_, question) in zip(scenes, batch, strict=True)]
            yield Batch(
                names, scenes, [q.kind for _, q in batch], dict(inputs), [question.answer for _, question in batch]
            )

    def right(self, logits: Tensor, batch: Batch) -> tuple[list[bool], list[float]]:
        """Whether each answer is right, and the probability of the right one."""
        logits = logits.cpu()
        said = [self.processor.decode([token]) for token in logits.argmax(-1).tolist()]
        encode = self.processor.tokenizer.encode
        wanted = torch.tensor([encode(answer, add_special_tokens=False)[:1] for answer in batch.labels])
        sure = logits.float().softmax(-1).gather(-1, wanted).squeeze(-1).tolist()
        return [word == answer for word, answer in zip(said, batch.labels, strict=True)], sure


class Photos:
    """Yes / no questions on photographs; those on one photograph are asked together."""

    def __init__(
        self, folders: Sequence[Path], count: int, part: str, model: str, device: str = "cpu", size: int = 1
    ) -> None:
        self.asker, self.size = Asker(model, folders[0], "float32", device), size
        self.model, self.processor = self.asker.model, self.asker.processor
        self.asked: dict[tuple[Path, str], list[dict[str, str]]] = defaultdict(list)
        for folder in folders:
            for line in (folder / "presence.jsonl").read_text().splitlines():
                question = json.loads(line)
                if belongs(question["image"], part):
                    self.asked[folder / "images", question["image"]].append(question)
        # A share of every photograph's questions: photographs are what intervals count.
        if count:
            most = max(1, count // len(self.asked))
            self.asked = {key: _mixed(questions)[:most] for key, questions in self.asked.items()}  # type: ignore[assignment]

    def batches(self, process: int, processes: int) -> Iterator[Batch]:
        together: list[tuple[str, dict[str, str], Any]] = []
        own = list(self.asked.items())[process::processes]
        for place, ((folder, image), questions) in enumerate(own):
            picture = load_image(str(folder / image))
            together += [(image, question, picture) for question in questions]
            if len(together) >= self.size or place == len(own) - 1:
                yield self._batch(together)
                together = []

    def _batch(self, asked: list[tuple[str, dict[str, str], Any]]) -> Batch:
        inputs = batch_of(
            self.processor,
            [picture for _, _, picture in asked],
            [question["text"] + SUFFIX for _, question, _ in asked],
        )
        images = [image for image, _, _ in asked]
        names = [f"{image} {question['text']}" for image, question, _ in asked]
        kinds = [question["label"] for _, question, _ in asked]
        return Batch(names, images, kinds, dict(inputs.to(self.model.dtype)), [kind == "yes" for kind in kinds])

    def right(self, logits: Tensor, batch: Batch) -> tuple[list[bool], list[float]]:
        """Whether each answer is right, and the probability of the right one of the two."""
        yes, no = logits[:, self.asker.answers].float().cpu().unbind(-1)
        chances = (yes - no).sigmoid().tolist()
        sure = [chance if label else 1 - chance for chance, label in zip(chances, batch.labels, strict=True)]
        return [(said == label) for said, label in zip((yes > no).tolist(), batch.labels, strict=True)], sure


def _mixed(questions: list[dict[str, str]]) -> list[dict[str, str]]:
    """Yes and no by turns."""
    sides = [[each for each in questions if each["label"] == label] for label in ("yes", "no")]
    shortest = min(map(len, sides))
    pairs = [each for pair in zip(*sides, strict=False) for each in pair]
    return pairs + sides[0][shortest:] + sides[1][shortest:]


def belongs(image: str, part: str) -> bool:
    """Half of the images choose, the others confirm; by a hash, as their numbers may say something about them."""
    return part == "all" or (zlib.crc32(image.encode()) % 2 == 0) == (part == "choose")


def methods_of(words: Sequence[str]) -> dict[str, Method]:
    """By the word that names them; of the catalogue, or candidates of `benchmarks.candidates`."""
    CANDIDATES = candidates.CANDIDATES
    # What a table calls by the name of a method is that method.
    assert not CANDIDATES.keys() & known_methods().keys()
    return {
        word: CANDIDATES[word] if word in CANDIDATES else method_from_text(word)[0]
        for word in words
        if word not in UNPRUNED
    }


def run(source: World | Photos, methods: dict[str, Method], options: argparse.Namespace) -> None:
    done = answered([options.store]) if options.store.exists() else {}
    candidates.LANGUAGE_MODEL = source.model.model.language_model
    wanted = [("full", 1.0), ("blank", 1.0)] + [(word, keep) for keep in options.keep for word in methods]
    pruners = {
        (word, keep): Pruner(methods[word], keep, processor=source.processor)
        for word, keep in wanted
        if word in methods
    }
    early = [method for method in methods.values() if method.stages == {TOKENS} and not method.may_repeat]
    start, count = time.monotonic(), 0
    failed: set[str] = set()
    with options.store.open("a") as file:
        for batch in source.batches(options.process, options.processes):
            missing = [key for key in wanted if any(name not in done.get(key, {}) for name in batch.names)]
            if not missing:
                continue
            inputs = {name: value.to(source.model.device) for name, value in batch.inputs.items()}
            with torch.no_grad():
                encoded = adafv.encode(source.model, inputs, method=[*early, "adafv"])
            text_alone = {name: value for name, value in inputs.items() if name != "pixel_values"}
            for word, keep in missing:
                given, pruner = inputs, pruners.get((word, keep))
                if word == "blank":
                    given = given | {"pixel_values": torch.zeros_like(given["pixel_values"])}
                if pruner is not None and methods[word] in early:
                    given = {**text_alone, "images": encoded}
                if word in failed:
                    continue
                try:
                    right, sure = source.right(first_answer_logits(source.model, given, pruner), batch)
                except Exception as error:  # one method must not end a long run of others
                    failed.add(word)
                    print(f"{word} failed and is left out: {type(error).__name__}: {error}", flush=True)
                    continue
                entry = {"method": word, "keep": keep, "names": batch.names, "images": batch.images}
                entry |= {"kinds": batch.kinds, "right": [int(each) for each in right]}
                file.write(json.dumps(entry | {"sure": [round(each, 5) for each in sure]}) + "\n")
            file.flush()
            count += len(batch.names)
            if time.monotonic() - start > options.seconds:
                break
            print(f"{count} questions, {time.monotonic() - start:.0f} s", flush=True)


def answered(files: Sequence[Path], what: str = "right") -> dict[tuple[str, float], dict[str, tuple[str, str, float]]]:
    """(method, keep) -> question -> (image, kind, right or not, or how sure of what is right)."""
    found: dict[tuple[str, float], dict[str, tuple[str, str, float]]] = defaultdict(dict)
    for line in (line for file in files for line in file.read_text().splitlines()):
        entry = json.loads(line)
        found[entry["method"], entry["keep"]].update(
            (name, (image, kind, value))
            for name, image, kind, value in zip(
                entry["names"], entry["images"], entry["kinds"], entry.get(what, ()), strict=what == "right"
            )
        )
    return found


def report(options: argparse.Namespace) -> None:
    found = answered(options.store, "sure" if options.sure else "right")
    keeps = sorted({keep for word, keep in found if word not in UNPRUNED}, reverse=True)
    console = Console(width=200)

    def cell(key: tuple[str, float], minus: tuple[str, float] | None = None, kind: str | None = None) -> str:
        mine, other = found.get(key, {}), found.get(minus, {}) if minus else {}
        names = [
            name
            for name, (image, own, _) in mine.items()
            if belongs(image, options.part) and (minus is None or name in other) and kind in (None, own)
        ]
        if not names:
            return ""
        values = [float(mine[name][2] - (other[name][2] if minus else 0)) for name in names]
        mean, half = interval(values, [mine[name][0] for name in names])
        mark = "*" if minus and abs(mean) > half else ""
        return f"{100 * mean:{'+' if minus else ''}.1f} ± {100 * half:.1f}{mark}"

    for keep in keeps:
        words = [word for word, share in found if share == keep and word not in UNPRUNED]
        full = found["full", 1.0]
        count = len([name for name, (image, _, _) in full.items() if belongs(image, options.part)])
        table = Table(title=f"{keep:.0%}, {count} questions, {options.part}; unpruned {cell(('full', 1.0))}")
        kinds = sorted({kind for _, kind, _ in full.values()}) if options.kinds else []
        for heading in ("method", "right", *(f"- {other}" for other in options.against), *kinds):
            table.add_column(heading, justify="left" if heading == "method" else "right")
        score = {word: float(cell((word, keep)).split(" ")[0] or -1) for word in words}
        for word in sorted(words, key=lambda word: -score[word]):
            paired = ["" if other == word else cell((word, keep), (other, keep)) for other in options.against]
            table.add_row(word, cell((word, keep)), *paired, *(cell((word, keep), kind=kind) for kind in kinds))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Every method at every budget.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("world", "photos"):
        command = commands.add_parser(name)
        command.add_argument("--store", required=True, type=Path, help="answers are read from here and added")
        command.add_argument("--methods", nargs="+", default=["adafv", "saliency", "text", "random", "uniform"])
        command.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.1, 0.05])
        command.add_argument("--part", choices=PARTS, default="all")
        command.add_argument("--questions", type=int, default=2000 if name == "world" else 0, help="about; 0: all")
        command.add_argument("--process", type=int, default=0, help="which of several; each with a store of its own")
        command.add_argument("--processes", type=int, default=1)
        command.add_argument("--device", default="cpu")
        command.add_argument("--batch", type=int, default=BATCH if name == "world" else 1, help="questions a batch")
        command.add_argument("--seconds", type=float, default=float("inf"), help="no batch is begun after so many")
    commands.choices["world"].add_argument("--family", choices=("llava", "llava-next"), default="llava")
    commands.choices["world"].add_argument("--model", type=Path, help="another folder with a model of this world")
    commands.choices["world"].add_argument(
        "--details",
        action="store_true",
        help="scenes with letters and patterns, see benchmarks.details; a store of its own",
    )
    commands.choices["photos"].add_argument("--model", required=True)
    commands.choices["photos"].add_argument("--photos", required=True, type=Path, nargs="+")
    command = commands.add_parser("report")
    command.add_argument("--store", required=True, type=Path, nargs="+")
    command.add_argument("--part", choices=PARTS, default="all")
    command.add_argument("--against", nargs="*", default=["adafv", "random"])
    command.add_argument(
        "--sure", action="store_true", help="the probability of the right answer in place of right or wrong"
    )
    command.add_argument("--kinds", action="store_true", help="by kind of question as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on a GPU too
    if options.command == "report":
        report(options)
        return
    methods = methods_of(options.methods)
    if options.command == "world":
        run(
            World(
                options.questions,
                options.part,
                options.family,
                options.model,
                options.device,
                options.batch,
                options.details,
            ),
            methods,
            options,
        )
    else:
        photos = Photos(options.photos, options.questions, options.part, options.model, options.device, options.batch)
        run(photos, methods, options)


if __name__ == "__main__":
    main()
