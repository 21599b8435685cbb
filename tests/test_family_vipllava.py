"""ViP-LLaVA: which layer is heard, and the two names of the setting."""

from typing import Any

import pytest
import torch
from models import IMAGE, PATCH, SIDE, finish, make_inputs, text_config
from oracle import equal
from processors import TEMPLATES, photo, tokenizer
from rows.vipllava import OLD_NAME, ROW, build
from transformers import LlavaProcessor, SiglipVisionConfig, VipLlavaConfig, VipLlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from adafv import AdaFV, Pruner, compress
from adafv.engines.transformers.families import family_of
from adafv.errors import UnsupportedModelError


@pytest.mark.parametrize(("layers", "deepest"), [((-2, -3, 1), -2), ([1, -1, 2], -1), (2, -3), ((-5 + 1, 3), -2)])
def test_the_deepest_layer_is_heard(layers: Any, deepest: int) -> None:
    model = build(layers=layers)
    inputs = make_inputs(ROW, model, [2])
    with torch.no_grad():
        stock = model(**inputs).logits
        with AdaFV(keep=1.0)(model):
            assert torch.equal(model(**inputs).logits, stock)
        record = compress(model, inputs, keep=3).record
        tower = model.model.vision_tower
        tower.set_attn_implementation("eager")
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions
    torch.testing.assert_close(torch.stack(record.saliency), maps[deepest][:, :, 0, 1:].mean(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["vision_feature_layers"] if OLD_NAME else ["vision_feature_layer", "vision_feature_layers"]
)
def test_layers_of_the_call(name: str) -> None:
    model, other = build(), build(layers=(-3, 1, 2))
    inputs = make_inputs(ROW, model, [1])
    with torch.no_grad(), AdaFV(keep=3)(model), AdaFV(keep=3)(other):
        assert equal(model(**inputs, **{name: (-3, 1, 2)}).logits, other(**inputs).logits)
        model(input_ids=torch.tensor([[1, 20, 21]]), **{name: (-3, 1, 2)})  # no image: the stock model's business


def test_images_at_lower_resolution() -> None:
    model = build()
    inputs = make_inputs(ROW, model, [1, 1])
    small = torch.nn.functional.interpolate(
        inputs["pixel_values"], size=(2 * PATCH, 2 * PATCH), mode="bicubic", antialias=True, align_corners=False
    )
    with torch.no_grad():
        with Pruner("downsample", keep=4)(model) as pruner:
            short = compress(model, inputs, keep=4, method="downsample")
            model(**inputs)
        stock = model.model.get_image_features(small, interpolate_pos_encoding=True, return_dict=True).pooler_output
    assert pruner.last.tokens_after == [4, 4]
    torch.testing.assert_close(short["mm_encoder_outputs"]["image"].pooler_output, stock)


def test_towers_without_class_token_are_refused() -> None:
    """The stock model would cut off their first patch."""
    tower = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    setting = "vision_feature_layers" if OLD_NAME else "vision_feature_layer"
    config = VipLlavaConfig(
        vision_config=tower, text_config=text_config(), image_token_index=IMAGE, **{setting: (-2, -3)}
    )
    model = finish(VipLlavaForConditionalGeneration(config), 0, torch.float32)
    with torch.no_grad():
        features = model.model.get_image_features(torch.zeros(1, 3, SIDE, SIDE), return_dict=True).pooler_output
    assert features.shape[1] == (SIDE // PATCH) ** 2 - 1
    with pytest.raises(UnsupportedModelError, match="cuts off a patch"):
        AdaFV(keep=3)(model)


@pytest.mark.parametrize("size", [(100, 90), (640, 480), (56, 200)])
def test_placeholders_of_the_stock_processor(size: tuple[int, int]) -> None:
    """ViP-LLaVA has LLaVA's processor."""
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=True
        ),
        tokenizer=tokenizer("vicuna"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES["vicuna"],
    )
    inputs = processor(images=photo(0, *size), text="USER: <image>\nwhat? ASSISTANT:", return_tensors="pt")
    model = build()
    [layout] = family_of(model).layouts(model, "image", inputs, [])
    assert layout.tokens == int((inputs["input_ids"] == processor.image_token_id).sum())
