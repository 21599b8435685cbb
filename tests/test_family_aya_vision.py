"""Aya Vision and Command A Vision: which tiles make an image, and what the stock processors make of photos."""

from typing import Any

import pytest
import rows.aya_vision
import rows.cohere2_vision
import torch
from models import IMAGE, PATCH, SIDE, FamilyRow, layouts_of, make_inputs
from rows.internvl import TOKENS, tiles
from test_family_idefics3 import squares_of_patch_saliency

from adafv import compress
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.reading import read_prompt
from adafv.errors import PromptError, UnsupportedCallError

ROWS = [rows.aya_vision.ROW, rows.cohere2_vision.ROW]


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> FamilyRow:
    return request.param


@pytest.fixture(scope="module")
def model(row: FamilyRow) -> Any:
    return row.build()


def test_images_are_told_apart(row: FamilyRow, model: Any) -> None:
    counts = [tiles(size) for size in row.sizes]
    layouts = layouts_of(model, make_inputs(row, model, [2, 0, 1, 1], "right"))
    assert [layout.crops for layout in layouts] == counts
    entries, shown = row.images(model, [row.sizes], 0)  # nothing between the images but their markers
    ids = torch.tensor([[1, 5, *(token for tokens in shown for token in tokens), 6, 7]])
    assert [layout.crops for layout in layouts_of(model, {"input_ids": ids, **entries})] == counts


def test_saliency_lines_up(row: FamilyRow) -> None:
    """Turned upside down, a tower that does not know where patches are sees the same patches in other places."""
    model = row.build()
    family = family_of(model)
    with torch.no_grad():
        model.model.vision_tower.get_submodule("embeddings").position_embedding.weight.zero_()
    inputs = make_inputs(row, model, [1])
    layouts = layouts_of(model, inputs)
    pixels = inputs["pixel_values"]
    patches = pixels.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))  # [tiles, 3, rows, PATCH, columns, PATCH]
    turned = patches.flip(2, 4).flatten(-2).flatten(-3, -2)
    one, other = (
        family.encode(model, "image", {"pixel_values": values}, layouts, signals=frozenset({SALIENCY}))
        .saliency[0]
        .view(-1, TOKENS)
        for values in (pixels, turned)
    )
    assert one.std() > 0
    torch.testing.assert_close(one.flip(1), other)


def test_saliency_is_that_of_the_last_layer(row: FamilyRow, model: Any) -> None:
    inputs = make_inputs(row, model, [2, 1])
    record = compress(model, inputs, keep=0.3).record
    assert record is not None
    layer = model.model.vision_tower.get_submodule("encoder").layers[-1]
    pixels = inputs["pixel_values"]
    expected = squares_of_patch_saliency(layer, lambda: model.model.get_image_features(pixels))
    torch.testing.assert_close(torch.cat(record.saliency), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("tile", "down", "across"), [(0, 0, 3), (1, 2, 1), (-1, 3, 3)])
def test_a_patch_changes_the_token_that_the_layout_names(row: FamilyRow, tile: int, down: int, across: int) -> None:
    """Without attention a tower's patches do not mix, so one patch changes one token."""
    model = row.build()
    with torch.no_grad():
        for layer in model.model.vision_tower.get_submodule("encoder").layers:
            layer.self_attn.out_proj.weight.zero_()
    inputs = make_inputs(row, model, [1])
    family = family_of(model)
    [layout] = layouts_of(model, inputs)
    other = inputs["pixel_values"].clone()
    other[tile, :, down * PATCH : (down + 1) * PATCH, across * PATCH : (across + 1) * PATCH] += 1
    features = [
        family.encode(model, "image", {"pixel_values": pixels}, [layout], signals=frozenset()).features[0]
        for pixels in (inputs["pixel_values"], other)
    ]
    [changed] = (features[0] - features[1]).abs().amax(-1).gt(1e-6).nonzero().tolist()
    crop = (tile + 1) % layout.crops  # the last tile is the thumbnail, which is crop 0
    assert [int(place) for place in layout.place(torch.tensor(changed))] == [crop, down // 2, across // 2]
    assert torch.equal(family.view(model, {"pixel_values": other}, [layout])[crop], other[tile])


def test_markers_are_nobodys_words(row: FamilyRow, model: Any) -> None:
    inputs = make_inputs(row, model, [2, 0, 1])
    special = read_prompt(model, family_of(model), inputs).special
    ids = inputs["input_ids"]
    assert special[(ids >= 110) & (ids < IMAGE)].all()
    words = ((ids > 2) & (ids != IMAGE) & ~special).sum(1)
    assert words.tolist() == [3 + 2 + 3 + 4, 4 + 4, 5 + 6 + 4]  # before, between and behind the images


def test_what_is_refused(row: FamilyRow, model: Any) -> None:
    inputs = make_inputs(row, model, [1])
    with pytest.raises(PromptError, match="placeholders"):
        compress(model, {**inputs, "pixel_values": inputs["pixel_values"][1:]}, keep=4)
    with pytest.raises(UnsupportedCallError, match="square"):
        compress(model, {**inputs, "pixel_values": inputs["pixel_values"][..., :PATCH]}, keep=4)


def processor_of(row: FamilyRow) -> Any:
    """The stock processor, with a tokenizer of bytes: names of tiles are several tokens."""
    from processors import tokenizer
    from transformers import AyaVisionProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    words = tokenizer("chatml")
    size = {"height": SIDE, "width": SIDE}
    if row.name == "aya-vision":
        named = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>"]
        words.add_tokens(named, special_tokens=True)
        images = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=6)
        return AyaVisionProcessor(images, words, patch_size=PATCH, img_size=SIDE, downsample_factor=2)
    from transformers import Cohere2VisionProcessor

    words.add_tokens(["<boi>", "<eoi>", "<break>"], special_tokens=True)
    words.boi_token, words.eoi_token, words.img_line_break_token = "<boi>", "<eoi>", "<break>"
    words.image_token, words.image_token_id = "<image>", words.convert_tokens_to_ids("<image>")
    # Its own image processor needs torchvision; this one puts tiles in the same order, the thumbnail last.
    images = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=6)
    images.patch_size = int(TOKENS**0.5)  # the processor squares it to count the tokens of a tile
    return Cohere2VisionProcessor(images, words)


def test_layouts_are_those_of_the_stock_processor(row: FamilyRow) -> None:
    from processors import photo

    processor = processor_of(row)
    sizes = [(480, 640), (1200, 300), (56, 56), (900, 1600)]
    photos = [photo(0, width, height) for height, width in sizes]
    texts = ["first <image> second<image> and?", "no image here", "<image>what", "see <image> this"]
    made = dict(processor(text=texts, images=photos, padding=True, return_tensors="pt"))
    model = row.build()
    model.resize_token_embeddings(len(processor.tokenizer))
    model.config.image_token_id = processor.image_token_id
    record = compress(model, made, keep=3).record
    assert record is not None
    counts = [processor.image_processor.get_number_of_image_patches(*size, {}) for size in sizes]
    assert [layout.crops for layout in record.layouts] == counts
    assert len(set(counts)) > 2
    assert record.rows == [0, 0, 2, 3]
    prompt = read_prompt(model, family_of(model), made)
    said = (~prompt.special & ~prompt.is_visual & prompt.attended).sum(1).tolist()
    written = [len(text.replace("<image>", "").encode()) for text in texts]
    if row.name == "aya-vision":  # an image in one tile does not show how many tokens name a tile: two count as words
        assert said[:2] == written[:2]
    else:
        assert said == written
