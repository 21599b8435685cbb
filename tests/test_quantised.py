"""Quantised models, loaded as users load them: nothing of adafv touches a weight, so pruning must not notice.

Two expectations. The prompt shortened by hand, from features that the stock model made, is exact for every scheme, bit by
bit: pruning adds nothing of its own. The oracle of all other tests, the full prompt with the dropped tokens masked, is
exact only where a token's result hangs on that token alone:

- Weights alone (torchao int8, bitsandbytes nf4): it does; the oracle holds as in full precision.
- Activations too, a scale per token (torchao dynamic int8): it does, but rounding to int8 turns a difference in the last
  bit (masked tokens change the order of a sum) into one of a hundredth. The stock model is as sensitive to itself.
- LLM.int8 (bitsandbytes, `load_in_8bit`): it does not. A feature that is an outlier in any token of the batch is computed
  in 16 bits for all of them, so tokens that are masked, padding included, change what the others get. Pruned away, they
  do not. With `llm_int8_threshold=0.0` there are no outliers, and the oracle is exact again.
"""

import functools
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, FamilyRow, make_inputs
from oracle import kept_logits, masked_inputs
from shortened import shortened_by_hand
from test_wrapper import state
from torch import Tensor
from transformers import BitsAndBytesConfig, TorchAoConfig

from adafv import AdaFV, Pruner, compress

torchao = pytest.importorskip("torchao.quantization")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of every cast to float16, once a layer

KEEP = 0.3
GREEDY = {"max_new_tokens": 3, "do_sample": False}
NOT_THE_TOWER = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
ROWS = [row for row in FAMILIES if row.name in ("llava", "llava-next")]

SCHEMES: dict[str, Callable[[list[str] | None], Any]] = {
    "torchao-int8-weights": lambda skip: TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=skip),
    "torchao-int8-dynamic": lambda skip: TorchAoConfig(
        torchao.Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=skip
    ),
    "bitsandbytes-int8": lambda skip: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip),
    "bitsandbytes-int8-no-outliers": lambda skip: BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=skip
    ),
    "bitsandbytes-nf4": lambda skip: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip
    ),
}
schemes = pytest.mark.parametrize("scheme", SCHEMES)
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
towers = pytest.mark.parametrize("tower", ["whole", "without-the-tower"])


@functools.cache
def full_precision(name: str) -> Any:
    """Sizes that the kernels like: multiples of 64."""
    [row] = [row for row in ROWS if row.name == name]
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    return row.build(vision=dict(sizes), text=dict(sizes))


@functools.cache
def quantised(name: str, scheme: str, tower: str, dtype: torch.dtype = torch.float32) -> Any:
    plain = full_precision(name)
    skip = None if tower == "whole" else NOT_THE_TOWER
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        options = {"quantization_config": SCHEMES[scheme](skip), "dtype": dtype}
        return type(plain).from_pretrained(folder, **options).eval()


def quantised_layers(model: Any) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit")
        or (isinstance(module, torch.nn.Linear) and type(module.weight).__name__ == "Int8Tensor")
    }


def weights(model: Any) -> dict[str, Tensor]:
    """All parameters and buffers as plain tensors: a quantised weight is the numbers it is made of."""
    found = {}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
        parts = [part for part in parts if isinstance(getattr(value, part), Tensor)]
        found |= {f"{name}.{part}": getattr(value, part).clone() for part in parts} or {name: value.detach().clone()}
    return found


def worst(mine: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((one - two).abs().max()) for one, two in zip(mine, theirs, strict=True))


@pytest.mark.pairs
@rows
@schemes
@towers
def test_pruned_is_the_prompt_shortened_by_hand(row: FamilyRow, scheme: str, tower: str) -> None:
    model = quantised(row.name, scheme, tower)
    layers = quantised_layers(model)
    assert any("language_model" in name for name in layers)
    assert any("vision_tower" in name for name in layers) == (tower == "whole")
    inputs = make_inputs(row, full_precision(row.name), [1, 2])
    with torch.no_grad():
        stock = model(**inputs).logits
        before, was = weights(model), state(model)  # bitsandbytes moves its weights at the first run
        with AdaFV(keep=1.0)(model):
            assert torch.equal(model(**inputs).logits, stock)
        with AdaFV(keep=KEEP, logits="kept")(model) as adafv:
            logits, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
            saliency = adafv.last.saliency[0]
        assert state(model) == was
        assert weights(model).keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
        assert torch.equal(model(**inputs).logits, stock)
        by_hand = shortened_by_hand(model, inputs, adafv.last)
        assert torch.equal(model(**by_hand).logits, logits)
        expected = model.generate(**by_hand, **GREEDY)[:, by_hand["input_ids"].shape[1] :]
    assert torch.equal(tokens[:, inputs["input_ids"].shape[1] :], expected)
    assert saliency.nan_to_num().max() > 0


@pytest.mark.each
@rows
@schemes
def test_saliency_is_read_through_quantised_layers(row: FamilyRow, scheme: str) -> None:
    """The queries and keys of the tapped layer are those of the quantised projections."""
    model = quantised(row.name, scheme, "whole")
    inputs = make_inputs(row, full_precision(row.name), [1])
    tower = model.model.vision_tower
    pixels = inputs["pixel_values"].flatten(0, -4)
    with torch.no_grad():
        with Pruner("saliency", keep=KEEP)(model) as pruner:
            model(**inputs)
        tower.set_attn_implementation("eager")
        maps = tower(pixels, output_attentions=True).attentions
        tower.set_attn_implementation("sdpa")
    expected = maps[-2][:, :, 0, 1:].mean(1).flatten()  # hidden state -2 is the output of the last layer but one
    shown = pruner.last.layouts[0].shows_patch
    source = pruner.last.layouts[0].source[shown]
    # Eager attention sums in another order, and layers before the tapped one round that up to a step of int8.
    torch.testing.assert_close(pruner.last.saliency[0][shown], expected[source], atol=2e-3, rtol=5e-2)


@pytest.mark.pairs
@rows
@towers
@pytest.mark.parametrize(
    ("scheme", "dtype", "tolerance"),
    [
        ("torchao-int8-weights", torch.float32, 1e-5),
        ("bitsandbytes-nf4", torch.float32, 1e-5),
        # In float64 no sum comes close enough to the edge of a step of int8 for its order to matter.
        ("bitsandbytes-int8-no-outliers", torch.float64, 1e-12),
    ],
)
def test_oracle(row: FamilyRow, tower: str, scheme: str, dtype: torch.dtype, tolerance: float) -> None:
    model = quantised(row.name, scheme, tower, dtype)
    inputs = make_inputs(row, full_precision(row.name), [1, 2])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        call = compress(model, inputs, keep=KEEP)
        oracle = masked_inputs(inputs, call.record.keep_mask)
        mine = kept_logits(model(**call).logits, call["attention_mask"])
        theirs = kept_logits(model(**oracle).logits, oracle["attention_mask"])
    assert worst(mine, theirs) < tolerance


@pytest.mark.pairs
@rows
@towers
@pytest.mark.parametrize("scheme", ["torchao-int8-dynamic", "bitsandbytes-int8"])
def test_masked_tokens_change_less_than_quantising_does(row: FamilyRow, tower: str, scheme: str) -> None:
    """Where the oracle cannot be tight (see above), it is off by less than the scheme itself is from full precision."""
    plain, model = full_precision(row.name), quantised(row.name, scheme, tower)
    masked, quantising = 0.0, 0.0
    for seed in range(3):
        inputs = make_inputs(row, plain, [1, 2], seed=seed)
        with torch.no_grad():
            call = compress(model, inputs, keep=KEEP)
            oracle = masked_inputs(inputs, call.record.keep_mask)
            mine = kept_logits(model(**call).logits, call["attention_mask"])
            theirs = kept_logits(model(**oracle).logits, oracle["attention_mask"])
            exact = kept_logits(plain(**oracle).logits, oracle["attention_mask"])
        masked, quantising = max(masked, worst(mine, theirs)), max(quantising, worst(theirs, exact))
    assert masked < quantising


@rows
def test_dynamic_int8_is_as_sensitive_to_itself(row: FamilyRow) -> None:
    """A ten-millionth more or less in the pixels moves the stock model further than the mask does."""
    model = quantised(row.name, "torchao-int8-dynamic", "whole")
    inputs = make_inputs(row, full_precision(row.name), [1, 2])
    noise = 1 + 1e-7 * torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        call = compress(model, inputs, keep=KEEP)
        oracle = masked_inputs(inputs, call.record.keep_mask)
        attended = oracle["attention_mask"]
        mine = kept_logits(model(**call).logits, call["attention_mask"])
        theirs = kept_logits(model(**oracle).logits, attended)
        moved = kept_logits(model(**{**oracle, "pixel_values": inputs["pixel_values"] * noise}).logits, attended)
    assert 1e-4 < worst(mine, theirs) < 2 * worst(moved, theirs)


@rows
def test_outliers_of_masked_tokens_count_in_llm_int8(row: FamilyRow) -> None:
    """In float64, where rounding is no excuse, a masked token still changes the others; without a threshold it does not."""
    inputs = make_inputs(row, full_precision(row.name), [1, 2])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    found = {}
    for scheme in ("bitsandbytes-int8", "bitsandbytes-int8-no-outliers"):
        model = quantised(row.name, scheme, "without-the-tower", torch.float64)
        with torch.no_grad():
            call = compress(model, inputs, keep=KEEP)
            oracle = masked_inputs(inputs, call.record.keep_mask)
            by_hand = shortened_by_hand(model, inputs, call.record)
            short = kept_logits(model(**by_hand).logits, by_hand["attention_mask"])
            found[scheme] = worst(short, kept_logits(model(**oracle).logits, oracle["attention_mask"]))
    assert found["bitsandbytes-int8-no-outliers"] < 1e-12
    assert found["bitsandbytes-int8"] > 1e-4


@pytest.mark.each
@rows
@schemes
def test_saved_from_inside_the_block(row: FamilyRow, scheme: str, tmp_path: Path) -> None:
    """It loads as the stock class and answers as before.

    Saved before its first run: at it, bitsandbytes packs 4-bit weights anew for the CPU, and the stock model then saves
    them in that order, which loads as other weights (bitsandbytes#2078 is about the same order).
    """
    model = quantised.__wrapped__(row.name, scheme, "whole")
    inputs = make_inputs(row, full_precision(row.name), [1])
    with torch.no_grad(), AdaFV(keep=KEEP)(model):
        model.save_pretrained(tmp_path)
        expected = model(**inputs).logits
    again = type(full_precision(row.name)).from_pretrained(tmp_path).eval()
    assert type(again) is type(full_precision(row.name))
    with torch.no_grad(), AdaFV(keep=KEEP)(again):
        torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-5, equal_nan=True)
