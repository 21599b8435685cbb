"""Qianfan-OCR: the saliency is that of the tower's [CLS], joined as the tokens are, and belongs to its patch."""

import pytest
import torch
from models import PATCH, SIDE, make_inputs

from adafv import compress
from adafv.engines.transformers.prompt import read_prompt
from adafv.errors import UnsupportedModelError
from adafv.families import family_of

qianfan = pytest.importorskip("rows.qianfan_ocr")


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_saliency_is_the_class_row_joined_as_the_tokens_are(layer: int, attention: str) -> None:
    model = qianfan.build(vision_feature_layer=layer)
    tower = model.model.vision_tower
    tower.set_attn_implementation(attention)
    inputs = make_inputs(qianfan.ROW, model, [2])
    record = compress(model, inputs, keep=0.3).record
    assert record is not None
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions
    # hidden_states[-1] is the output of the last layer, hidden_states[1] that of the first
    heard = maps[layer if layer < 0 else layer - 1][:, :, 0, 1:].mean(1)
    side = SIDE // PATCH
    squares = torch.nn.functional.avg_pool2d(heard.view(-1, 1, side, side), 2).flatten()
    torch.testing.assert_close(torch.cat(record.saliency), squares, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("tile", "row", "column"), [(0, 0, 3), (-1, 2, 1)])
def test_a_patch_changes_the_token_that_the_layout_names(tile: int, row: int, column: int) -> None:
    """Without attention a tower's patches do not mix, so one patch changes one token."""
    model = qianfan.build()
    with torch.no_grad():
        for layer in model.model.vision_tower.layers:
            layer.attention.projection_layer.weight.zero_()
    inputs = make_inputs(qianfan.ROW, model, [1])
    other = inputs["pixel_values"].clone()
    other[tile, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 1
    family = family_of(model)
    [layout] = family.layouts(model, "image", inputs, read_prompt(model, family, inputs).runs("image"))
    features = [
        family.encode(model, "image", {"pixel_values": pixels}, [layout], saliency=False).features[0]
        for pixels in (inputs["pixel_values"], other)
    ]
    [changed] = (features[0] - features[1]).abs().amax(-1).gt(1e-6).nonzero().tolist()
    crop = (tile + 1) % layout.crops  # the last tile is the thumbnail, which is crop 0
    assert [int(place) for place in layout.place(torch.tensor(changed))] == [crop, row // 2, column // 2]


@pytest.mark.parametrize("mean_pooling", [True, False])
def test_every_layer_is_read_as_the_stock_model_reads_it(mean_pooling: bool) -> None:
    """Without mean pooling a norm follows the last layer."""
    for layer in (-1, -2, 1, 3):
        model = qianfan.build(vision={"use_mean_pooling": mean_pooling}, vision_feature_layer=layer)
        inputs = make_inputs(qianfan.ROW, model, [1])
        family = family_of(model)
        layouts = family.layouts(model, "image", inputs, read_prompt(model, family, inputs).runs("image"))
        with torch.no_grad():
            stock = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
            mine = family.encode(model, "image", {"pixel_values": inputs["pixel_values"]}, layouts, saliency=True)
        assert torch.equal(torch.cat(mine.features), stock.flatten(0, 1)), layer


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="vision_feature_layer"):
        family_of(qianfan.build(vision_feature_layer=[-1, -2]))
    with pytest.raises(UnsupportedModelError, match="vision_feature_select_strategy"):
        family_of(qianfan.build(vision_feature_select_strategy="full"))
