"""What pruning loses on yes / no questions: accuracy of each method, paired question by question.

    python -m benchmarks.accuracy --model DIR --questions FILE.jsonl --images DIR [--keep 0.05 0.1] [--limit N]

Each line of the questions is {"image": file name, "text": question, "label": "yes" or "no"}. The answer is read off the
logits of "Yes" and "No" at the first answer token, so it takes one forward pass. All questions on one image make one
batch. Differences are paired: the same questions, answered with and without; their interval is a good deal narrower
than that of either accuracy. Intervals count images, not questions: questions on one image share its luck.

Numbers hold for the model they were measured on. A small model that is often wrong says what pruning changes; it is no
evidence about a large one.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adafv import Pruner
from adafv.images import load_image

SUFFIX = " Answer the question using a single word or phrase."

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "adafv": ("adafv", {}),
    "adafv, text=turn": ("adafv", {"text": "turn"}),
    "adafv, text=after": ("adafv", {"text": "after"}),
    "adafv, split": ("adafv", {"objective": "split"}),
    "adafv, published": ("adafv", {"variant": "published"}),
    "adafv, original positions": ("adafv", {"positions": "original"}),
    "text": ("text", {}),
    "saliency": ("saliency", {}),
    "random": ("random", {}),
    "uniform": ("uniform", {}),
    "downsample": ("downsample", {}),
}


def interval(values: Sequence[float], images: Sequence[Hashable]) -> tuple[float, float]:
    """Mean over all questions and half the width of its 95 % interval.

    Questions on one image go right and wrong together, so images, not questions, are what is independent: the variance
    is that of the images' summed deviations.
    """
    mean = sum(values) / len(values)
    deviations: dict[Hashable, float] = defaultdict(float)
    for value, image in zip(values, images, strict=True):
        deviations[image] += value - mean
    clusters = len(deviations)
    variance = sum(deviation**2 for deviation in deviations.values()) * clusters / max(1, clusters - 1)
    return mean, 1.96 * math.sqrt(variance) / len(values)


def batch_of(processor: Any, images: Sequence[Any], questions: Sequence[str]) -> Any:
    """One prompt per image and question, padded on the side that the processor pads on."""
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for question in questions
    ]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    return processor(images=list(images), text=texts, padding=True, return_tensors="pt")


@torch.no_grad()
def first_answer_logits(model: Any, inputs: dict[str, Any], pruner: Pruner | None) -> Tensor:
    """[batch, vocabulary], of the first token of each answer; prompts must be padded on the left."""
    with nullcontext() if pruner is None else pruner(model):
        return model(**inputs, logits_to_keep=1).logits[:, -1]


class Asker:
    """A model that answers yes or no."""

    def __init__(self, folder: str, images: Path, dtype: str, device: str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        self.processor.tokenizer.padding_side = "left"  # the answer is read off the last column
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()
        self.model.to(device)
        self.images = images
        tokenizer = self.processor.tokenizer
        self.answers = [tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No")]

    def inputs(self, name: str, questions: list[str]) -> dict[str, Any]:
        """All questions on one image, as one batch."""
        images = [load_image(str(self.images / name))] * len(questions)
        inputs = batch_of(self.processor, images, [question + SUFFIX for question in questions])
        return dict(inputs.to(self.model.dtype))

    def says_yes(self, inputs: dict[str, Any], pruner: Pruner | None) -> list[bool]:
        yes, no = first_answer_logits(self.model, inputs, pruner)[:, self.answers].unbind(-1)
        return (yes > no).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of pruning methods on yes / no questions.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", required=True, type=Path)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--limit", type=int, help="number of images")
    parser.add_argument("--dtype", default="auto", help="auto (as saved), bfloat16, float32, ...")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the answers of every question here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    asker = Asker(options.model, options.images, options.dtype)
    by_image: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in options.questions.read_text().splitlines():
        question = json.loads(line)
        by_image[question["image"]].append(question)

    pruners = {
        (name, keep): Pruner(method, keep, processor=asker.processor, **parameters)
        for keep in options.keep
        for name in options.only
        for method, parameters in [CONFIGURATIONS[name]]
    }
    right: dict[Any, list[float]] = defaultdict(list)
    asked_on: list[str] = []
    start = time.perf_counter()
    for number, (image, questions) in enumerate(list(by_image.items())[: options.limit], 1):
        inputs = asker.inputs(image, [question["text"] for question in questions])
        labels = [question["label"] == "yes" for question in questions]
        asked_on += [image] * len(labels)
        runs: dict[Any, Pruner | None] = {"full": None, **pruners}
        for key, pruner in runs.items():
            found = asker.says_yes(inputs, pruner)
            right[key] += [float(answer == label) for answer, label in zip(found, labels, strict=True)]
        if number % 20 == 0:
            print(f"{number} images, {time.perf_counter() - start:.0f} s", flush=True)
    if options.json:
        options.json.write_text(json.dumps({str(key): value for key, value in right.items()}))

    table = Table(title=f"{len(right['full'])} questions; percent, with 95 % intervals")
    for heading in ("keep", "method", "accuracy", "minus full, paired", "minus saliency, paired"):
        table.add_column(heading, justify="left" if heading == "method" else "right")

    def percent(values: list[float], sign: str = "") -> str:
        mean, half = interval(values, asked_on)
        return f"{100 * mean:{sign}.1f} ± {100 * half:.1f}"

    def paired(one: list[float], two: list[float]) -> str:
        return percent([a - b for a, b in zip(one, two, strict=True)], sign="+")

    table.add_row("1.0", "full", percent(right["full"]), "", "")
    for name, keep in pruners:
        values, saliency = right[name, keep], right.get(("saliency", keep))
        against = "" if saliency is None or name == "saliency" else paired(values, saliency)
        table.add_row(str(keep), name, percent(values), paired(values, right["full"]), against)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
