"""Idefics3 and SmolVLM: which tiles make an image, where they were, and what the stock processor makes of photos."""

from typing import Any

import pytest
import rows.idefics3
import rows.smolvlm
import torch
from models import IMAGE, PATCH, SIDE, FamilyRow, layouts_of, make_inputs
from rows.idefics3 import AROUND, TOKENS, WHOLE
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMModel

from adafv import AdaFV, compress
from adafv.core import patch_saliency
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.reading import read_prompt
from adafv.errors import PromptError, UnsupportedCallError, UnsupportedModelError

ROWS = [row for row in (rows.idefics3.ROW, rows.smolvlm.ROW) if row is not None]


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> FamilyRow:
    return request.param


@pytest.fixture(scope="module")
def model(row: FamilyRow) -> Any:
    return row.build()


def test_tiles_are_told_apart(row: FamilyRow, model: Any) -> None:
    inputs = make_inputs(row, model, [2, 0, 1], "right")
    layouts = layouts_of(model, inputs)
    expected = [rows.idefics3.grid(size) for size in row.sizes[:3]]
    assert [layout.tiling for layout in layouts] == [(max(down, 1), max(across, 1)) for down, across in expected]
    assert [layout.crops for layout in layouts] == [down * across + 1 for down, across in expected]


def test_images_side_by_side(row: FamilyRow, model: Any) -> None:
    """Nothing between the images but their markers."""
    entries, shown = row.images(model, [row.sizes], 0)
    ids = torch.tensor([[1, 5, *(token for tokens in shown for token in tokens), 6, 7]])
    layouts = layouts_of(model, {"input_ids": ids, **entries})
    assert [layout.tokens for layout in layouts] == [tokens.count(IMAGE) for tokens in shown]


def test_saliency_lines_up(row: FamilyRow) -> None:
    """A tower without [CLS] takes the attention a patch receives, which the model's pixel shuffle joins in squares."""
    model = row.build()
    inputs = make_inputs(row, model, [2, 1])
    family = family_of(model)
    layouts = layouts_of(model, inputs)
    visuals = {name: inputs[name] for name in family.images}
    encoded = family.encode(model, "image", visuals, layouts, signals=frozenset({SALIENCY}))
    real = inputs["pixel_values"][inputs["pixel_attention_mask"].any(-1).any(-1)]
    alone = [
        family.encode(
            model, "image", {"pixel_values": tile[None, None]}, layouts_of_one(), signals=frozenset({SALIENCY})
        )
        for tile in real
    ]
    assert encoded.saliency is not None
    torch.testing.assert_close(torch.cat(encoded.saliency), torch.cat([tile.saliency[0] for tile in alone]))
    # Turned upside down, a tower that does not know where patches are sees the same patches in other places.
    with torch.no_grad():
        model.model.vision_model.embeddings.position_embedding.weight.zero_()
    tile = real[0].unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))  # [3, rows, PATCH, columns, PATCH]
    turned = tile.flip(1, 3).flatten(-2).flatten(-3, -2)
    one, other = (
        family.encode(
            model, "image", {"pixel_values": pixels[None, None]}, layouts_of_one(), signals=frozenset({SALIENCY})
        ).saliency[0]
        for pixels in (real[0], turned)
    )
    assert one.std() > 0
    torch.testing.assert_close(one.flip(0), other)


def squares_of_patch_saliency(layer: Any, run: Any) -> torch.Tensor:
    """Saliency of the tower's last layer, from what the stock layer itself computes, as the mean over 2 x 2 patches."""
    attention, seen = layer.self_attn, {}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output))
        for name, module in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj), ("out", layer))
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    query, key, value = (seen[name].unflatten(-1, (4, -1)).transpose(1, 2) for name in "qkv")
    features = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    saliency = patch_saliency(query, key, value, features, query.shape[-1] ** -0.5)
    side = int(saliency.shape[-1] ** 0.5)
    return torch.nn.functional.avg_pool2d(saliency.view(-1, 1, side, side), 2).flatten()


def test_saliency_is_that_of_the_last_layer(row: FamilyRow, model: Any) -> None:
    inputs = make_inputs(row, model, [2, 1])
    record = compress(model, inputs, keep=0.3).record
    assert record is not None
    visuals = {name: inputs[name] for name in family_of(model).images}
    layer = model.model.vision_model.encoder.layers[-1]
    expected = squares_of_patch_saliency(layer, lambda: model.model.get_image_features(**visuals))
    torch.testing.assert_close(torch.cat(record.saliency), expected, atol=1e-6, rtol=1e-4)


def layouts_of_one() -> list[Any]:
    from adafv.core import ImageLayout

    side = int(TOKENS**0.5)
    return [ImageLayout(torch.arange(TOKENS), 1, side, side)]


@pytest.mark.parametrize(("tile", "down", "across"), [(0, 0, 3), (1, 2, 1), (-1, 3, 3)])
def test_a_patch_changes_the_token_that_the_layout_names(row: FamilyRow, tile: int, down: int, across: int) -> None:
    """Without attention a tower's patches do not mix, so one patch changes one token."""
    model = row.build()
    with torch.no_grad():
        for layer in model.model.vision_model.encoder.layers:
            layer.self_attn.out_proj.weight.zero_()
    inputs = make_inputs(row, model, [1])
    family = family_of(model)
    [layout] = layouts_of(model, inputs)
    other = inputs["pixel_values"].clone()
    other[0, tile, :, down * PATCH : (down + 1) * PATCH, across * PATCH : (across + 1) * PATCH] += 1
    features = [
        family.encode(model, "image", {"pixel_values": pixels}, [layout], signals=frozenset()).features[0]
        for pixels in (inputs["pixel_values"], other)
    ]
    [changed] = (features[0] - features[1]).abs().amax(-1).gt(1e-6).nonzero().tolist()
    crop = (tile + 1) % layout.crops  # the last tile is the whole image, which is crop 0
    assert [int(place) for place in layout.place(torch.tensor(changed))] == [crop, down // 2, across // 2]
    assert torch.equal(family.view(model, {"pixel_values": other}, [layout])[crop], other[0, tile])


def test_markers_are_nobodys_words(row: FamilyRow, model: Any) -> None:
    inputs = make_inputs(row, model, [2, 0, 1])
    special = read_prompt(model, family_of(model), inputs).special
    ids = inputs["input_ids"]
    assert special[(ids >= 110) & (ids < IMAGE)].all()
    words = ((ids > 2) & (ids != IMAGE) & ~special).sum(1)
    assert words.tolist() == [3 + 2 + 3 + 4, 4 + 4, 5 + 6 + 4]  # before, between and behind the images


def test_what_is_refused(row: FamilyRow, model: Any) -> None:
    inputs = make_inputs(row, model, [1])
    padded = inputs["pixel_attention_mask"].clone()
    padded[..., -PATCH:] = 0
    with pytest.raises(UnsupportedCallError, match="padded inside"):
        compress(model, {**inputs, "pixel_attention_mask": padded}, keep=4)
    with pytest.raises(UnsupportedCallError, match="square"):
        compress(model, {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"][..., :PATCH]}, keep=4)
    with pytest.raises(PromptError, match="placeholders"):
        compress(model, {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"][:, 1:]}, keep=4)
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == AROUND).nonzero()[:-1]] = 7
    with pytest.raises(PromptError, match="in front of an image"):
        compress(model, {**inputs, "input_ids": ids}, keep=4)
    end = int((inputs["input_ids"][0] == IMAGE).nonzero().max()) + 1
    with pytest.raises(UnsupportedCallError, match="pass input_ids"):
        compress(model, {**inputs, "input_ids": inputs["input_ids"][:, :end], "attention_mask": None}, keep=4)


def test_frames_are_images_of_their_own(row: FamilyRow, model: Any) -> None:
    """As SmolVLM's processor writes a video: words, then a marker, the token of a whole image, and its placeholders."""
    frame = [7, 8, AROUND, WHOLE, *[IMAGE] * TOKENS, AROUND]
    ids = torch.tensor([[1, *frame * 3, 9, 10]])
    record = compress(model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, 3, SIDE, SIDE)}, keep=2).record
    assert record is not None
    assert record.tokens_before == [TOKENS] * 3
    assert record.tokens_after == [2] * 3


@pytest.mark.skipif(hasattr(SmolVLMModel, "get_placeholder_mask"), reason="this release takes pruned tokens")
def test_smolvlm_of_old_releases_is_refused() -> None:
    model = rows.smolvlm.build()
    with pytest.raises(UnsupportedModelError, match="blocks of one length"), AdaFV(keep=4)(model):
        pass


# ----------------------------------------------------------------------------------------------- the stock processor


def processor_of() -> Any:
    """Idefics3's own, with a tokenizer of bytes: the places of tiles are written in several tokens."""
    from processors import tokenizer
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    size = {"longest_edge": 3 * SIDE}
    return Idefics3Processor(
        Idefics3ImageProcessorPil(size=size, max_image_size={"longest_edge": SIDE}),
        tokenizer("chatml"),
        image_seq_len=TOKENS,
    )


@pytest.mark.parametrize("splitting", [True, False])
@pytest.mark.parametrize("words_as", ["bytes", "tokens"])
def test_layouts_are_those_of_the_stock_processor(splitting: bool, words_as: str) -> None:
    from processors import photo

    processor = processor_of()
    if words_as == "tokens":  # as SmolVLM's tokenizer does
        places = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
        processor.tokenizer.add_tokens([*places, "<global-img>", "\n\n"], special_tokens=True)
    sizes = [[(480, 640), (1200, 300)], [], [(60, 60)], [(900, 1600)]]
    photos = [[photo(0, width, height) for height, width in prompt] for prompt in sizes]
    texts = ["first <image> second<image> and?", "no image here", "<image>what", "see <image> this"]
    made = processor(
        text=texts, images=photos, padding=True, return_tensors="pt", images_kwargs={"do_image_splitting": splitting}
    )
    table = len(processor.tokenizer)
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    model = rows.idefics3.build()
    model.resize_token_embeddings(table)
    model.config.image_token_id = image_token
    record = compress(model, dict(made), keep=3).record
    assert record is not None
    grids = []
    for height, width in (size for prompt in sizes for size in prompt):
        _, down, across = processor.image_processor.get_number_of_image_patches(
            height, width, {"do_image_splitting": splitting}
        )
        grids.append((down, across))
    assert [layout.tiling for layout in record.layouts] == [(max(down, 1), max(across, 1)) for down, across in grids]
    assert record.tokens_before == [(down * across + 1) * TOKENS for down, across in grids]
    assert record.rows == [0, 0, 2, 3]
    # What counts as text is what the user wrote, bytes that they are.
    prompt = read_prompt(model, family_of(model), made)
    said = (~prompt.special & ~prompt.is_visual & prompt.attended).sum(1).tolist()
    assert said == [len(text.replace("<image>", "").encode()) for text in texts]
