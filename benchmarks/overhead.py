"""What pruning costs, what it leaves exact, and how good its selection is: `python -m benchmarks.overhead`.

Six sections, each a list of numbers; those with a target are gates, and the exit status is 1 if one fails.

    exactness  keep=all against the stock model (bit-equal), pruned logits against the stock model with the dropped
               placeholders masked, and the length of the KV cache; small float32 models, batches of two
    tower      the tower with the saliency read, without its dead last layer, against the stock tower; CLIP-L/14-336
    scoring    text attention, search and compaction against the pruned prefill, LLaVA-1.5-7B and LLaVA-NeXT-7B; the
               saliency is read inside the tower and paid for there
    whole      time to the first token, pruned against stock, LLaVA-1.5-7B
    again      the second question on a picture that is encoded, against prefill on its K tokens, LLaVA-1.5-7B
    search     how far the searches are from the best set: by certificate at N = 576, by brute force at N = 12

Why ratios. Seconds say more about the machine than about the code. Both sides of every ratio are measured in this one
run, in turns (A B A B ...), so what slows the machine slows both; a pair of neighbours gives one ratio, and the median
and quartiles over the pairs are printed. One thread by default, since a fixed number of threads is less noise.

How. The classes are those of transformers, the layer shapes those of the real models, the weights random; nothing is
downloaded. 32 layers of a 7B model do not fit beside everything else, so the language model is built with few layers
of that shape; each layer is timed inside every call, and the call is *scaled*: its seconds plus the mean layer's
seconds for each layer that is missing. The rows say so. In `scoring` the tower has two layers only: its time is in no
number there.

Real scores join the section `search` where ADAFV_TESTBED names a checkpoint and ADAFV_PHOTOS a folder of jpg files.
"""

import argparse
import copy
import gc
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.initialization import no_init_weights

from adafv import AdaFV, compress, encode
from adafv.core import geometric_mean, joint_search, split_search
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.releases import returned_cache
from adafv.engines.transformers.towers import TappedTower

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS, QUICK_ROUNDS = 15, 3
SEED = 0
FEATURE_LAYER = -2


@dataclass(frozen=True)
class Shapes:
    """Shapes of the measured models: CLIP-L/14-336 and Vicuna-7B, unless told otherwise."""

    tower_width: int = 1024
    tower_inner: int = 4096
    tower_heads: int = 16
    tower_layers: int = 24
    side: int = 336
    patch: int = 14
    width: int = 4096
    inner: int = 11008
    heads: int = 32
    layers: int = 32
    """Layers of the language model that times are scaled to ..."""
    built_layers: int = 2
    """... and layers that are built and measured."""
    vocabulary: int = 32064
    text: int = 60
    """Text tokens of the prompt."""
    keep: int = 58
    next_keep: int = 144

    @property
    def image_token(self) -> int:
        return self.vocabulary - 1

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2


@dataclass(frozen=True)
class Options:
    """How to measure."""

    rounds: int = ROUNDS
    dtype: str = "bfloat16"
    quick: bool = False
    shapes: Shapes = Shapes()

    @property
    def cases(self) -> int:
        """Random score pairs per budget in `search`."""
        return 50 if self.quick else 300


@dataclass(frozen=True)
class Row:
    """One number."""

    name: str
    value: float
    unit: str = ""
    """"x" for a ratio, "%" for percent, else a plain number."""
    spread: tuple[float, float] | None = None
    """Lower and upper quartile of what `value` is the median of."""
    pairs: int | None = None
    """Number of pairs, or cases, behind the value."""
    target: str = ""
    passed: bool | None = None
    """None where there is no target."""


def gate(name: str, value: float, relation: str, limit: float, unit: str = "", **rest: Any) -> Row:
    """A row with a target; `relation` is "<=", "<", ">=" or "==". NaN fails."""
    passed = {"<=": value <= limit, "<": value < limit, ">=": value >= limit, "==": value == limit}[relation]
    suffix = " %" if unit == "%" else ""
    return Row(name, value, unit, target=f"{relation} {limit:g}{suffix}", passed=bool(passed), **rest)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """`spread` and `pairs` of a row."""
    ordered = torch.tensor(values, dtype=torch.float64)
    low, high = torch.quantile(ordered, torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    return {"spread": (low, high), "pairs": len(values)}


def over_pairs(
    name: str, above: Sequence[float], below: Sequence[float], unit: str = "x", at_most: float | None = None
) -> Row:
    """Median and quartiles of above / below, pair by pair."""
    factor = 100.0 if unit == "%" else 1.0
    ratios = [factor * a / b for a, b in zip(above, below, strict=True)]
    median = statistics.median(ratios)
    if at_most is None:
        return Row(name, median, unit, **spread(ratios))
    return gate(name, median, "<=", at_most, unit, **spread(ratios))


class Lap(NamedTuple):
    """One run, measured."""

    wall: float
    cpu: float
    """Seconds of processor time, all threads together."""


def lap(run: Callable[[], object]) -> Lap:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Lap(time.perf_counter() - wall, time.process_time() - cpu)


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[Lap]]:
    """Every run `rounds` times, in turns, after one run of each that is not counted."""
    for run in runs.values():
        run()
    laps: dict[str, list[Lap]] = {name: [] for name in runs}
    for _ in range(rounds):
        gc.collect()
        for name, run in runs.items():
            laps[name].append(lap(run))
    return laps


# Exactness ------------------------------------------------------------------------------------------------------------

_PAD, _BEGIN, _END, _IMAGE, _VOCABULARY = 0, 1, 2, 119, 120
_SIDE, _PATCH = 56, 14
KEEP_SMALL = 5


@torch.no_grad()
def exactness(options: Options) -> list[Row]:
    """Pruning against what it must equal, on small models of both families."""
    rows = []
    for family, sizes in {
        "LLaVA": [(_SIDE, _SIDE)] * 2,
        "LLaVA-NeXT": [(90, 100)] * 2,
        "LLaVA-NeXT, two image sizes": [(90, 100), (56, 130)],
    }.items():
        model = _small_model(anyres="NeXT" in family)
        inputs = _small_inputs(model, sizes)
        stock = model(**inputs).logits
        with AdaFV(keep=1.0)(model):
            everything = model(**inputs).logits
        same_shape = everything.shape == stock.shape
        difference = float((everything - stock).abs().max()) if same_shape else math.inf
        rows.append(gate(f"{family}: keep=all, max |logits - stock|", difference, "==", 0))

        with AdaFV(keep=KEEP_SMALL)(model) as adafv:
            pruned = model(**inputs)
        record = adafv.last
        assert record is not None
        expected = model(**_masked(inputs, record.keep_mask))
        difference = _logit_difference(pruned.logits, expected.logits, inputs["attention_mask"] * record.keep_mask)
        rows.append(gate(f"{family}: K={KEEP_SMALL}, max |logits - oracle|", difference, "<=", 1e-5))
        # Were the models blind to their images, the gate above could not fail.
        unpruned = float((pruned.logits[:, -1] - stock[:, -1]).abs().max())
        rows.append(gate("  max |last logits - unpruned|, which must be large", unpruned, ">=", 1e-2))
        if sizes[0] == sizes[1]:
            dropped = record.tokens_before[0] - record.tokens_after[0]
            name = f"{family}: KV length, prompt {inputs['input_ids'].shape[1]} - (N - K) {dropped}"
            length = returned_cache(pruned).get_seq_length()
            rows.append(gate(name, length, "==", inputs["input_ids"].shape[1] - dropped))
    return rows


def _masked(inputs: dict[str, Any], keep_mask: Tensor) -> dict[str, Any]:
    """The oracle: inputs under which the stock model sees exactly the kept tokens, at their new positions."""
    mask = inputs["attention_mask"] * keep_mask
    return {**inputs, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


def _logit_difference(pruned: Tensor, expected: Tensor, mask: Tensor) -> float:
    """Largest difference over the attended tokens; prompts are padded on the left."""
    worst = 0.0
    for mine, theirs, attended in zip(pruned, expected, mask.bool(), strict=True):
        count = int(attended.sum())
        worst = max(worst, float((mine[len(mine) - count :] - theirs[attended]).abs().max()))
    return worst


def _small_model(anyres: bool) -> Any:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=_SIDE,
        patch_size=_PATCH,
    )
    text = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=_PAD,
        bos_token_id=_BEGIN,
        eos_token_id=_END,
    )
    shared = {"vision_config": vision, "text_config": text, "image_token_id": _IMAGE}
    if anyres:
        pinpoints = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]]
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=pinpoints, **shared))
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**shared))
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():  # lively weights: every visual token matters to the logits
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            noise = (1.0 if name.endswith("weight") else 0.0) + 0.1 * noise
        elif "embed_tokens" not in name and "position" not in name:
            noise = noise * parameter[0].numel() ** -0.5
        parameter.copy_(noise)
    return model.eval()


def _small_inputs(model: Any, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """One prompt per image, of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(SEED)
    images: dict[str, Any] = {"pixel_values": torch.randn(len(sizes), 3, _SIDE, _SIDE, generator=generator)}
    if isinstance(model, LlavaNextForConditionalGeneration):
        images = _anyres_images(model, sizes, generator)
    lengths = [len(features) for features in model.get_image_features(**images).pooler_output]
    prompts = []
    for number, length in enumerate(lengths):
        words = torch.randint(3, _VOCABULARY - 1, (9 + 3 * number,), generator=generator).tolist()
        prompts.append([_BEGIN, *words[:3], *[_IMAGE] * length, *words[3:]])
    longest = max(map(len, prompts))
    ids = torch.tensor([[_PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask, **images}


def _anyres_images(model: Any, sizes: list[tuple[int, int]], generator: torch.Generator) -> dict[str, Any]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = model.config.vision_config.image_size
    crops = [image_size_to_num_patches(size, model.config.image_grid_pinpoints, side) for size in sizes]
    pixels = torch.zeros(len(sizes), max(crops), 3, side, side)
    for image, count in zip(pixels, crops, strict=True):
        image[:count] = torch.randn(count, 3, side, side, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


# Models at real layer shapes ------------------------------------------------------------------------------------------


def build(shapes: Shapes, dtype: str, tower_layers: int, anyres: bool = False) -> Any:
    """A stock model at `shapes` with random weights."""
    vision = CLIPVisionConfig(
        hidden_size=shapes.tower_width,
        intermediate_size=shapes.tower_inner,
        num_hidden_layers=tower_layers,
        num_attention_heads=shapes.tower_heads,
        image_size=shapes.side,
        patch_size=shapes.patch,
    )
    text = LlamaConfig(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.width,
        intermediate_size=shapes.inner,
        num_hidden_layers=shapes.built_layers,
        num_attention_heads=shapes.heads,
        max_position_embeddings=4096,
    )
    shared = {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": shapes.image_token,
        "vision_feature_layer": FEATURE_LAYER,
        "image_seq_length": shapes.patches,
    }
    with no_init_weights():
        if anyres:
            side = shapes.side
            pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
            config = LlavaNextConfig(image_grid_pinpoints=pinpoints, **shared)
            model = LlavaNextForConditionalGeneration._from_config(config, dtype=DTYPES[dtype])
        else:
            model = LlavaForConditionalGeneration._from_config(LlavaConfig(**shared), dtype=DTYPES[dtype])
    fill_weights(model)
    return model.eval()


@torch.no_grad()
def fill_weights(model: Any) -> None:
    """Random weights in a fraction of the time of `normal_`: one block of noise, over and over."""
    noise = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(SEED))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
            continue
        flat, block = parameter.view(-1), noise.to(parameter.dtype)
        for start in range(0, flat.numel(), block.numel()):
            part = flat[start : start + block.numel()]
            part.copy_(block[: part.numel()])


def prompt_inputs(model: Any, shapes: Shapes, anyres: bool = False) -> dict[str, Any]:
    """One image in one prompt, for one prefill up to the first token."""
    generator = torch.Generator().manual_seed(SEED)
    if anyres:
        images = _anyres_images(model, [(2 * shapes.side, 2 * shapes.side)], generator)
        crops, edge = 5, 2 * (shapes.side // shapes.patch)
        visual = shapes.patches * crops + edge  # every row of the 2 x 2 raster ends with a newline token
    else:
        images = {"pixel_values": torch.randn(1, 3, shapes.side, shapes.side, generator=generator)}
        visual = shapes.patches
    images["pixel_values"] = images["pixel_values"].to(model.dtype)
    words = torch.randint(3, shapes.image_token, (shapes.text,), generator=generator)
    half = shapes.text // 2
    ids = torch.cat((words[:half], torch.full((visual,), shapes.image_token), words[half:])).unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1, **images}


class LayerClock:
    """Times every layer of a language model, to scale a call to a model with more layers of the same shape."""

    def __init__(self, model: Any, layers: int) -> None:
        self.layers = layers
        self._seconds: list[float] = []
        self._started = 0.0
        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(self._start)
            layer.register_forward_hook(self._stop)
        self._built = len(model.model.language_model.layers)

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self._seconds.append(time.perf_counter() - self._started)

    def scaled(self, seconds: float) -> float:
        """Seconds of the last call, had the model all its layers."""
        last = self._seconds[-self._built :]
        return seconds + (self.layers - self._built) * statistics.fmean(last)


# Tower ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def tower(options: Options) -> list[Row]:
    """The tower with the saliency read, against the stock tower as the stock model runs it."""
    shapes = replace(options.shapes, built_layers=1, width=64, inner=64, heads=1, vocabulary=64)
    model = build(shapes, options.dtype, shapes.tower_layers)
    stock = model.model.vision_tower
    pixel_values = prompt_inputs(model, shapes)["pixel_values"]
    arguments = stock_tower_arguments(model, pixel_values)
    eager = _eager_twin(stock)

    def run_stock() -> Any:
        return stock(pixel_values, **arguments)

    def run_tapped() -> Any:
        return TappedTower(stock, FEATURE_LAYER, {SALIENCY})(pixel_values)

    def run_plain() -> Any:
        return TappedTower(stock, FEATURE_LAYER, ())(pixel_values)

    def run_eager() -> Any:
        return eager(pixel_values, **{**arguments, "output_attentions": True})

    with counted_sdpa() as calls:
        tapped_states = run_tapped().hidden_states
    expected = run_stock().hidden_states
    difference = float((tapped_states[FEATURE_LAYER] - expected[FEATURE_LAYER]).abs().max())
    with counted_sdpa() as stock_calls:
        run_stock()

    runs = {"stock": run_stock, "tapped": run_tapped, "plain": run_plain, "eager": run_eager}
    laps = interleaved(runs, options.rounds)
    wall = {name: [one.wall for one in some] for name, some in laps.items()}
    cpu = {name: [one.cpu for one in some] for name, some in laps.items()}
    read = shapes.tower_layers + 1 + FEATURE_LAYER
    return [
        gate(f"max |hidden state {FEATURE_LAYER} - stock|", difference, "==", 0),
        gate(f"SDPA calls (stock: {len(stock_calls)}; the last layer is dead)", len(calls), "==", read),
        over_pairs("tapped tower / stock tower", wall["tapped"], wall["stock"], at_most=0.97),
        over_pairs("  the same in processor time", cpu["tapped"], cpu["stock"]),
        over_pairs("  the saliency alone: tapped with / without", wall["tapped"], wall["plain"]),
        over_pairs("alternative, eager + output_attentions / stock tower", wall["eager"], wall["stock"]),
        Row("stock tower, seconds", statistics.median(wall["stock"]), "s", **spread(wall["stock"])),
    ]


def stock_tower_arguments(model: Any, pixel_values: Tensor) -> dict[str, Any]:
    """What this release of transformers passes to the tower beside the pixels."""
    seen: dict[str, Any] = {}

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = model.model.vision_tower.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        model.model.get_image_features(
            pixel_values=pixel_values,
            vision_feature_layer=FEATURE_LAYER,
            vision_feature_select_strategy="default",
            return_dict=True,
        )
    finally:
        handle.remove()
    seen.pop("pixel_values", None)
    return seen


@contextmanager
def counted_sdpa() -> Iterator[list[None]]:
    """One entry per call of scaled_dot_product_attention inside the block."""
    functional = torch.nn.functional
    calls: list[None] = []
    original = functional.scaled_dot_product_attention

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    functional.scaled_dot_product_attention = counting
    try:
        yield calls
    finally:
        functional.scaled_dot_product_attention = original


def _eager_twin(stock: Any) -> Any:
    """The same tower, weights shared, with eager attention."""
    config = copy.deepcopy(stock.config)
    config._attn_implementation = "eager"
    with no_init_weights():
        eager = CLIPVisionModel._from_config(config, dtype=stock.dtype)
    eager.load_state_dict(stock.state_dict(), assign=True)
    return eager.eval()


# Text attention, search, compaction -----------------------------------------------------------------------------------


@torch.no_grad()
def scoring(options: Options) -> list[Row]:
    """Text attention, search and compaction against the pruned prefill, as the library itself times them."""
    shapes = options.shapes
    rows = []
    for name, anyres, keep, limit in (
        ("LLaVA-1.5-7B", False, shapes.keep, 1.0),
        ("LLaVA-NeXT-7B", True, shapes.next_keep, None),
    ):
        model = build(shapes, options.dtype, tower_layers=2, anyres=anyres)
        inputs = prompt_inputs(model, shapes, anyres)
        clock = LayerClock(model, shapes.layers)
        parts: dict[str, list[float]] = {part: [] for part in ("selection", "compaction", "both", "rest", "prefill")}
        tokens = 0
        for number in range(options.rounds + 1):
            gc.collect()
            start = time.perf_counter()
            with AdaFV(keep=keep)(model) as adafv:
                model(**inputs)
            whole = time.perf_counter() - start
            seconds, tokens = adafv.last.seconds, adafv.last.tokens_before[0]
            if number == 0:
                continue
            both = seconds["selection"] + seconds["compaction"]
            parts["selection"].append(seconds["selection"])
            parts["compaction"].append(seconds["compaction"])
            parts["both"].append(both)
            parts["rest"].append(whole - sum(seconds.values()))
            parts["prefill"].append(clock.scaled(seconds["model"]))
        prefill = parts["prefill"]
        label = f"{name}, N={tokens}, K={keep}: "
        rows += [
            over_pairs(f"{label}selection + compaction / prefill", parts["both"], prefill, "%", limit),
            over_pairs("  selection (text attention and search)", parts["selection"], prefill, "%"),
            over_pairs("  compaction (and layout)", parts["compaction"], prefill, "%"),
            over_pairs("  in no stage: wrapping, text, record", parts["rest"], prefill, "%"),
            Row("  selection + compaction, milliseconds", 1e3 * statistics.median(parts["both"]), "ms"),
            Row(f"  prefill, scaled {shapes.built_layers} -> {shapes.layers} layers", statistics.median(prefill), "s"),
        ]
        del model, clock
        gc.collect()
    return rows


# The whole call -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def whole(options: Options) -> list[Row]:
    """Time to the first token: real tower, projector and few layers, plus the layers that are missing."""
    shapes = options.shapes
    model = build(shapes, options.dtype, shapes.tower_layers)
    inputs = prompt_inputs(model, shapes)
    clock = LayerClock(model, shapes.layers)
    pruned, stock, tower_share = [], [], []
    for number in range(options.rounds + 1):
        gc.collect()
        stock_seconds = clock.scaled(lap(lambda: model(**inputs)).wall)
        start = time.perf_counter()
        with AdaFV(keep=shapes.keep)(model) as adafv:
            model(**inputs)
        pruned_seconds = clock.scaled(time.perf_counter() - start)
        if number:
            stock.append(stock_seconds)
            pruned.append(pruned_seconds)
            tower_share.append(adafv.last.seconds["tower"])
    composed = f"composed, {shapes.built_layers} of {shapes.layers} layers measured"
    label = f"LLaVA-1.5-7B, N={shapes.patches}, K={shapes.keep}, {shapes.text} text tokens: "
    return [
        over_pairs(f"{label}first token, pruned / stock ({composed})", pruned, stock),
        over_pairs("  of the pruned time: tower and projector", tower_share, pruned, "%"),
        Row("  stock, composed", statistics.median(stock), "s"),
        Row("  pruned, composed", statistics.median(pruned), "s"),
    ]


@torch.no_grad()
def again(options: Options) -> list[Row]:
    """The second question on a picture that is encoded, against the stock model on its K tokens, plus the selection."""
    shapes = options.shapes
    model = build(shapes, options.dtype, tower_layers=2)
    inputs = prompt_inputs(model, shapes)
    encoded = encode(model, inputs)
    asked = {name: value for name, value in inputs.items() if name != "pixel_values"} | {"images": encoded}
    ready = compress(model, asked, shapes.keep)
    clock = LayerClock(model, shapes.layers)
    second, ideal = [], []
    for number in range(options.rounds + 1):
        gc.collect()
        prefill = clock.scaled(lap(lambda: model(**ready)).wall)
        start = time.perf_counter()
        with AdaFV(keep=shapes.keep)(model) as adafv:
            model(**asked)
        seconds = clock.scaled(time.perf_counter() - start)
        if number:
            second.append(seconds)
            ideal.append(prefill + adafv.last.seconds["selection"])
    label = f"LLaVA-1.5-7B, K={shapes.keep}, {shapes.text} text tokens: "
    return [
        over_pairs(f"{label}second question / (prefill on K tokens + scores and search)", second, ideal, "x", 1.05),
        Row(
            f"  second question, scaled {shapes.built_layers} -> {shapes.layers} layers", statistics.median(second), "s"
        ),
    ]


# Quality of the search ------------------------------------------------------------------------------------------------

BUDGETS = (29, 58, 144)
BUDGETS_OF = 576


def search(options: Options) -> list[Row]:
    """How far the searches are from the best set of tokens."""
    scores = heavy_tailed(options.cases, BUDGETS_OF)
    rows = _search_rows("synthetic", [scores], options.cases)
    rows += _brute_force_rows(*heavy_tailed(200, 12), keep=4)
    checkpoint, photos = os.environ.get("ADAFV_TESTBED"), os.environ.get("ADAFV_PHOTOS")
    if checkpoint and photos:
        real = _real_scores(checkpoint, Path(photos), limit=8 if options.quick else 64)
        rows += _search_rows(f"real ({Path(checkpoint).name})", real, len(real))
    return rows


def heavy_tailed(cases: int, tokens: int) -> tuple[Tensor, Tensor]:
    """t and s, [cases, tokens]: log-normal, normalised; independent, related and closely related by turns."""
    generator = torch.Generator().manual_seed(SEED)
    first, second = torch.randn(2, cases, tokens, generator=generator)
    related = torch.tensor([0.0, 0.5, 0.9]).repeat(cases // 3 + 1)[:cases].unsqueeze(-1)
    second = related * first + (1 - related.square()).sqrt() * second
    return (2 * first).softmax(-1), (2 * second).softmax(-1)


def _search_rows(name: str, scores: list[tuple[Tensor, Tensor]], cases: int) -> list[Row]:
    """Rows per budget; `scores` are batches [cases, N], and budgets shares where N is not 576."""
    rows = []
    for budget in BUDGETS:
        certificates, ratios = [], []
        for text_attention, saliency in scores:
            keep = max(1, round(budget * text_attention.shape[-1] / BUDGETS_OF))
            joint = joint_search(text_attention, saliency, keep)
            split = split_search(text_attention, saliency, keep)
            certificates += (100 * joint.certificate).tolist()
            ratios += (split.objective / joint.objective).tolist()
        label = f"{name}, K={budget}" if scores[0][0].shape[-1] == BUDGETS_OF else f"{name}, K={budget}/{BUDGETS_OF} N"
        median = statistics.median(certificates)
        p95 = float(torch.quantile(torch.tensor(certificates), 0.95))
        at_least = 100 * sum(ratio <= 1.0 + 1e-6 for ratio in ratios) / len(ratios)
        rows += [
            gate(f"{label}: certificate of joint", median, "<", 1.0, "%", **spread(certificates)),
            Row("  its 95th percentile", p95, "%"),
            gate("  cases where joint >= split", at_least, "==", 100.0, "%", pairs=cases),
            Row("  split / joint, mean", statistics.fmean(ratios), "x", **spread(ratios)),
        ]
    return rows


def _brute_force_rows(text_attention: Tensor, saliency: Tensor, keep: int) -> list[Row]:
    """Both searches against the best of all sets of `keep` tokens."""
    cases, tokens = text_attention.shape
    subsets = torch.tensor(list(itertools.combinations(range(tokens), keep)))
    each = subsets.flatten().expand(cases, -1)
    masses = [scores.gather(1, each).view(cases, *subsets.shape).sum(-1) for scores in (text_attention, saliency)]
    optimum = (masses[0] * masses[1]).sqrt().amax(-1)
    rows = []
    for name, found in (
        ("joint", joint_search(text_attention, saliency, keep)),
        ("split", split_search(text_attention, saliency, keep)),
    ):
        ratios = (geometric_mean(text_attention, saliency, found.indices) / optimum).tolist()
        label = f"brute force, N={tokens}, K={keep}: {name} / optimum"
        violated = int((optimum * (1 - found.certificate) > found.objective * (1 + 1e-5)).sum())
        rows += [
            Row(f"{label}, mean", statistics.fmean(ratios), "x", pairs=cases),
            Row("  worst", min(ratios), "x"),
            gate(f"  cases that violate the certificate of {name}", violated, "==", 0, pairs=cases),
        ]
    return rows


def _real_scores(checkpoint: str, photos: Path, limit: int) -> list[tuple[Tensor, Tensor]]:
    """t and s of real photographs under a real checkpoint, [1, N] each, without tokens that show no patch."""
    from PIL import Image

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=False).eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    questions = ("Is there a person in the image?", "What colour is the largest object?", "Describe the image briefly.")
    found = []
    for number, path in enumerate(sorted(photos.glob("*.jpg"))[:limit]):
        question = questions[number % len(questions)]
        prompt = f"USER: {processor.image_token}\n{question} ASSISTANT:"
        if getattr(processor, "chat_template", None):
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        with Image.open(path) as photo:
            inputs = processor(images=photo.convert("RGB"), text=prompt, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        record = compress(model, inputs, keep=0.1).record
        assert record is not None
        text_attention, saliency = record.text_attention[0], record.saliency[0]
        assert text_attention is not None
        assert saliency is not None
        shown = ~text_attention.isnan()
        found.append((text_attention[shown].unsqueeze(0), saliency[shown].unsqueeze(0)))
    if not found:
        raise SystemExit(f"ADAFV_PHOTOS={photos} holds no jpg files")
    return found


# Command line ---------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Options], list[Row]]] = {
    "exactness": exactness,
    "tower": tower,
    "scoring": scoring,
    "whole": whole,
    "again": again,
    "search": search,
}


def header(options: Options, threads: int) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "load average": round(os.getloadavg()[0], 2),
        "threads": threads,
        "dtype": f"{options.dtype} (exactness, scores and searches: float32)",
        "pairs": f"{options.rounds} per ratio, after one that is not counted",
        "quick": options.quick,
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_rows(console: Console, section: str, rows: list[Row], seconds: float) -> None:
    table = Table(title=f"{section} ({seconds:.0f} s)", title_justify="left", title_style="bold")
    table.add_column("number", overflow="fold")
    for column in ("value", "quartiles", "pairs", "target"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("gate", no_wrap=True)
    for row in rows:
        quartiles = "" if row.spread is None else " .. ".join(_shown(value, row.unit) for value in row.spread)
        verdict = "" if row.passed is None else "[green]PASS[/]" if row.passed else "[bold red]FAIL[/]"
        pairs = "" if row.pairs is None else str(row.pairs)
        table.add_row(row.name.replace("[", r"\["), _shown(row.value, row.unit), quartiles, pairs, row.target, verdict)
    console.print(table)


def _shown(value: float, unit: str) -> str:
    if unit == "x":
        return f"{value:.4f}"
    if unit == "%":
        return f"{value:.3f} %" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e} %"
    if unit:
        return f"{value:.3g} {unit}"
    return f"{value:g}" if value == int(value) else f"{value:.2e}"


def exit_status(rows: list[Row]) -> int:
    """1 if a gate failed."""
    return int(any(row.passed is False for row in rows))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds and fewer cases")
    parser.add_argument("--rounds", type=int, help=f"pairs per ratio (default: {ROUNDS})")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1, for little noise)")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="bfloat16",
        help="of the timed models (default: bfloat16, five times as fast as float32 where there is AVX512-BF16)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there too")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="a section; may be repeated")
    parser.add_argument("--no-gate", action="store_true", help="exit with 0 even if a gate fails")
    arguments = parser.parse_args(argv)
    if arguments.rounds is None:
        arguments.rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--rounds and --threads must be 1 or more")
    return arguments


def main(argv: Sequence[str] | None = None, shapes: Shapes | None = None) -> int:
    arguments = _arguments(argv)
    options = Options(arguments.rounds, arguments.dtype, arguments.quick, shapes or Shapes())
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    given_threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        facts = header(options, arguments.threads)
        console.print("\n".join(f"{name}: {value}" for name, value in facts.items()), markup=False)
        found: dict[str, list[Row]] = {}
        for name in arguments.only or SECTIONS:
            start = time.perf_counter()
            found[name] = SECTIONS[name](options)
            print_rows(console, name, found[name], time.perf_counter() - start)
    finally:
        torch.set_num_threads(given_threads)
    rows = [row for section in found.values() for row in section]
    failed = sum(row.passed is False for row in rows)
    console.print(f"{sum(row.passed is not None for row in rows)} gates, {failed} failed")
    if arguments.json is not None:
        sections = {name: [asdict(row) for row in section] for name, section in found.items()}
        arguments.json.write_text(json.dumps({"header": facts, "sections": sections}, indent=2) + "\n")
    return 0 if arguments.no_gate else exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
