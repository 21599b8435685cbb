"""Mistral 3, LLaVA with Pixtral, LightOnOCR: several images in one row, merged patches, a token at the end of rows."""

from typing import Any

import pytest
import torch
from models import IMAGE, PATCH, FamilyRow, make_inputs
from PIL import Image
from rows import lighton_ocr, llava_pixtral, mistral3
from rows.mistral3 import IMAGE_END, ROW_END
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from adafv import AdaFV
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.reading import read_prompt
from adafv.errors import UnsupportedModelError

WITH_ROW_ENDS = [mistral3.ROW, llava_pixtral.ROW]
ROWS = [*WITH_ROW_ENDS, lighton_ocr.ROW]


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> FamilyRow:
    return request.param


def tower_of(model: Any) -> Any:
    return getattr(model.model, family_of(model).tower_name)


def encode(model: Any, images: dict[str, Any]) -> tuple[Any, Any]:
    family = family_of(model)
    layouts = family.layouts(model, "image", images, [])
    with torch.no_grad():
        return family.encode(model, "image", images, layouts, signals=frozenset({SALIENCY})), layouts


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_images_of_one_row_do_not_see_each_other(row: FamilyRow, attention: str) -> None:
    """Features and saliency of an image are the same alone and beside larger ones, its padding left out."""
    model = row.build()
    tower_of(model).set_attn_implementation(attention)
    together, _ = row.images(model, [row.sizes], 0)
    batch, _ = encode(model, together)
    for number, size in enumerate(row.sizes):
        alone, _ = row.images(model, [[size]], number)
        single, _ = encode(model, alone)
        torch.testing.assert_close(batch.features[number], single.features[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(batch.saliency[number], single.saliency[0], atol=1e-6, rtol=1e-4)


def test_saliency_of_a_token_is_the_mean_of_its_patches(row: FamilyRow) -> None:
    """By hand: the tapped layer's attention on one image, and squares of patches that the projector joins."""
    model = row.build()
    [size] = row.sizes[:1]
    images, _ = row.images(model, [[size]], 0)
    encoded, [layout] = encode(model, images)
    seen: dict[str, Any] = {}
    layer = tower_of(model).transformer.layers[-1]

    def remember(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, output)

    handles = [getattr(layer.attention, name).register_forward_hook(remember(name)) for name in ("v_proj",)]
    handles.append(layer.register_forward_hook(remember("features")))
    with torch.no_grad():
        tower_of(model).set_attn_implementation("eager")
        output = tower_of(model)(images["pixel_values"], image_sizes=images["image_sizes"], output_attentions=True)
    for handle in handles:
        handle.remove()
    attention = output.attentions[-1][0]  # [H, N, N]
    heads, patches, _ = attention.shape
    value = seen["v_proj"][0].view(patches, heads, -1).transpose(0, 1)
    received = attention.mean(1)
    scores = (received * (value - value.mean(1, keepdim=True)).square().sum(-1)).mean(0)
    scores = scores / scores.sum()
    columns = size[1] // PATCH
    side = columns // layout.columns
    by_hand = torch.zeros(layout.tokens)
    for patch, score in enumerate(scores.tolist()):
        token = patch // columns // side * layout.columns + patch % columns // side
        by_hand[token] += score / side**2
    torch.testing.assert_close(encoded.saliency[0], by_hand, atol=1e-6, rtol=1e-4)


def test_layout_points_to_the_patch(row: FamilyRow) -> None:
    model = row.build()
    images, _ = row.images(model, [row.sizes[:2]], 0)
    plain, layouts = encode(model, images)
    side = row.sizes[1][0] // layouts[1].rows
    down, across = layouts[1].rows - 1, layouts[1].columns - 2
    special = images["pixel_values"].clone()
    special[1, :, side * down : side * (down + 1), side * across : side * (across + 1)] += 3
    changed, _ = encode(model, {**images, "pixel_values": special})
    assert torch.equal(changed.features[0], plain.features[0])
    token = int((changed.features[1] - plain.features[1]).norm(dim=-1).argmax())
    _, found_row, found_column = layouts[1].place(torch.tensor([token]))
    assert (int(found_row), int(found_column)) == (down, across)


def test_patches_that_fill_no_square_are_left_out() -> None:
    """As the stock patch merger leaves them out; the processor makes no such images."""
    model = mistral3.build()
    images = mistral3.pixels([(5 * PATCH, 7 * PATCH), (4 * PATCH, 4 * PATCH)], 0)
    encoded, layouts = encode(model, images)
    assert [(layout.rows, layout.columns) for layout in layouts] == [(2, 3), (2, 2)]
    with torch.no_grad():
        stock = model.get_image_features(**images).pooler_output
    for mine, theirs, saliency, layout in zip(encoded.features, stock, encoded.saliency, layouts, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert saliency.shape == (layout.tokens,)


@pytest.mark.parametrize("row", WITH_ROW_ENDS, ids=lambda row: row.name)
def test_row_ends_are_nobodys_words(row: FamilyRow) -> None:
    model = row.build()
    inputs = make_inputs(row, model, [2, 1])
    special = read_prompt(model, family_of(model), inputs).special
    ends = (inputs["input_ids"] == ROW_END) | (inputs["input_ids"] == IMAGE_END)
    assert ends.sum() > 4
    assert special[ends].all()
    words = ~ends & (inputs["input_ids"] > 2) & (inputs["input_ids"] != IMAGE)
    assert not special[words].any()


@pytest.mark.parametrize("size", [(640, 480), (333, 512), (50, 400), (30, 30)])
def test_what_the_stock_processor_makes(row: FamilyRow, size: tuple[int, int]) -> None:
    """Sizes from the stock image processor; the placeholders as the processor's `replace_image_token` writes them."""
    model = row.build()
    side = PATCH * (1 if row.name == "llava-pixtral" else 2)
    processor = PixtralImageProcessorPil(size={"longest_edge": 12 * PATCH}, patch_size={"height": side, "width": side})
    photos = [Image.effect_noise(photo, 60).convert("RGB") for photo in (size, (200, 300))]
    made = processor(images=photos, patch_size=side, return_tensors="pt")
    layouts = family_of(model).layouts(model, "image", made, [])
    prompt: list[int] = [1, 20]
    for (height, width), layout in zip(made["image_sizes"].tolist(), layouts, strict=True):
        assert (layout.rows, layout.columns) == (height // side, width // side)
        if row.name == "lighton-ocr":
            prompt += [IMAGE] * (width // side * (height // side)) + [21]
        else:
            written = ([IMAGE] * (width // side) + [ROW_END]) * (height // side)
            prompt += [*written[:-1], IMAGE_END, 21]
    inputs = {"input_ids": torch.tensor([[*prompt, 22, 23]]), **made}
    with torch.no_grad():
        stock = [len(features) for features in model.get_image_features(**made).pooler_output]
        with AdaFV(keep=3)(model) as adafv:
            model(**inputs)
    assert adafv.last.tokens_before == stock == [layout.tokens for layout in layouts]
    assert adafv.last.tokens_after == [min(3, count) for count in stock]


def test_images_without_sizes_fill_their_batch() -> None:
    """LLaVA does not ask for them."""
    model = llava_pixtral.build()
    inputs = make_inputs(llava_pixtral.ROW, model, [1])
    with torch.no_grad(), AdaFV(keep=0.3)(model):
        expected = model(**inputs).logits
        del inputs["image_sizes"]
        torch.testing.assert_close(model(**inputs).logits, expected, equal_nan=True)


@pytest.mark.parametrize("row", WITH_ROW_ENDS, ids=lambda row: row.name)
def test_what_is_refused(row: FamilyRow) -> None:
    with pytest.raises(UnsupportedModelError, match="vision_feature_layer"):
        family_of(row.build(vision_feature_layer=-9))
    if row.name == "llava-pixtral":
        with pytest.raises(UnsupportedModelError, match="full"):
            family_of(row.build(vision_feature_select_strategy="default"))
        with pytest.raises(UnsupportedModelError, match="vision_feature_layer"):
            family_of(row.build(vision_feature_layer=[-1, -2]))


@pytest.mark.parametrize("row", WITH_ROW_ENDS, ids=lambda row: row.name)
def test_an_earlier_layer(row: FamilyRow) -> None:
    model = row.build(vision_feature_layer=-2)
    inputs = make_inputs(row, model, [1])
    with torch.no_grad():
        stock = model(**inputs).logits
        with AdaFV(keep=1.0)(model):
            assert torch.equal(model(**inputs).logits, stock)
        with AdaFV(keep=0.3)(model) as adafv:
            model(**inputs)
    assert adafv.last.tokens_after[0] < adafv.last.tokens_before[0]
    assert isinstance(adafv.last.saliency[0], torch.Tensor)
