"""Measuring one model: every way in turns, so that what slows the machine slows all of them.

A round runs each way once. Ratios are taken within a round; medians over the rounds are reported, with the smallest and the
largest. Counts come from one more run of each way, since they do not vary.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from adafv.engines.transformers.releases import returned_cache
from adafv.errors import AdaFVError, OptionError, UnsupportedModelError
from adafv.evaluation.speed.counting import Counting, Counts, counted_waits
from adafv.evaluation.speed.shapes import Subject
from adafv.evaluation.speed.stages import LAYERS, StageClock, Stages, listening
from adafv.evaluation.speed.ways import Way, again, ideal, listened_to, pruned, published, unpruned
from adafv.methods import Method

STAGES = ("tower", "projector", "scores", "selection", "compaction", "prefill", "rest")
"""Of a call, in order. "selection" has the scores of methods that do not tell them apart; "compaction" is reading the prompt
and writing the shorter one; "rest" is in none of them."""
FEWEST_ROUNDS = 3
DECODING_ROUNDS = 5
"""Rounds in which decoding is measured as well: a round has several tokens of it."""


@dataclass(frozen=True)
class Options:
    """How to measure."""

    budgets: Sequence[int | float | str] = ()
    """Empty: those of the shape."""
    methods: Sequence[str | Method] = ()
    """Beside AdaFV, at every budget."""
    batch: int = 1
    rounds: int = 10
    warm: int = 1
    """Runs of each way that are not counted, 1 or more; 2 more on CUDA."""
    decode: int = 8
    """Tokens that are decoded behind the first one; 0: none."""
    published: bool = True
    limit: float | None = None
    """Seconds of rounds after which no further one begins, if there were three."""


@dataclass
class _Runs:
    """What the rounds said of one way."""

    stages: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


@torch.no_grad()
def measure(subject: Subject, options: Options, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """All that is to be known of one model at one batch size, as `report.py` documents it.

    Args:
        progress: hears of what is done, one line at a time.

    Raises:
        OptionError: a number is not one that can be measured.
    """
    if min(options.batch, options.rounds) < 1 or options.decode < 0 or options.warm < 0:
        raise OptionError("batch and rounds are 1 or more, decode and warm 0 or more")
    started = time.monotonic()
    inputs = subject.inputs(options.batch)
    notes = list(subject.notes)
    with listened_to(subject):
        ways = _that_run(subject, _ways(subject, inputs, options, notes), options, notes)
        counted = {way.name + str(way.keep): _counted(subject, way, inputs, options) for way in ways}
        runs = [_Runs() for _ in ways]
        preparing: list[float] = []
        begun = time.monotonic()
        for number in range(options.rounds):
            late = options.limit is not None and time.monotonic() - begun > options.limit
            if late and number >= min(FEWEST_ROUNDS, options.rounds):
                notes.append(f"stopped after {number} of {options.rounds} rounds, for time")
                break
            progress(
                f"{subject.name}: round {number + 1} of {options.rounds}, {time.monotonic() - started:.0f} s so far"
            )
            gc.collect()
            preparing.append(_lap(subject.device, lambda: subject.moved(subject.prepare())))
            for way, found in zip(ways, runs, strict=True):
                stages = _stages_of(subject, way)
                found.stages.append(stages)
                found.seconds.append(sum(stages.values()))
                if way.generates and options.decode and number < DECODING_ROUNDS:
                    found.decode.append(_decoded(subject, way, inputs, options.decode))
    visual = _visual(subject, inputs)
    return {
        "name": subject.name,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "batch": options.batch,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "visual_tokens": visual,
        "layers": subject.layers,
        "layers_measured": subject.built,
        "whole": subject.whole,
        "weights_bytes": _bytes_of_weights(subject),
        "rounds": len(preparing),
        "preprocessing": spread(preparing),
        "ways": [
            _described(way, found, runs, ways, counted[way.name + str(way.keep)])
            for way, found in zip(ways, runs, strict=True)
        ],
        "notes": notes,
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest, and how many."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "count": len(values)}


def _visual(subject: Subject, inputs: dict[str, Any]) -> int:
    """Visual tokens of a prompt."""
    return int((inputs["input_ids"][0] == subject.model.config.image_token_id).sum())


def _ways(subject: Subject, inputs: dict[str, Any], options: Options, notes: list[str]) -> list[Way]:
    budgets = list(options.budgets) or list(subject.budgets)
    found = [unpruned(subject, inputs)]
    visual = _visual(subject, inputs)
    for keep in budgets:
        if keep == "all" or (isinstance(keep, int) and keep >= visual):
            notes.append(f"keep {keep} prunes nothing: the prompt has {visual} visual tokens; give fewer, or a share")
        found += [pruned(subject, inputs, keep, method) for method in ("adafv", *options.methods)]
        found += [ideal(subject, inputs, keep), again(subject, inputs, keep)]
        if options.published:
            try:
                found.append(published(subject, inputs, keep))
            except UnsupportedModelError as error:
                notes.append(str(error)) if str(error) not in notes else None
    return found


def _that_run(subject: Subject, ways: list[Way], options: Options, notes: list[str]) -> list[Way]:
    """Those that memory allows, warmed up."""
    able = []
    for way in ways:
        try:
            for _ in range(max(1, options.warm) + 2 * (subject.device.type == "cuda")):
                way.run()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            notes.append(f"{way.name} at {way.keep}: out of memory")
            continue
        except AdaFVError as error:
            notes.append(f"{way.name} at {way.keep}: {error}")
            continue
        able.append(way)
    return able


def _lap(device: torch.device, run: Callable[[], object]) -> float:
    _ready(device)
    start = time.perf_counter()
    run()
    _ready(device)
    return time.perf_counter() - start


def _ready(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _stages_of(subject: Subject, way: Way) -> dict[str, float]:
    _ready(subject.device)
    clock = StageClock(subject.device)
    with listening(clock):
        way.run()
    return _scaled(clock.seconds(), subject.scale)


def _scaled(seconds: dict[str, float], scale: float) -> dict[str, float]:
    """With the decoder layers that were not built, as part of the prefill."""
    found = dict(seconds)
    if LAYERS in found:
        found["prefill"] = found.get("prefill", 0.0) + scale * found.pop(LAYERS)
    return found


class _EveryToken(LogitsProcessor):
    """Calls back between the tokens of `generate`."""

    def __init__(self, heard: Callable[[], None]) -> None:
        self.heard = heard

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.heard()
        return scores


def _generate(subject: Subject, way: Way, inputs: dict[str, Any], tokens: int, heard: Callable[[], None]) -> None:
    with ExitStack() as stack:
        if way.handle is not None:
            stack.enter_context(way.handle)
        subject.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=tokens + 1,
            min_new_tokens=tokens + 1,
            logits_processor=LogitsProcessorList([_EveryToken(heard)]),
        )


def _decoded(subject: Subject, way: Way, inputs: dict[str, Any], tokens: int) -> float:
    """Seconds per token behind the first one."""
    _ready(subject.device)
    clock = StageClock(subject.device)
    places: list[int] = []

    def heard() -> None:
        clock.border()
        places.append(clock.marks - 1)

    with listening(clock):
        _generate(subject, way, inputs, tokens, heard)
    seconds = _scaled(clock.seconds(places[0], places[-1]), subject.scale)
    return sum(seconds.values()) / (len(places) - 1)


def _counted(subject: Subject, way: Way, inputs: dict[str, Any], options: Options) -> dict[str, Any]:
    """What does not vary: operations, arithmetic, bytes and waits per stage, memory, and the length of the cache."""
    device, stages = subject.device, Stages()
    gc.collect()
    count = Counting(stages, subject.device, subject.model)
    with listening(stages), count:
        output = way.run()
    cache = returned_cache(output)
    kept = _bytes_of_cache(cache) * subject.scale
    peak = count.living.peak
    del output, cache
    found: dict[str, Any] = {
        "stages": {name: asdict(counts) for name, counts in _scaled_counts(count.counts, subject.scale).items()},
        "kv_bytes": round(kept),
    }
    if device.type == "cuda":
        _ready(device)
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        waits: dict[str, int] = {}
        stages = Stages()
        with listening(stages), counted_waits(stages, waits):
            way.run()
        _ready(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        if LAYERS in waits:
            waits["prefill"] = waits.get("prefill", 0) + round(subject.scale * waits.pop(LAYERS))
        for name, stage in found["stages"].items():
            stage["waits"] = waits.pop(name, 0)
        for name, number in waits.items():
            found["stages"].setdefault(name, asdict(Counts()))["waits"] = number
    found["peak_bytes"] = peak
    if way.generates and options.decode:
        found["decode"] = asdict(_counted_decoding(subject, way, inputs))
    return found


def _scaled_counts(counts: dict[str, Counts], scale: float) -> dict[str, Counts]:
    found = dict(counts)
    if LAYERS in found:
        layers, prefill = found.pop(LAYERS), found.pop("prefill", Counts())
        summed: dict[str, Any] = {
            name: type(value)(round(value + scale * getattr(layers, name))) for name, value in asdict(prefill).items()
        }
        found["prefill"] = Counts(**summed)
    return found


def _counted_decoding(subject: Subject, way: Way, inputs: dict[str, Any]) -> Counts:
    """Of the second token behind the first one."""
    stages = Stages()
    count = Counting(stages, subject.device, subject.model)
    seen: list[Counts] = []

    def heard() -> None:
        seen.append(_summed(_scaled_counts(count.counts, subject.scale)))

    with listening(stages), count:
        _generate(subject, way, inputs, 2, heard)
    return Counts(**{name: getattr(seen[2], name) - value for name, value in asdict(seen[1]).items()})


def _summed(counts: dict[str, Counts]) -> Counts:
    return Counts(**{name: sum(getattr(each, name) for each in counts.values()) for name in asdict(Counts())})


def _bytes_of_cache(cache: Any) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in getattr(cache, "layers", [])
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    )


def _bytes_of_weights(subject: Subject) -> int:
    """Of the model as built."""
    return sum(each.numel() * each.element_size() for each in subject.model.parameters())


def _described(way: Way, found: _Runs, runs: list[_Runs], ways: list[Way], counted: dict[str, Any]) -> dict[str, Any]:
    stages = {
        name: {
            "seconds": spread([each.get(name, 0.0) for each in found.stages]),
            **counted["stages"].get(name, asdict(Counts())),
        }
        for name in STAGES
        if name in counted["stages"] or any(name in each for each in found.stages)
    }
    described: dict[str, Any] = {
        "name": way.name,
        "keep": way.keep,
        "first_token": spread(found.seconds),
        "each": found.seconds,
        "stages": stages,
        "peak_bytes": counted["peak_bytes"],
        "kv_bytes": counted["kv_bytes"],
        "total": {name: sum(stage[name] for stage in counted["stages"].values()) for name in asdict(Counts())},
    }
    for other, theirs in zip(ways, runs, strict=True):
        if other.name == "unpruned" and way is not other:
            described["to_unpruned"] = _ratio(found.seconds, theirs.seconds)
            if found.decode and theirs.decode:
                described["decode_to_unpruned"] = _ratio(found.decode, theirs.decode)
        if other.name == "ideal" and other.keep == way.keep and way.encodes and way is not other:
            described["to_ideal"] = _ratio(found.seconds, theirs.seconds)
    if found.decode:
        described["decode"] = {"seconds": spread(found.decode), **counted["decode"]}
    if way.handle is not None:
        described["visual_tokens_kept"] = way.handle.last.tokens_after[0]
    return described


def _ratio(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    return spread([one / two for one, two in zip(mine, theirs, strict=True)])
