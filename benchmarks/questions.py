"""Several questions about one picture: one by one, with the picture remembered, and in one batch; and what remembering costs.

    python -m benchmarks.questions --shape llava-1.5-7b --layers 8 --keep 58 --questions 8

The ways take turns, so that a busy machine is unfair to none of them; medians are printed. Weights are random: they take as
long as others. Where not all decoder layers are built, the share of the language model is scaled, and the output says so.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from adafv import AdaFV, ImageStore
from adafv.asking.padding import Prompt, in_one_batch
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.encoded import digest_of, encode_modality
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.remembered import encode_remembering
from adafv.evaluation.speed.shapes import Subject, subject

WAYS = ("one by one", "one by one, remembered", "one batch, remembered")


def prompts_of(found: Subject, questions: int) -> list[dict[str, Any]]:
    """One picture with questions of different words and lengths."""
    whole = found.inputs()
    ids, prompts = whole["input_ids"], []
    for number in range(questions):
        more = torch.randint(ids.shape[1] - 4, ids.shape[1], (number,), generator=torch.Generator().manual_seed(number))
        asked = torch.cat((ids, ids[:, more.to(ids.device)]), 1)
        prompts.append({**whole, "input_ids": asked, "attention_mask": torch.ones_like(asked)})
    return prompts


def clock() -> float:
    """Seconds. On a CPU those that this process had: others are at work there as well."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(run: Callable[[], Any]) -> float:
    start = clock()
    run()
    return clock() - start


def asked(found: Subject, prompts: list[dict[str, Any]], way: str, keep: int, tokens: int) -> dict[str, float]:
    """Seconds per stage of one way, all questions together."""
    store = None if way == WAYS[0] else ImageStore("1GB")
    batches = [in_one_batch([Prompt(each) for each in prompts], 0)] if way == WAYS[2] else prompts
    seconds: dict[str, float] = {}
    with AdaFV(keep=keep, remember=store)(found.model) as pruner:
        start, walls = clock(), time.perf_counter()
        for inputs in batches:
            found.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            for stage, taken in pruner.last.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + taken
        taken, walls = clock() - start, time.perf_counter() - walls
    # Stages are measured by the clock on the wall; what others took of it is taken off each alike.
    seconds = {stage: each * taken / walls for stage, each in seconds.items()}
    return seconds | {"all": taken, "whole shape": taken + seconds["model"] * (found.scale - 1)}


def cost_of_remembering(found: Subject, rounds: int) -> dict[str, float]:
    """Medians in milliseconds: the picture's hash, whether the model is still the same, the copy; beside the tower."""
    inputs, store = found.inputs(), ImageStore("1GB")
    taken: dict[str, list[float]] = {"hash": [], "same model": [], "known picture": [], "tower": []}
    family = family_of(found.model)
    layouts = family.layouts(found.model, "image", inputs, [])
    visuals = {name: value for name, value in inputs.items() if name in family.images}
    asked_for = (found.model, family, "image", visuals, layouts, frozenset({SALIENCY}))
    with torch.no_grad():
        encode_remembering(store, *asked_for)
        for _ in range(rounds):
            taken["hash"].append(timed(lambda: digest_of(inputs["pixel_values"])))
            taken["same model"].append(timed(lambda: store.version_of(found.model)))
            taken["known picture"].append(timed(lambda: encode_remembering(store, *asked_for)))
            taken["tower"].append(timed(lambda: encode_modality(*asked_for)))
    return {name: 1000 * statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, default=None, help="decoder layers to build; all that memory allows")
    parser.add_argument("--keep", type=int, default=58)
    parser.add_argument("--questions", type=int, default=8, help="0: what remembering costs, alone")
    parser.add_argument("--tokens", type=int, default=8, help="of every answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    found = subject(given.shape, given.device, given.dtype, layers=given.layers)
    prompts = prompts_of(found, given.questions)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(given.rounds + 1 if prompts else 0):
        for way in WAYS:
            seconds = asked(found, prompts, way, given.keep, given.tokens)
            if number:  # the first warms up
                runs[way].append(seconds)
            print(f"{way}: {seconds}", file=sys.stderr)
    medians = {
        way: {stage: round(statistics.median(each[stage] for each in rounds), 3) for stage in rounds[0]}
        for way, rounds in runs.items()
        if rounds
    }
    result = {**vars(given), "notes": found.notes, "threads": torch.get_num_threads(), "seconds": medians}
    result["milliseconds"] = {
        name: round(ms, 2) for name, ms in cost_of_remembering(found, 1 + 2 * given.rounds).items()
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
