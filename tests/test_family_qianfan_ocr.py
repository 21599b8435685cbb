"""Qianfan-OCR: the saliency is that of the tower's [CLS], joined as the tokens are, and belongs to its patch."""

import pytest
import torch
from joined_tiles import check_changed_token, check_saliency
from models import make_inputs

from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.reading import read_prompt
from adafv.errors import UnsupportedModelError

qianfan = pytest.importorskip("rows.qianfan_ocr")


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_saliency_is_the_class_row_joined_as_the_tokens_are(layer: int, attention: str) -> None:
    check_saliency(qianfan.ROW, qianfan.build(vision_feature_layer=layer), layer, attention)


@pytest.mark.parametrize(("tile", "row", "column"), [(0, 0, 3), (-1, 2, 1)])
def test_a_patch_changes_the_token_that_the_layout_names(tile: int, row: int, column: int) -> None:
    model = qianfan.build()
    check_changed_token(qianfan.ROW, model, model.model.vision_tower.layers, tile, row, column)


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
            mine = family.encode(
                model, "image", {"pixel_values": inputs["pixel_values"]}, layouts, signals=frozenset({SALIENCY})
            )
        assert torch.equal(torch.cat(mine.features), stock.flatten(0, 1)), layer


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="vision_feature_layer"):
        family_of(qianfan.build(vision_feature_layer=[-1, -2]))
    with pytest.raises(UnsupportedModelError, match="vision_feature_select_strategy"):
        family_of(qianfan.build(vision_feature_select_strategy="full"))
