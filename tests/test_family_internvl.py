"""InternVL: tiles, pixel shuffle, and what the stock processor makes of photos."""

from typing import Any

import pytest
import torch
from joined_tiles import check_changed_token, check_saliency
from models import IMAGE, PATCH, SIDE, make_inputs
from oracle import STOCK_MIXES_UP_IMAGES, encoded_by_prompt
from rows.internvl import ROW, TOKENS, build, tiles

from adafv import AdaFV, compress
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.reading import read_prompt
from adafv.errors import PromptError, UnsupportedCallError, UnsupportedModelError


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_saliency_is_the_class_row_joined_as_the_tokens_are(layer: int, attention: str) -> None:
    check_saliency(ROW, build(vision_feature_layer=layer), layer, attention)


@pytest.mark.parametrize(("tile", "row", "column"), [(0, 0, 3), (-1, 2, 1)])
def test_a_patch_changes_the_token_that_the_layout_names(tile: int, row: int, column: int) -> None:
    model = build()
    layers = model.model.vision_tower.encoder.layer
    pixels, layout, crop = check_changed_token(ROW, model, layers, tile, row, column)
    seen = family_of(model).view(model, {"pixel_values": pixels}, [layout])[crop]
    assert torch.equal(seen, pixels[tile])


def test_layers_that_nothing_reads_do_not_run_and_nothing_stays_on_the_model() -> None:
    model = build(vision_feature_layer=-2)
    inputs = make_inputs(ROW, model, [1])
    with torch.no_grad():
        model(**inputs)  # transformers hangs its own hooks on the layers when hidden states are first asked for
    layers = model.model.vision_tower.encoder.layer
    hooks = [len(layer._forward_hooks) for layer in layers]
    runs: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, number=number: runs.append(number))
        for number, layer in enumerate(layers)
    ]
    with torch.no_grad(), AdaFV(keep=0.3)(model):
        model(**inputs)
        model(**inputs)
    assert runs == [0, 1, 0, 1]
    for handle in handles:
        handle.remove()
    assert [len(layer._forward_hooks) for layer in layers] == hooks


def test_markers_are_nobodys_words() -> None:
    model = build()
    inputs = make_inputs(ROW, model, [2, 1])
    prompt = read_prompt(model, family_of(model), inputs)
    ids = inputs["input_ids"]
    assert prompt.special[(ids >= 110) & (ids < IMAGE)].all()
    assert not prompt.special[(ids > 2) & (ids < 110)].any()


def test_what_is_refused() -> None:
    with (
        pytest.raises(UnsupportedModelError, match="full"),
        AdaFV(keep=4)(build(vision_feature_select_strategy="full")),
    ):
        pass
    several = build(vision_feature_layer=[-1, -2])
    with pytest.raises(UnsupportedModelError, match="several layers"), AdaFV(keep=4)(several):
        pass
    with pytest.raises((TypeError, AttributeError)):
        several(**make_inputs(ROW, several, [1]))  # stock fails
    model = build()
    inputs = make_inputs(ROW, model, [1])
    with pytest.raises(PromptError, match="placeholders"):
        compress(model, {**inputs, "pixel_values": inputs["pixel_values"][1:]}, keep=4)
    with pytest.raises(UnsupportedCallError, match="square"):
        compress(model, {**inputs, "pixel_values": inputs["pixel_values"][..., :PATCH]}, keep=4)


@pytest.mark.skipif(not STOCK_MIXES_UP_IMAGES, reason="shows what older releases of transformers do wrong")
def test_old_releases_mix_up_tiles_in_beam_search() -> None:
    model = build()
    inputs = make_inputs(ROW, model, [1])
    options: dict[str, Any] = {
        "max_new_tokens": 1,
        "num_beams": 2,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    right = model.generate(**encoded_by_prompt(model, inputs), **options).logits[0]
    wrong = model.generate(**inputs, **options).logits[0]
    assert (right - wrong).abs().max() > 1e-2


@pytest.mark.parametrize(("height", "width"), [(480, 640), (1200, 300), (56, 56), (3000, 4000)])
def test_layouts_are_those_of_the_stock_processor(height: int, width: int) -> None:
    """Its image processor cuts the photo; its text is `<img>`, tiles x image_seq_length placeholders, `</img>`."""
    from PIL import Image
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    processor = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    made = processor(Image.new("RGB", (width, height), (200, 30, 60)), return_tensors="pt")
    count = int(made["num_patches"][0])
    assert count == tiles((height, width)) == len(made["pixel_values"])
    model = build()
    ids = torch.tensor([[1, 5, 110, *[IMAGE] * (TOKENS * count), 111, 6, 7]])
    short = compress(model, {"input_ids": ids, "pixel_values": made["pixel_values"]}, keep=3)
    assert short.record is not None
    assert short.record.tokens_before == [TOKENS * count]
    assert short.record.layouts[0].crops == count
    with torch.no_grad():
        model(**short)


def test_frames_of_a_video_are_images_of_their_own() -> None:
    """As the processor writes them: "Frame1: <img>...</img>", one tile each."""
    model = build()
    frames = [7, 8, 110, *[IMAGE] * TOKENS, 111] * 3
    ids = torch.tensor([[1, *frames, 9, 10]])
    pixels = torch.randn(3, 3, SIDE, SIDE)
    record = compress(model, {"input_ids": ids, "pixel_values": pixels}, keep=2).record
    assert record is not None
    assert record.tokens_before == [TOKENS] * 3
    assert record.tokens_after == [2] * 3
