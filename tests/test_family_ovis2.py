"""Ovis2: the saliency goes through the model's own squares, tiles make images, and what is refused."""

from typing import Any

import pytest
import torch
from models import PATCH, SIDE, make_inputs
from rows.ovis2 import ROW, build, grid
from torch import Tensor

from adafv import AdaFV
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers import towers
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.reading import read_prompt
from adafv.errors import PromptError, UnsupportedCallError, UnsupportedModelError


def layouts_for(model: Any, inputs: dict[str, Any]) -> list[Any]:
    family = family_of(model)
    return family.layouts(model, "image", inputs, read_prompt(model, family, inputs).runs("image"))


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_saliency_is_joined_as_the_tokens_are(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(vision={"hidden_stride": stride})

    def received(query: Tensor, key: Tensor, value: Tensor, features: Tensor, scaling: float, mask: Any) -> Tensor:
        return (query @ key.transpose(-1, -2) * scaling).softmax(-1).mean(1).mean(1)

    monkeypatch.setattr(towers, "patch_score", received)
    inputs = make_inputs(ROW, model, [2])
    layouts = layouts_for(model, inputs)
    tower = model.model.vision_tower
    with torch.no_grad():
        encoded = family_of(model).encode(
            model, "image", {"pixel_values": inputs["pixel_values"]}, layouts, frozenset({SALIENCY})
        )
        stock = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        tower.set_attn_implementation("eager")
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions[-1]
    assert torch.equal(torch.cat(encoded.features), stock.flatten(0, 1))
    heard = maps.mean(1).mean(1).view(-1, SIDE // PATCH, SIDE // PATCH)
    expected = torch.stack(
        [part.flatten(1).mean(-1) for band in heard.split(stride, dim=1) for part in band.split(stride, dim=2)],
        dim=-1,
    )
    torch.testing.assert_close(torch.cat(encoded.saliency), expected.flatten(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("tile", "row", "column"), [(0, 0, 3), (-1, 2, 1)])
def test_a_patch_changes_the_token_that_the_layout_names(tile: int, row: int, column: int) -> None:
    """Without attention a tower's patches do not mix, so one patch changes one token."""
    model = build()
    with torch.no_grad():
        for layer in model.model.vision_tower.transformer.encoder.layers:
            layer.attention.out_proj.weight.zero_()
    inputs = make_inputs(ROW, model, [1])
    other = inputs["pixel_values"].clone()
    other[tile, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 1
    family = family_of(model)
    [layout] = layouts_for(model, inputs)
    features = [
        family.encode(model, "image", {"pixel_values": pixels}, [layout], signals=frozenset()).features[0]
        for pixels in (inputs["pixel_values"], other)
    ]
    [changed] = (features[0] - features[1]).abs().amax(-1).gt(1e-6).nonzero().tolist()
    assert [int(place) for place in layout.place(torch.tensor(changed))] == [tile % layout.crops, row // 2, column // 2]
    assert torch.equal(family.view(model, {"pixel_values": other}, [layout])[tile], other[tile])


def test_tiles_make_images() -> None:
    model = build()
    inputs = make_inputs(ROW, model, [3, 0, 1])
    counts = [rows * columns + (rows * columns > 1) for rows, columns in map(grid, ROW.sizes)]
    assert 1 in counts
    assert max(counts) > 2
    assert [layout.crops for layout in layouts_for(model, inputs)] == counts


def test_markers_are_nobodys_words_and_keep_their_embeddings() -> None:
    model = build()
    inputs = make_inputs(ROW, model, [2, 1])
    prompt = read_prompt(model, family_of(model), inputs)
    ids = inputs["input_ids"]
    is_marker = torch.isin(ids, torch.tensor(model.config.visual_indicator_token_ids))
    assert prompt.special[is_marker].all()
    assert not prompt.special[(ids > 2) & (ids < 110)].any()
    with torch.no_grad(), AdaFV(keep=0.3)(model):
        before = model(**inputs).logits[:, -1]
        model.model.visual_embeddings_table.weight[-5:] += 1
        assert not torch.allclose(before, model(**inputs).logits[:, -1], atol=1e-3)


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="tokenize_function"):
        family_of(build(vision={"tokenize_function": "gumbel_argmax"}))
    model = build()
    inputs = make_inputs(ROW, model, [1])
    with torch.no_grad(), AdaFV(keep=0.3)(model):
        with pytest.raises(UnsupportedCallError, match="square tiles"):
            model(**{**inputs, "pixel_values": inputs["pixel_values"][..., : SIDE // 2]})
        with pytest.raises(PromptError):
            model(**{**inputs, "pixel_values": inputs["pixel_values"][:-1]})
    model = build(vision={"hidden_stride": 3})  # of 4 patches along a side
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            model(**inputs)  # stock transformers fails to pad them
        with AdaFV(keep=0.3)(model), pytest.raises(UnsupportedCallError, match="square tiles"):
            model(**inputs)


def test_other_ways_of_making_tokens() -> None:
    """A hard choice from the visual vocabulary is a patch's own too."""
    model = build(vision={"tokenize_function": "st_argmax"})
    inputs = make_inputs(ROW, model, [1])
    with torch.no_grad():
        stock = model(**inputs).logits
        with AdaFV(keep=1.0)(model):
            assert torch.equal(model(**inputs).logits, stock)
        with AdaFV(keep=0.3)(model):
            assert model(**inputs).logits.isnan().any()
