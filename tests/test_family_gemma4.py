"""Gemma 4: the saliency belongs to its token, padding counts for nothing, and what is refused."""

from typing import Any

import pytest
import torch
from models import PATCH, VIDEO, make_inputs
from processors import photo
from rows import gemma4
from test_family_packed_rows import recorded, sent

from adafv import AdaFV, compress
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.families import family_of
from adafv.errors import UnsupportedCallError, UnsupportedModelError


@pytest.fixture(scope="module")
def model() -> Any:
    return gemma4.build()


def test_saliency_is_that_of_the_image_without_padding(model: Any) -> None:
    """Computed again from the stock tower's maps and values for each image alone; see docs/saliency.md."""
    visuals, _ = gemma4.images(model, [gemma4.ROW.sizes], 0)
    family = family_of(model)
    layouts = family.layouts(model, "image", visuals, [])
    with torch.no_grad():
        encoded = family.encode(model, "image", visuals, layouts, signals=frozenset({SALIENCY}))
    tower = model.model.vision_tower
    for number, (height, width) in enumerate(gemma4.ROW.sizes):
        rows, columns = height // PATCH, width // PATCH
        pixels = visuals["pixel_values"][number : number + 1, : rows * columns]
        places = visuals["image_position_ids"][number : number + 1, : rows * columns]
        run = lambda pixels=pixels, places=places: tower(pixels, pixel_position_ids=places)  # noqa: E731
        [(maps, values)] = recorded(tower.encoder.layers[-1].self_attn, run)
        by_patch = sent(maps, values).view(1, 1, rows, columns)
        expected = torch.nn.functional.avg_pool2d(by_patch, 2).flatten()
        torch.testing.assert_close(encoded.saliency[number], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("down", "across"), [(0, 7), (5, 0), (3, 4)])
def test_a_patch_changes_the_token_that_the_layout_names(down: int, across: int) -> None:
    """Without attention the patches of a tower do not mix, so one patch changes one token."""
    model = gemma4.build()
    with torch.no_grad():
        for name, parameter in model.model.vision_tower.named_parameters():
            if ".o_proj." in name:
                parameter.zero_()
    visuals, _ = gemma4.images(model, [[(84, 112)]], 0)
    family = family_of(model)
    [layout] = family.layouts(model, "image", visuals, [])
    other = {**visuals, "pixel_values": visuals["pixel_values"].clone()}
    other["pixel_values"][0, down * 8 + across] += 1
    with torch.no_grad():
        one, two = (
            family.encode(model, "image", entries, [layout], signals=frozenset()).features[0]
            for entries in (visuals, other)
        )
    [changed] = (one - two).abs().amax(-1).gt(1e-6).nonzero().tolist()
    assert [int(part) for part in layout.place(torch.tensor(changed))] == [0, down // 2, across // 2]


@pytest.mark.parametrize("size", [(100, 90), (640, 480), (56, 400), (480, 640), (48, 48)], ids=str)
def test_layouts_of_the_stock_processor(size: tuple[int, int]) -> None:
    processing = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    model = gemma4.build()
    model.config.vision_config.pooling_kernel_size = 3
    processor = processing.Gemma4ImageProcessorPil(max_soft_tokens=70)
    made = processor([photo(0, *size), photo(1, 200, 100)], return_tensors="pt")
    layouts = family_of(model).layouts(model, "image", made, [])
    assert [layout.tokens for layout in layouts] == [int(count) for count in made["num_soft_tokens_per_image"]]
    assert layouts[1].columns > layouts[1].rows


def test_the_image_is_shown_as_it_is(model: Any) -> None:
    picture = torch.randn(3, 4 * PATCH, 6 * PATCH)
    patches = picture.view(3, 4, PATCH, 6, PATCH).permute(1, 3, 2, 4, 0).reshape(1, 24, -1)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(6)).flip(-1)[None]
    visuals = {"pixel_values": patches, "image_position_ids": places}
    family = family_of(model)
    assert torch.equal(family.view(model, visuals, family.layouts(model, "image", visuals, []))[0], picture)


def test_embeddings_are_refused_where_the_stock_model_fails(model: Any) -> None:
    inputs = make_inputs(gemma4.ROW, model, [1])
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with torch.no_grad(), pytest.raises(RuntimeError, match="inputs_embeds"):
        model(**inputs)
    with AdaFV(keep=3)(model), pytest.raises(UnsupportedCallError, match="pass input_ids"):
        model(**inputs)


def test_embeddings_without_inputs_for_every_layer() -> None:
    model = gemma4.build(text={"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0})
    inputs = make_inputs(gemma4.ROW, model, [2])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad(), AdaFV(keep=3)(model):
        by_ids = model(**inputs).logits
        del inputs["input_ids"]
        by_embeds = model(**inputs, inputs_embeds=embeds).logits
    torch.testing.assert_close(by_ids, by_embeds, equal_nan=True)


@pytest.mark.parametrize("both_ways", ["vision", "all"])
def test_models_whose_tokens_look_ahead_are_refused(both_ways: str) -> None:
    model = gemma4.build(text={"use_bidirectional_attention": both_ways})
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention"):
        AdaFV(keep=3)(model)


def test_videos_are_refused(model: Any) -> None:
    inputs = {"input_ids": torch.tensor([[1, VIDEO, VIDEO, 5]]), "pixel_values_videos": torch.zeros(1, 8, 588)}
    with pytest.raises(UnsupportedCallError, match="videos"):
        compress(model, inputs, keep=1)
