"""Mistral Large 4: queries that grow with their position, and fewer keys than the prompt has."""

from typing import Any

import pytest
import torch
from models import make_inputs
from oracle import kept_logits, masked_inputs, same_logits

from adafv import AdaFV, compress

mistral_large4 = pytest.importorskip("rows.mistral_large4")
ROW = mistral_large4.ROW
pytestmark = pytest.mark.skipif(ROW is None, reason="this release of transformers lacks the class")
KEEP = 0.3


@pytest.fixture(scope="module")
def model() -> Any:
    return mistral_large4.build(scaled=True)


def test_positions_matter(model: Any) -> None:
    """Or the tests below could not fail."""
    inputs = make_inputs(ROW, model, [1])
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    with torch.no_grad():
        logits = [model(**inputs, position_ids=positions + offset).logits[:, -1] for offset in (0, 5)]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_generate(model: Any, positions: str, padding: str) -> None:
    images = [2, 1] if padding == "left" else [1]  # stock `generate` does not continue a batch padded on the right
    inputs = make_inputs(ROW, model, images, padding=padding)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with AdaFV(keep=KEEP, positions=positions)(model) as adafv:
        pruned = model.generate(**inputs, **options)
    oracle = masked_inputs(inputs, adafv.last.keep_mask, positions, ROW, model, generates=True)
    expected = model.generate(**oracle, **options)
    torch.testing.assert_close(torch.stack(pruned.logits), torch.stack(expected.logits), atol=2e-5, rtol=2e-5)


def test_forward_with_positions(model: Any) -> None:
    """Given positions that do not count the padding, as `generate` gives them."""
    inputs = make_inputs(ROW, model, [2, 1])
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), AdaFV(keep=KEEP)(model) as adafv:
        pruned = model(**inputs)
    oracle = masked_inputs(inputs, adafv.last.keep_mask, row=ROW, model=model)
    with torch.no_grad():
        expected = model(**oracle)
    for mine, theirs in zip(
        kept_logits(pruned.logits, oracle["attention_mask"]),
        kept_logits(expected.logits, oracle["attention_mask"]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def test_forward_counts_padding_as_the_stock_model_does(model: Any) -> None:
    """Without positions a prompt begins behind its padding: the pruned one where a prompt of its length would."""
    inputs = make_inputs(ROW, model, [2, 1])
    with torch.no_grad(), AdaFV(keep=KEEP)(model) as adafv:
        pruned = model(**inputs)
        short = compress(model, inputs, KEEP)
    assert short["attention_mask"][:, 0].tolist() == [1, 0]  # so the second prompt begins later
    oracle = masked_inputs(inputs, adafv.last.keep_mask, row=ROW, model=model)
    begin = short["attention_mask"].shape[1] - short["attention_mask"].sum(-1, keepdim=True)
    oracle["position_ids"] = oracle["position_ids"] + begin
    with torch.no_grad():
        expected = model(**oracle)
    for mine, theirs in zip(
        kept_logits(pruned.logits, oracle["attention_mask"]),
        kept_logits(expected.logits, oracle["attention_mask"]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("best", [8, 2048])
def test_number_of_keys(best: int) -> None:
    """Also where every query leaves most keys out, and where none is left out."""
    model = mistral_large4.build(best=best)
    inputs = make_inputs(ROW, model, [2])
    with torch.no_grad(), AdaFV(keep=KEEP)(model) as adafv:
        pruned = model(**inputs).logits
    oracle = masked_inputs(inputs, adafv.last.keep_mask, row=ROW, model=model)
    with torch.no_grad():
        expected = model(**oracle).logits
    same_logits(pruned, expected, inputs["attention_mask"], adafv.last.keep_mask)


def test_saliency_lines_up_with_the_stock_attention(model: Any) -> None:
    """Of an image alone, from the tower's own maps and values; see docs/saliency.md."""
    inputs = make_inputs(ROW, model, [1])
    [saliency] = compress(model, inputs, keep=3).record.saliency
    tower = model.model.vision_tower
    height, width = (int(size) // 14 for size in inputs["image_sizes"][0])
    implementation = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    caught: list[Any] = []
    layer = tower.transformer.layers[-1].attention
    hooks = [
        layer.register_forward_hook(lambda module, given, output: caught.append(output[1])),
        layer.v_proj.register_forward_hook(lambda module, given, output: caught.append(output)),
    ]
    with torch.no_grad():
        tower(inputs["pixel_values"], image_sizes=inputs["image_sizes"])
    for hook in hooks:
        hook.remove()
    tower.set_attn_implementation(implementation)
    values, maps = caught
    values = values.unflatten(-1, (tower.config.num_attention_heads, -1)).transpose(1, 2)
    differs = (values - values.mean(2, keepdim=True)).square().sum(-1)
    by_patch = (maps.mean(2) * differs).mean(1)[0]
    by_patch = by_patch / by_patch.sum()
    expected = torch.nn.functional.avg_pool2d(by_patch.view(1, 1, height, width), 2).flatten()
    torch.testing.assert_close(saliency / saliency.sum(), expected / expected.sum(), atol=1e-6, rtol=1e-4)
