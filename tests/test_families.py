"""Towers and layouts: what is read off the model agrees with the stock model itself."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import DEEP, FAMILIES, FamilyRow, image_lengths, llava, llava_next, llava_next_images, make_inputs, present
from oracle import equal
from packaging.version import Version
from sharing import shared_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adafv import AdaFV, Pruner
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.families import family_of, known_families
from adafv.engines.transformers.families.base import Encoded
from adafv.engines.transformers.families.catalogue import catalogue
from adafv.engines.transformers.towers import TappedTower
from adafv.errors import MethodError, PromptError, UnsupportedCallError, UnsupportedModelError
from adafv.methods.published import arranged

NEWEST = Version(transformers.__version__) >= Version("5.23")


@pytest.fixture(scope="module", params=["clip", "vit"])
def tower(request: pytest.FixtureRequest) -> str:
    return request.param


def images_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}


def layouts_of(model: Any, images: dict[str, Any]) -> list[Any]:
    return family_of(model).layouts(model, "image", images, [])


def test_tokens_are_those_of_the_stock_model(family: FamilyRow, tower: str) -> None:
    """Every kept feature is, bit by bit, the stock feature at the index that `kept` names."""
    model = family.build(tower=tower)
    images, _ = family.images(model, [[size] for size in family.sizes], 0)
    with torch.no_grad():
        stock = list(model.get_image_features(**images).pooler_output)
        layouts = layouts_of(model, images)
        encoded = family_of(model).encode(model, "image", images, layouts, signals=frozenset({SALIENCY}))
    assert [layout.tokens for layout in layouts] == [len(features) for features in stock]
    for features, saliency, layout, expected in zip(encoded.features, encoded.saliency, layouts, stock, strict=True):
        assert features.shape[0] == layout.tokens == saliency.shape[0]
        assert torch.equal(features, expected)
        shown = layout.shows_patch
        if not shown.all():
            assert torch.equal(expected[~shown], model.model.image_newline.expand_as(expected[~shown]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_saliency_is_the_class_row_of_the_attention_map(family: FamilyRow, tower: str, attention: str) -> None:
    model = family.build(tower=tower)
    model.model.vision_tower.set_attn_implementation(attention)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        tapped = TappedTower(model.model.vision_tower, -2, signals=frozenset({SALIENCY}))
        states = tapped(pixels).hidden_states
        stock = model.model.vision_tower(pixels, output_hidden_states=True)
        assert torch.equal(states[-2], stock.hidden_states[-2])
        model.model.vision_tower.set_attn_implementation("eager")
        maps = model.model.vision_tower(pixels, output_attentions=True).attentions
    # hidden_states[-2] is the output of the last layer but one
    [saliency] = tapped.read(lambda patches: [patches])[SALIENCY]
    torch.testing.assert_close(saliency.view(2, -1), maps[-2][:, :, 0, 1:].mean(1), atol=1e-6, rtol=1e-5)


def test_layers_that_nothing_reads_do_not_run(family: FamilyRow) -> None:
    model = family.build()
    runs: list[int] = []
    layers = model.model.vision_tower.encoder.layers
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: runs.append(number))
    inputs = make_inputs(family, model, [1])
    runs.clear()
    with torch.no_grad():
        model(**inputs)
    assert runs == [0, 1, 2, 3]
    runs.clear()
    with torch.no_grad(), AdaFV(keep=0.3)(model):
        model(**inputs)
    assert runs == [0, 1, 2]


def test_only_the_tapped_layer_leaves_the_stock_attention(family: FamilyRow, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family.build()
    inputs = make_inputs(family, model, [1])
    asked: list[str] = []
    original = type(ALL_ATTENTION_FUNCTIONS).get_interface

    def get_interface(self: Any, name: str, default: Any) -> Any:
        asked.append(name)
        return original(self, name, default)

    monkeypatch.setattr(type(ALL_ATTENTION_FUNCTIONS), "get_interface", get_interface)
    with torch.no_grad(), AdaFV(keep=0.3)(model):
        model(**inputs)
    # the tapped layer asks twice: for the tap, and the tap for the attention it wraps
    assert asked[:4].count("adafv_tapped") == 1
    assert set(asked) == {"adafv_tapped", "sdpa"}
    asked.clear()
    with torch.no_grad(), Pruner("random", keep=0.3)(model):
        model(**inputs)
    assert set(asked) == {"sdpa"}  # methods that need no saliency do not tap


@pytest.mark.parametrize("layer", [-1, -2, -3, 2, [-2, 1], [-3, -2]])
def test_feature_layers(family: FamilyRow, layer: Any) -> None:
    model = family.build(vision_feature_layer=layer)
    inputs = make_inputs(family, model, [1])
    stock = model(**inputs).logits
    with torch.no_grad(), AdaFV(keep=1.0)(model):
        assert torch.equal(model(**inputs).logits, stock)
    with torch.no_grad(), AdaFV(keep=0.3)(model) as adafv:
        model(**inputs)
    assert adafv.last.tokens_after[0] < adafv.last.tokens_before[0]


def test_feature_layer_of_the_call(family: FamilyRow) -> None:
    """`forward` takes `vision_feature_layer` too; so must the pruned one."""
    model, other = family.build(), family.build(vision_feature_layer=-3)
    inputs = make_inputs(family, model, [1])
    with torch.no_grad(), AdaFV(keep=0.3)(model), AdaFV(keep=0.3)(other):
        assert equal(model(**inputs, vision_feature_layer=-3).logits, other(**inputs).logits)
        with pytest.raises(UnsupportedModelError, match="full"):
            model(**inputs, vision_feature_select_strategy="full")


def test_places_of_kept_tokens() -> None:
    """crop, row and column, checked with images whose patches differ in brightness alone."""
    model = llava_next()
    images = llava_next_images(model, [(90, 100), (56, 130)])
    layouts = layouts_of(model, images)
    for layout, size in zip(layouts, [(90, 100), (56, 130)], strict=True):
        crop, row, column = layout.place(torch.arange(layout.tokens))
        thumbnail = layout.rows * layout.columns
        assert crop[:thumbnail].eq(0).all()
        assert torch.equal(row[:thumbnail] * layout.columns + column[:thumbnail], torch.arange(thumbnail))
        newlines = (crop < 0).nonzero().flatten()
        assert newlines.numel() > 1
        assert newlines[-1] == layout.tokens - 1
        # between two newlines: one row of the raster, from the left crop to the right one
        line = slice(int(newlines[0]) + 1, int(newlines[1]))
        horizontal = layout.tiling[1]
        tile = (crop[line] - 1) % horizontal
        assert torch.equal(tile * layout.columns + column[line], (tile * layout.columns + column[line]).sort().values)
        assert row[line].unique().numel() == 1
        assert size[1] / size[0] == pytest.approx((line.stop - line.start) / newlines.numel(), rel=0.35)


def test_flattened_crops_and_lists(family: FamilyRow) -> None:
    """LLaVA-NeXT also takes the crops of all images in one row."""
    if family.name != "llava-next":
        pytest.skip("one crop per image")
    model = family.build()
    inputs = make_inputs(family, model, [1, 1])
    flat = torch.cat(
        [pixels[: layout.crops] for pixels, layout in zip(inputs["pixel_values"], layouts_of(model, inputs))]
    )
    with torch.no_grad(), AdaFV(keep=0.3)(model), Pruner("downsample", keep=9)(family.build()) as other:
        expected = model(**inputs).logits
        assert equal(model(**{**inputs, "pixel_values": flat}).logits, expected)
        small = other.model(**inputs).logits
        assert equal(other.model(**{**inputs, "pixel_values": flat}).logits, small)


def test_published_layout_on_several_crops() -> None:
    model = llava_next()
    row = next(row for row in FAMILIES if row.name == "llava-next")
    inputs = make_inputs(row, model, [1], seed=3)
    with torch.no_grad(), AdaFV(keep=33, variant="published")(model) as adafv:
        output = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    last = adafv.last
    crops = last.layouts[0].crops
    assert last.tokens_after == [2 * (33 // 2 // crops) * crops]
    assert output.past_key_values.get_seq_length() == last.prompt_length_after + 2
    patches = last.layouts[0].rows * last.layouts[0].columns
    assert (last.crop[0] >= 0).all()  # no newlines in the published layout
    kept = last.kept[0]
    shown = kept[kept >= 0]
    assert torch.equal(
        torch.stack(last.layouts[0].place(shown)),
        torch.stack((last.crop[0], last.row[0], last.column[0]))[:, kept >= 0],
    )
    saliency_picks = (last.crop[0] == 0).sum()
    assert saliency_picks >= last.tokens_after[0] // 4
    assert last.keep_mask.sum() == inputs["input_ids"].shape[1] - last.tokens_before[0] + shown.unique().numel()
    assert torch.equal(adafv.last.keep_mask[0][inputs["input_ids"][0] == 119].nonzero().flatten(), shown.unique())
    assert patches == 16


def test_published_features_are_what_the_indices_say() -> None:
    """With repeated tokens there is no mask to compare with; so compare with stock features put in by hand."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    model = llava()
    inputs = make_inputs(DEEP[0], model, [1])
    with torch.no_grad(), AdaFV(keep=9, variant="published", logits="kept")(model) as adafv:
        pruned = model(**inputs).logits
    kept = adafv.last.kept[0]
    assert len(kept) == 8
    with torch.no_grad():
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0][kept]
        is_image = inputs["input_ids"][0] == 119
        assert adafv.last.keep_mask[0][is_image].nonzero().flatten().tolist() == sorted({*kept.tolist()})
        start = int(is_image.nonzero()[0])
        ids = inputs["input_ids"][0][~is_image]
        ids = torch.cat((ids[:start], torch.full((8,), 119), ids[start:]))[None]
        expected = model(
            input_ids=ids, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=[features])}
        )
    torch.testing.assert_close(pruned, expected.logits)


@pytest.mark.parametrize("row", [row for row in FAMILIES if row.rotary], ids=lambda row: row.name)
def test_what_may_repeat_has_no_positions_on_three_axes(row: FamilyRow) -> None:
    """It would get those of the image's first tokens, whichever it is."""
    with (
        shared_model(row) as model,
        AdaFV(keep=6, variant="published", text="turn")(model),
        pytest.raises(MethodError, match="no positions in time, height and width"),
    ):
        model(**make_inputs(row, model, [1]))


def test_every_family_names_itself() -> None:
    """And each has a row in the test table, under its own name."""
    tested = {family_of(row.build()).name for row in FAMILIES}
    # Older releases lack these, or have them in a shape that is refused (see the tests of the families).
    lacking = {"SmolVLM", "Qwen2.5-Omni", "Qwen3-Omni", "Mistral Large 4", "dots 3 note", "Cosmos 3 Edge"}
    assert {family.name for family in known_families()} - tested <= (set() if NEWEST else lacking)
    for row in FAMILIES:
        model = row.build()
        assert type(model).__name__ in family_of(model).model_classes
        assert [family.name for family in known_families() if family.owns(model)] == [family_of(model).name]
        # Stock 5.18 cannot generate from the videos of one family (see test_family_cohere_compass.py).
        assert bool(family_of(model).videos) == (row.videos is not None) or not NEWEST
        assert bool(family_of(model).rotary_axes) == row.rotary


def test_videos_are_refused_where_there_is_no_support(any_family: FamilyRow, any_model: Any) -> None:
    inputs = make_inputs(any_family, any_model, [1])
    frames = torch.randn(1, 2, 3, 56, 56)
    with AdaFV(keep=0.3)(any_model):
        if not family_of(any_model).videos:
            for visuals in (inputs, {name: value for name, value in inputs.items() if "pixel" not in name}):
                with pytest.raises(UnsupportedCallError, match="videos are not supported"):
                    any_model(**visuals, pixel_values_videos=frames)
        elif any_family.videos is not None:  # more frames than the prompt has placeholders for
            with pytest.raises((PromptError, UnsupportedCallError)):
                any_model(**inputs, **any_family.videos(any_model, [[any_family.clips[0]]], 0)[0])


COUNTED_TWICE = {
    "llava-onevision": ("image_sizes", "batch_num_images"),
    "video-llama3": ("image_grid_thw", "image_merge_sizes"),
}


@pytest.mark.parametrize("name", present(*COUNTED_TWICE))
def test_inputs_that_speak_of_different_numbers_of_images(name: str) -> None:
    one, two = COUNTED_TWICE[name]
    row = next(row for row in FAMILIES if row.name == name)
    with shared_model(row) as model, AdaFV(keep=3)(model):
        inputs = make_inputs(row, model, [1, 1])
        for short in (one, two):
            with pytest.raises(PromptError, match=f"{one} speaks of . and {two} of ."):
                model(**{**inputs, short: inputs[short][:1]})


def test_a_replaced_forward_inside_the_tower_is_refused() -> None:
    model = llava()
    layer = model.model.vision_tower.encoder.layers[-2]
    layer.forward = layer.forward
    inputs = make_inputs(DEEP[0], llava(), [1])
    with AdaFV(keep=0.3)(model), pytest.raises(UnsupportedModelError, match="replaced"):
        model(**inputs)


def test_record_says_what_was_sent(family: FamilyRow) -> None:
    model = family.build()
    inputs = make_inputs(family, model, [2, 1])
    with torch.no_grad(), AdaFV(keep=0.25)(model) as adafv:
        model(**inputs)
    last = adafv.last
    lengths = image_lengths(model, images_of(inputs))
    assert last.tokens_before == lengths
    assert last.tokens_after == [max(1, int(0.25 * n + 0.5)) for n in lengths] == [len(kept) for kept in last.kept]
    assert last.rows == [0, 0, 1]
    assert all((kept.diff() > 0).all() for kept in last.kept)
    is_image = inputs["input_ids"] == 119
    assert torch.equal(last.keep_mask[is_image].sum(), torch.tensor(sum(last.tokens_after)))
    assert last.keep_mask[(~is_image) & (inputs["attention_mask"] == 1)].all()
    assert torch.equal(last.keep_mask[1][is_image[1]].nonzero().flatten(), last.kept[2])
    assert set(last.seconds) == {"tower", "selection", "compaction", "model"}
    assert all(0 <= value <= 1 for value in last.certificate)
    for kept, text, saliency, objective in zip(
        last.kept, last.text_attention, last.saliency, last.objective, strict=True
    ):
        assert objective == pytest.approx(float((text[kept].sum() * saliency[kept].sum()).sqrt()), rel=1e-5)


def test_published_layout_is_the_raster_of_all_crops() -> None:
    model = llava_next()
    images = llava_next_images(model, [(90, 100), (120, 40)])
    for own in layouts_of(model, images):
        layout = arranged(own)
        assert layout is not None
        patches = layout.rows * layout.columns
        assert torch.equal(layout.source[:patches], torch.arange(patches))
        crop, row, column = layout.place(torch.arange(patches, layout.tokens))
        vertical, horizontal = (crop - 1) // layout.tiling[1], (crop - 1) % layout.tiling[1]
        width = layout.tiling[1] * layout.columns
        place = (vertical * layout.rows + row) * width + horizontal * layout.columns + column
        assert torch.equal(place, torch.arange(layout.tokens - patches))


def test_the_example_in_the_docs_is_what_is_there() -> None:
    root = Path(__file__).parent.parent
    text = (root / "docs/adding-a-family.md").read_text()
    for path in ("src/adafv/engines/transformers/families/deepseek_vl.py", "tests/rows/deepseek_vl.py"):
        assert (root / path).read_text() in text


def test_the_catalogue_in_the_docs_is_what_the_command_prints() -> None:
    text = (Path(__file__).parent.parent / "docs/families.md").read_text()
    assert catalogue() in text, "copy what `adafv families` prints into docs/families.md"


MISFITS: dict[str, Callable[[Encoded], Any]] = {
    "tokens": lambda made: [torch.cat((tokens[:1], tokens)) for tokens in made.features],
    "fewer images": lambda made: made.features[:-1],
    "more images": lambda made: made.features * 2,
    "a row": lambda made: [tokens.unsqueeze(0) for tokens in made.features],
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("what", ["features", "saliency"])
def test_a_family_that_encodes_other_tokens_than_it_says(what: str, misfit: str, monkeypatch: Any) -> None:
    """With [CLS] left in front, say, every token would be the one before it."""

    def encode(self: Any, *given: Any) -> Encoded:
        made = encode_all(self, *given)
        parts = MISFITS[misfit](made if what == "features" else Encoded(made.signals[SALIENCY]))
        return replace(made, features=parts) if what == "features" else replace(made, signals={SALIENCY: parts})

    row = next(row for row in FAMILIES if row.name == "llava-next")
    with shared_model(row) as model:
        owner = type(family_of(model))
        encode_all = owner.encode
        monkeypatch.setattr(owner, "encode", encode)
        inputs = make_inputs(row, model, [2])
        with (
            Pruner("saliency", keep=3)(model),
            pytest.raises(UnsupportedModelError, match=rf"LLaVA-NeXT says .* \[88, 52\] tokens, but gave {what}"),
        ):
            model(**inputs)


def test_a_family_that_encodes_another_grid_than_was_asked_for(monkeypatch: Any) -> None:
    row = next(row for row in FAMILIES if row.name == "llava")
    with shared_model(row) as model:
        owner = type(family_of(model))
        smaller = owner.encode_smaller
        monkeypatch.setattr(owner, "encode_smaller", lambda *given: smaller(*given[:-1], (1, 2)))
        with (
            Pruner("downsample", keep=4)(model),
            pytest.raises(UnsupportedModelError, match=r"LLaVA-1.5 gave \[2\] tokens for images at 2 x 2; give 4"),
        ):
            model(**make_inputs(row, model, [1]))
