"""DeepSeek-VL and Janus: the last layer is heard, and what the stock processors make of photos."""

from typing import Any

import pytest
import torch
from models import IMAGE, PATCH, SIDE, FamilyRow, make_inputs, vision_config
from processors import photo
from rows import deepseek_vl, janus
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration, DeepseekVLProcessor, JanusProcessor
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from adafv import AdaFV, Pruner, compress
from adafv.engines.transformers.families import family_of
from adafv.errors import PromptError, UnsupportedCallError, UnsupportedModelError


@pytest.fixture(params=[deepseek_vl.ROW, janus.ROW], ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> FamilyRow:
    return request.param


def test_saliency_is_that_of_the_last_layer(row: FamilyRow) -> None:
    """Computed again from the stock attention maps and values; see docs/saliency.md."""
    model = row.build()
    inputs = make_inputs(row, model, [2])
    record = compress(model, inputs, keep=3).record
    tower = model.model.vision_model
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        output = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
        layer = tower.encoder.layers[-1]
        values = layer.self_attn.v_proj(layer.layer_norm1(output.hidden_states[-2]))
    values = values.unflatten(-1, (tower.config.num_attention_heads, -1)).transpose(1, 2)
    differs = (values - values.mean(2, keepdim=True)).square().sum(-1)
    expected = (output.attentions[-1].mean(2) * differs).mean(1)
    torch.testing.assert_close(
        torch.stack(record.saliency), expected / expected.sum(-1, keepdim=True), atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize(("down", "across"), [(0, 3), (2, 1)])
def test_a_patch_changes_the_token_that_the_layout_names(row: FamilyRow, down: int, across: int) -> None:
    """Without attention the patches of a tower do not mix, so one patch changes one token."""
    model = row.build()
    with torch.no_grad():
        for name, parameter in model.model.vision_model.named_parameters():
            if name.endswith(("out_proj.weight", "projection_layer.weight")):
                parameter.zero_()
    inputs = make_inputs(row, model, [1])
    other = inputs["pixel_values"].clone()
    other[:, :, down * PATCH : (down + 1) * PATCH, across * PATCH : (across + 1) * PATCH] += 1
    family = family_of(model)
    [layout] = family.layouts(model, "image", inputs, [])
    features = [
        family.encode(model, "image", {"pixel_values": pixels}, [layout], signals=frozenset()).features[0]
        for pixels in (inputs["pixel_values"], other)
    ]
    [changed] = (features[0] - features[1]).abs().amax(-1).gt(1e-6).nonzero().tolist()
    assert [int(place) for place in layout.place(torch.tensor(changed))] == [0, down, across]


def test_images_at_lower_resolution(row: FamilyRow) -> None:
    model = row.build()
    inputs = make_inputs(row, model, [1, 1])
    small = torch.nn.functional.interpolate(
        inputs["pixel_values"], size=(2 * PATCH, 2 * PATCH), mode="bicubic", antialias=True, align_corners=False
    )
    with torch.no_grad():
        with Pruner("downsample", keep=4)(model) as pruner:
            model(**inputs)
        short = compress(model, inputs, keep=4, method="downsample")
        stock = model.model.get_image_features(small, interpolate_pos_encoding=True, return_dict=True).pooler_output
    assert pruner.last.tokens_after == [4, 4]
    torch.testing.assert_close(short["mm_encoder_outputs"]["image"].pooler_output, stock)


def test_towers_with_a_class_token_are_refused() -> None:
    """The stock model would pass it on as a visual token."""
    config = DeepseekVLConfig(
        vision_config=vision_config(),
        text_config=deepseek_vl.text_config(),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    model = DeepseekVLForConditionalGeneration(config)
    with torch.no_grad():
        features = model.model.get_image_features(torch.zeros(1, 3, SIDE, SIDE), return_dict=True).pooler_output
    assert features.shape[1] == (SIDE // PATCH) ** 2 + 1
    with pytest.raises(UnsupportedModelError, match=r"\[CLS\]"):
        AdaFV(keep=3)(model)


def test_drawing_sees_no_images() -> None:
    """Images in a call that draws are refused: the stock model draws the same thing whatever they show."""
    model = janus.build()
    inputs = make_inputs(janus.ROW, model, [1])
    with AdaFV(keep=3)(model), pytest.raises(UnsupportedCallError, match="generation_mode='image'"):
        model.generate(**inputs, generation_mode="image")
    model.generation_config.generation_kwargs = {"boi_token_id": janus.IMAGE_START}
    model.generation_config.bos_token_id = 1
    options: dict[str, Any] = {"generation_mode": "image", "guidance_scale": 5, "do_sample": False, "use_cache": True}
    drawn = model.generate(**inputs, **options)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert torch.equal(model.generate(**other, **options), drawn)
    del inputs["pixel_values"]
    with AdaFV(keep=3)(model):
        assert torch.equal(model.generate(**inputs, **options), drawn)


@pytest.mark.parametrize("size", [(100, 90), (640, 480), (56, 200), (480, 640), (56, 56)])
def test_placeholders_of_the_stock_processors(row: FamilyRow, size: tuple[int, int]) -> None:
    processors = {
        "deepseek-vl": (DeepseekVLProcessor, DeepseekVLImageProcessorPil),
        "janus": (JanusProcessor, JanusImageProcessorPil),
    }
    cls, image_processor = processors[row.name]
    pixels = image_processor(size={"height": SIDE, "width": SIDE})(photo(0, *size), return_tensors="pt")
    made = cls.__new__(cls)
    made.__dict__.update(
        num_image_tokens=(SIDE // PATCH) ** 2, image_token="I", image_start_token="(", image_end_token=")"
    )
    model = row.build()
    [layout] = family_of(model).layouts(model, "image", pixels, [])
    assert layout.tokens == made.replace_image_token(pixels, 0).count("I")


def test_prompt_that_does_not_fit_the_images(row: FamilyRow) -> None:
    model = row.build()
    inputs = make_inputs(row, model, [2])
    with AdaFV(keep=3)(model), pytest.raises(PromptError, match="visual tokens"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
