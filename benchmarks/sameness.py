"""Whether two states of the code keep the same tokens and give the same answers: the guard of a refactoring.

    python -m benchmarks.sameness write BEFORE.json [--engine transformers|vllm] [--questions 500] [--objective NAME]
    python -m benchmarks.sameness compare BEFORE.json AFTER.json [--allow [kept|answers|numbers ...]]

`write` asks the bundled models questions about test scenes (`adafv.evaluation.world`), alone and in batches of several sizes,
with every method, budget, scope of the text and kind of positions that the engine takes, and writes what was kept and
answered.
`compare` counts what differs and ends with status 1 if anything does. Write both files on one machine, with the same
versions of torch and of the engine: matrix products round differently elsewhere, and two near-equal scores then swap.

The same file is to run on the code before and after, so it uses what users use: `Pruner` and its record, a server's options
and a request's. The names inside the library that it cannot do without stand together, under "What may be renamed".
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import product, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

Part = str | Image.Image
Case = dict[str, Any]

MODELS = {"llava": 0.76, "llava-next": 0.24}
"""Bundled checkpoint -> its share of the questions; the second takes four times as long for one."""
ARCHITECTURES = {"llava": "LlavaForConditionalGeneration", "llava-next": "LlavaNextForConditionalGeneration"}
SIZES: dict[str, list[tuple[int, int]]] = {
    "llava": [(144, 144), (144, 144), (200, 150)],
    "llava-next": [(288, 288), (288, 144), (130, 300), (200, 150), (432, 400)],
}
"""(width, height) of the pictures; LLaVA-NeXT makes one, two or four crops of them besides the thumbnail."""
BATCHES = (1, 4, 1, 8, 2, 1, 16)
BUDGETS: tuple[int | float, ...] = (0.05, 0.1, 0.25, 12)
FORMS = ("plain", "question first", "two pictures", "two turns", "no words")
TOKENS = 4
"""Of an answer at most; the models answer in one word."""


@dataclass(frozen=True)
class Configuration:
    """A method and its options, less the budget."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Of the method itself."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `Pruner`, or of a server."""
    way: str = "generate"
    """How a model in transformers is run: "generate" or "forward"."""

    def with_objective(self, objective: str | None) -> "Configuration":
        """The same where it says which objective to maximise; else with this one, where the method has one."""
        if objective is None or self.method != "adafv" or self.parameters:
            return self
        return Configuration(self.method, {"objective": objective}, self.options, self.way)


SHARED = {
    "adafv": Configuration("adafv"),
    "adafv, text=turn": Configuration("adafv", options={"text": "turn"}),
    "adafv, text=after": Configuration("adafv", options={"text": "after"}),
    "adafv, split": Configuration("adafv", {"objective": "split"}),
    "text": Configuration("text"),
    "saliency": Configuration("saliency"),
    "random": Configuration("random", {"seed": 3}),
    "uniform": Configuration("uniform"),
}
"""What both engines take. The first is asked every question, in both."""
CONFIGURATIONS = SHARED | {
    "adafv, published": Configuration("adafv", {"variant": "published"}),
    "adafv, original positions": Configuration("adafv", options={"positions": "original"}),
    "adafv, forward": Configuration("adafv", way="forward"),
    "saliency, original positions": Configuration("saliency", options={"positions": "original"}),
    "downsample": Configuration("downsample"),
}
"""What transformers takes."""
SERVERS = {"llava": tuple(SHARED), "llava-next": ("adafv", "adafv, text=after", "text", "saliency")}
"""Configurations that a server of vLLM is started with, which takes longer than to ask it."""
OTHERS_PER_BATCH = {"llava": 3, "llava-next": 2}
"""In transformers, where every call runs the tower: configurations besides the first that a batch is asked with."""


@dataclass(frozen=True)
class Prompt:
    turns: tuple[tuple[Part, ...], ...]
    """Of the user and of the model, taking turns."""
    own_picture: bool
    """Whether no prompt before shows the same picture."""

    @property
    def pictures(self) -> list[Image.Image]:
        return [part for turn in self.turns for part in turn if isinstance(part, Image.Image)]

    def chat(self, picture_part: Any) -> list[dict[str, Any]]:
        """Messages, with what `picture_part` makes of a picture."""
        return [
            {
                "role": "assistant" if number % 2 else "user",
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else picture_part(part) for part in turn
                ],
            }
            for number, turn in enumerate(self.turns)
        ]


def batches_of(questions: int) -> dict[str, list[list[Prompt]]]:
    """Per bundled checkpoint, its prompts in batches: the same ones whoever asks for as many, two a scene."""
    from adafv.evaluation.drawn import held_out
    from adafv.evaluation.world.scenes import render, sample_scene

    # Photographic backgrounds need a package that not every environment has.
    made = list(held_out(questions, photos=False))
    first_share = max(1, round(questions * MODELS["llava"]))
    shares = {"llava": range(first_share), "llava-next": range(first_share, questions)}
    found: dict[str, list[list[Prompt]]] = {}
    for name, share in shares.items():
        side, sizes = SIZES[name][0][0], SIZES[name]
        batches = found[name] = []
        left = list(share)
        while left:
            size, odd = BATCHES[len(batches) % len(BATCHES)], len(batches) % 3 == 2
            taken, left = left[:size], left[size:]
            batches.append([])
            for number in taken:
                scene, question = made[number]
                shown = render(scene, side)[0].resize(sizes[scene.number % len(sizes)])
                form = FORMS[number % len(FORMS)] if odd else "plain"
                turns: tuple[tuple[Part, ...], ...] = ((shown, question.text),)
                if form == "question first":
                    turns = ((question.text, shown),)
                elif form == "two pictures":
                    # Of a scene that no other prompt shows.
                    second = render(sample_scene("test", 10**6 + number, photos=False), side)[0]
                    turns = ((shown, "is there a key?", second, question.text),)
                elif form == "two turns":
                    turns = ((shown, question.text), (question.answer,), ("what is the background?",))
                elif form == "no words":
                    turns = ((shown,),)
                own = number == share[0] or made[number - 1][0].number != scene.number
                batches[-1].append(Prompt(turns, own))
    return found


def plan(configurations: Sequence[str], name: str, batches: int) -> list[list[tuple[str, int | float]]]:
    """Per batch, the (configuration, budget) pairs that transformers is asked with.

    The first configuration is there in every batch, with budgets in turn; the pairs of the others come in turn.
    """
    first, *others = configurations
    pairs = [(other, keep) for keep, other in product(BUDGETS, others)]
    at_a_time = OTHERS_PER_BATCH[name]
    return [
        [
            (first, BUDGETS[number % len(BUDGETS)]),
            *(pairs[(number * at_a_time + place) % len(pairs)] for place in range(at_a_time)),
        ]
        for number in range(batches)
    ]


def without_padding(tokens: Sequence[int], padding: int | None) -> list[int]:
    """An answer without what fills it up to the longest of its batch."""
    end = len(tokens)
    while end and tokens[end - 1] == padding:
        end -= 1
    return list(tokens[:end])


def numbers(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(float(value), 6) for value in values]


def in_transformers(questions: int, objective: str | None) -> dict[str, Case]:
    """Name of a call -> what was kept of each image, and answered to each prompt, in the prompts' order."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from adafv import AdaFVError, Pruner
    from adafv.bundled import bundled_model

    torch.set_num_threads(1)
    configurations = {label: each.with_objective(objective) for label, each in CONFIGURATIONS.items()}
    cases: dict[str, Case] = {}
    for name, batches in batches_of(questions).items():
        processor: Any = AutoProcessor.from_pretrained(bundled_model(name), trust_remote_code=False)
        processor.tokenizer.padding_side = "left"
        model: Any = AutoModelForImageTextToText.from_pretrained(
            bundled_model(name), dtype="float32", trust_remote_code=False
        ).eval()
        padding = processor.tokenizer.pad_token_id
        planned = plan([*configurations], name, len(batches))
        for number, (batch, asked) in enumerate(zip(batches, planned, strict=True)):
            texts = [
                processor.apply_chat_template(prompt.chat(lambda _: {"type": "image"}), add_generation_prompt=True)
                for prompt in batch
            ]
            images = [prompt.pictures for prompt in batch]
            inputs = dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))
            for label, keep in asked:
                one = configurations[label]
                pruner = Pruner(one.method, keep, processor=processor, **one.options, **one.parameters)
                try:
                    with torch.no_grad(), warnings.catch_warnings(), pruner(model) as pruned:
                        warnings.simplefilter("ignore")  # of prompts without words
                        if one.way == "forward":
                            answers = model(**inputs).logits[:, -1:].argmax(-1)
                        else:
                            answers = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
                            answers = answers[:, inputs["input_ids"].shape[1] :]
                except AdaFVError as error:
                    cases[f"{name}, batch {number}, {label}, keep={keep}"] = {"refused": type(error).__name__}
                    continue
                record = pruned.last
                cases[f"{name}, batch {number}, {label}, keep={keep}"] = {
                    "kept": [indices.tolist() for indices in record.kept],
                    "answers": [without_padding(answer, padding) for answer in answers.tolist()],
                    "objective": numbers(record.objective),
                    "certificate": numbers(record.certificate),
                }
            _say(name, number, batches)
    return cases


def in_vllm(questions: int, objective: str | None) -> dict[str, Case]:
    """Name of a call -> what was kept of its images, sorted, and answered to each prompt, in the prompts' order.

    One server per checkpoint and configuration, as its options say which method it serves. Kept tokens are sorted because
    in which order the images of a batch are pruned is the server's business: those that it has in a cache come first.
    """
    prepare_for_vllm()
    import torch
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    torch.set_num_threads(1)
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    cases: dict[str, Case] = {}
    with TemporaryDirectory() as folder:
        for name, batches in batches_of(questions).items():
            checkpoint = whole_checkpoint(name, Path(folder))
            for place, label in enumerate(SERVERS[name]):
                one = SHARED[label].with_objective(objective)
                options = {"keep": 0.1, "method": one.method, "parameters": dict(one.parameters), **one.options}
                llm: Any = LLM(
                    str(checkpoint),
                    dtype="float32",
                    enforce_eager=True,
                    max_model_len=2048,
                    max_num_seqs=max(BATCHES),
                    seed=0,
                    limit_mm_per_prompt={"image": 2},
                    hf_overrides={"architectures": [served_as(ARCHITECTURES[name])], "adafv": options},
                )
                for number, batch in enumerate(batches):
                    if place and (number + place) % 2:  # each other server is asked every second batch
                        continue
                    if one.method not in ("adafv", "text"):
                        # Without words, a second question about a picture finds it pruned in vLLM's own cache.
                        batch = [prompt for prompt in batch if prompt.own_picture]
                    if not batch:
                        continue
                    keep = BUDGETS[(number + place) // (2 if place else 1) % len(BUDGETS)]
                    chats = [prompt.chat(lambda shown: {"type": "image_pil", "image_pil": shown}) for prompt in batch]
                    with kept_by(llm) as kept:
                        outputs = llm.chat(
                            chats, sampling, use_tqdm=False, mm_processor_kwargs={"adafv": {"keep": keep}}
                        )
                    images = sum(len(prompt.pictures) for prompt in batch)
                    if len(kept) != images:
                        raise RuntimeError(f"{len(kept)} of {images} images were seen being pruned; mend `kept_by`")
                    cases[f"{name}, batch {number}, {label}, keep={keep}"] = {
                        "kept": sorted(kept),
                        "answers": [list(output.outputs[0].token_ids) for output in outputs],
                    }
                _say(f"{name}, {label}", len(batches) - 1, batches)
                del llm
                cleanup_dist_env_and_memory()
    return cases


ENGINES = {"transformers": in_transformers, "vllm": in_vllm}


# What may be renamed: all that is not an interface for users.


def served_as(architecture: str) -> str:
    """The name under which vLLM serves a stock architecture pruned."""
    return f"AdaFV{architecture}"


@contextmanager
def kept_by(llm: Any) -> Iterator[list[list[int]]]:
    """Collects the tokens that are kept of every image which a vLLM engine in this process prunes meanwhile."""
    found: list[list[int]] = []
    classes: list[Any] = []
    name = "hand_over"  # (image, kept, features), called once per pruned image

    def watch(model: Any) -> None:
        stock = getattr(type(model), name)

        def watched(self: Any, image: Any, kept: Any, features: Any) -> Any:
            found.append(kept.tolist())
            return stock(self, image, kept, features)

        classes.append((type(model), stock, name in vars(type(model))))
        setattr(type(model), name, watched)

    llm.apply_model(watch)
    try:
        yield found
    finally:
        for cls, stock, own in classes:
            if own:
                setattr(cls, name, stock)
            else:
                delattr(cls, name)


def prepare_for_vllm() -> None:
    """Settings of an engine in this process on a CPU; before vLLM and torch are imported."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from adafv.engines.vllm import cpu_torchvision

    if cpu_torchvision.import_error() is not None:
        cpu_torchvision.load()
        # vLLM looks at a model's class in a process of its own.
        path = str(cpu_torchvision.FOLDER), os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))


def whole_checkpoint(name: str, folder: Path) -> Path:
    """A bundled checkpoint with all its weights inside; LLaVA-NeXT's has most of them beside it, where vLLM reads none."""
    from safetensors.torch import load_file, save_file

    from adafv.bundled import bundled_model

    source, target = bundled_model(name), folder / name
    index = source / "model.safetensors.index.json"
    if not index.exists():
        return source
    if not target.exists():
        target.mkdir()
        for file in source.iterdir():
            if ".safetensors" not in file.name:
                (target / file.name).write_bytes(file.read_bytes())
        weights: dict[str, Any] = {}
        for part in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            weights |= load_file(source / part)
        save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


# Writing and comparing.


def header(engine: str, questions: int, objective: str | None) -> dict[str, Any]:
    """What was asked, of which code, beside which versions."""
    import adafv

    assert adafv.__file__ is not None
    folder = str(Path(adafv.__file__).parent)

    def git(*command: str) -> str | None:
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD") or "unknown"
    if git("status", "--porcelain", "--", "."):
        commit += ", changed since"
    versions = {}
    for package in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "engine": engine,
        "questions": questions,
        "objective": objective,
        "commit": commit,
        "versions": versions,
    }


def write(file: Path, engine: str, questions: int, objective: str | None) -> None:
    """Ask, and write what was kept and answered."""
    start = time.monotonic()
    about = header(engine, questions, objective)
    cases = ENGINES[engine](questions, objective)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    file.write_text(f'{{"header": {json.dumps(about)},\n"cases": {{\n{lines}\n}}}}\n')
    answers = sum(len(case.get("answers", [])) for case in cases.values())
    kept = sum(len(case.get("kept", [])) for case in cases.values())
    print(f"{len(cases)} calls: {kept} kept sets, {answers} answers, {time.monotonic() - start:.0f} s")
    refused = Counter(
        f"{name.split(', batch ')[0]}, {name.split(', ', 2)[2].rsplit(', ', 1)[0]}: {case['refused']}"
        for name, case in cases.items()
        if "refused" in case
    )
    for what, times in refused.items():
        print(f"refused {times} times: {what}")


WHAT = {"kept": "kept sets", "answers": "answers", "numbers": "objectives and certificates"}
ROUNDING = 1.5e-6
"""Numbers are written with six digits after the point: a difference in the last is one of rounding."""


def differences(before: Mapping[str, Case], after: Mapping[str, Case]) -> tuple[Counter[str], dict[str, list[str]]]:
    """(how many were compared, a line for each that differs), by the names of `WHAT`.

    A call that only one side knows, or that only one side refused, differs in all that the other has of it.
    """
    compared: Counter[str] = Counter()
    found: dict[str, list[str]] = {what: [] for what in WHAT}
    entries = (("kept", "kept"), ("answers", "answers"), ("objective", "numbers"), ("certificate", "numbers"))
    for name in dict.fromkeys([*before, *after]):
        for entry, what in entries:
            old, new = (_values(cases.get(name, {}), entry) for cases in (before, after))
            for place, (was, now) in enumerate(zip_longest(old, new)):
                compared[what] += 1
                if was == now or (isinstance(was, float) and isinstance(now, float) and abs(was - now) <= ROUNDING):
                    continue
                found[what].append(f"{name}, {entry} {place}: {_change(was, now)}")
    return compared, found


def _values(case: Case, entry: str) -> list[Any]:
    """Per image or prompt; of a call that was refused, the error in place of what was kept."""
    return [case["refused"]] if entry == "kept" and "refused" in case else case.get(entry, [])


def _change(was: Any, now: Any) -> str:
    if isinstance(was, list) and isinstance(now, list) and max(len(was), len(now)) > 2 * TOKENS:
        gone, come = (list((Counter(a) - Counter(b)).elements()) for a, b in ((was, now), (now, was)))
        return f"{len(was)} -> {len(now)} tokens, gone {gone}, come {come}"
    return f"{was} -> {now}"


def compare(before: Path, after: Path, allowed: Sequence[str]) -> int:
    """Say what differs; 1 if anything does that is not allowed, 2 if the files do not compare."""
    one, two = (json.loads(file.read_text()) for file in (before, after))
    for entry in ("engine", "questions"):
        if one["header"][entry] != two["header"][entry]:
            print(f"{entry}: {one['header'][entry]} in {before}, {two['header'][entry]} in {after}; write one anew")
            return 2
    if not one["cases"] or not two["cases"]:
        print("there is nothing to compare; ask some questions")
        return 2
    for entry in ("commit", "objective", "versions"):
        if one["header"][entry] != two["header"][entry]:
            print(f"{entry}: {one['header'][entry]} -> {two['header'][entry]}")
    compared, found = differences(one["cases"], two["cases"])
    for what, label in WHAT.items():
        print(f"{len(found[what])} of {compared[what]} {label} differ")
    first_ones = [line for what in WHAT for line in found[what]][:10]
    for line in first_ones:
        print(f"  {line}")
    return int(any(lines and what not in allowed for what, lines in found.items()))


def _say(what: str, number: int, batches: Sequence[Any]) -> None:
    if (number + 1) % 20 == 0 or number + 1 == len(batches):
        print(f"{what}: {number + 1} of {len(batches)} batches", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whether two states of the code keep and answer the same.")
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="ask, and write what was kept and answered")
    writing.add_argument("file", type=Path)
    writing.add_argument("--engine", choices=ENGINES, default="transformers")
    writing.add_argument("--questions", type=int, default=500)
    writing.add_argument("--objective", help="of adafv, where a case names no other; default: the library's")
    comparing = commands.add_parser("compare", help="count what differs, and show the first ten")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument(
        "--allow", nargs="*", choices=WHAT, help="what may differ without a status of 1; nothing named: everything"
    )
    options = parser.parse_args(arguments)
    if options.command == "compare":
        allowed = [*WHAT] if options.allow == [] else options.allow or []
        return compare(options.before, options.after, allowed)
    write(options.file, options.engine, options.questions, options.objective)
    return 0


if __name__ == "__main__":
    sys.exit(main())
