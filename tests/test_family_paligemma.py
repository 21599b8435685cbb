"""PaliGemma: what its rows in the test table cannot show: training with a suffix, positions from one, the processor."""

from typing import Any

import pytest
import torch
from models import END, IMAGE, PATCH, SIDE, make_inputs, words
from oracle import masked_inputs
from PIL import Image
from rows.paligemma import ROW, build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from adafv import AdaFV, Pruner, compress
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.families import family_of
from adafv.errors import UnsupportedCallError

DECODED = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, "suppress_tokens": [IMAGE]}


def with_suffix(inputs: dict[str, Any], length: int = 5) -> dict[str, Any]:
    """As the processor makes them for training: the answer behind the prompt, with labels and a type of its own."""
    rows = len(inputs["input_ids"])
    suffix = torch.tensor([[*words(length - 1, 70 + row), END] for row in range(rows)])
    ids = torch.cat((inputs["input_ids"], suffix), 1)
    types = torch.cat((torch.zeros_like(inputs["input_ids"]), torch.ones_like(suffix)), 1)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(suffix)), 1)
    labels = ids.masked_fill(types == 0, -100)
    return {**inputs, "input_ids": ids, "token_type_ids": types, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("text", ["gemma", "gemma2"])
@pytest.mark.parametrize("per_prompt", [[1], [2, 1]])
def test_training_with_a_suffix(text: str, per_prompt: list[int]) -> None:
    model = build(text=text)
    inputs = with_suffix(make_inputs(ROW, model, per_prompt))
    with AdaFV(keep=0.3)(model) as adafv:
        pruned = model(**inputs)
        pruned.loss.backward()
    mine = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    expected = model(**masked_inputs(inputs, adafv.last.keep_mask))
    expected.loss.backward()
    torch.testing.assert_close(pruned.loss, expected.loss, atol=2e-5, rtol=2e-5)
    for name, parameter in model.named_parameters():
        if name in mine:
            torch.testing.assert_close(mine[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)
    # The types matter: a suffix that looks ahead sees what it should say.
    with torch.no_grad():
        ahead = model(**{**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])})
        assert (ahead.loss - model(**inputs).loss).abs() > 1e-2
    short = compress(model, inputs, 0.3)
    assert (short["token_type_ids"] == 1).sum(1).eq(5).all()


@pytest.mark.parametrize("first", ["forward", "generate"])
def test_original_positions_count_from_one(first: str) -> None:
    """`forward` and `generate` agree on where positions begin, so that either can continue the other's cache."""
    model = build()
    inputs = make_inputs(ROW, model, [1])
    question = torch.tensor([words(4, 5)])
    whole = torch.cat((inputs["input_ids"], question), 1)
    types = torch.cat((inputs["token_type_ids"], torch.ones_like(question)), 1)
    with torch.no_grad(), Pruner("uniform", keep=0.3, positions="original")(model) as pruner:
        if first == "forward":
            cache = model(**inputs, use_cache=True).past_key_values
            kept = pruner.last.keep_mask
            mine = model.generate(input_ids=whole, past_key_values=cache, **{**DECODED, "max_new_tokens": 1}).logits[0]
        else:
            one = model.generate(**inputs, **{**DECODED, "max_new_tokens": 1})
            kept, cache = pruner.last.keep_mask, one.past_key_values
            mine = model(input_ids=question, past_key_values=cache).logits[:, -1]
    mask = torch.cat((kept, torch.ones(1, 4, dtype=torch.bool)), 1)
    given = {"input_ids": whole, "token_type_ids": types, "pixel_values": inputs["pixel_values"]}
    with torch.no_grad():
        expected = model(**masked_inputs(given, mask, positions="original")).logits[:, -1]
    torch.testing.assert_close(mine[:, :IMAGE], expected[:, :IMAGE], atol=2e-5, rtol=2e-5)


def test_images_without_token_types_are_refused() -> None:
    """The stock model itself answers otherwise when the same prompt is padded."""
    model = build()
    inputs = make_inputs(ROW, model, [1])
    del inputs["token_type_ids"]
    for name in ("forward", "generate"):
        with AdaFV(keep=0.3)(model), pytest.raises(UnsupportedCallError, match="token_type_ids"):
            getattr(model, name)(**inputs)
    padded = dict(inputs)
    padded["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (2, 0))
    padded["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (2, 0))
    with torch.no_grad():
        assert (model(**inputs).logits[:, -1] - model(**padded).logits[:, -1]).abs().max() > 1e-2


def test_layout_points_to_the_patch() -> None:
    model = build()
    family = family_of(model)
    images, _ = ROW.images(model, [[(SIDE, SIDE)]], 0)
    layouts = family.layouts(model, "image", images, [])
    special = images["pixel_values"].clone()
    special[0, :, PATCH : 2 * PATCH, 3 * PATCH : 4 * PATCH] += 3
    with torch.no_grad():
        plain, changed = (
            family.encode(model, "image", {"pixel_values": pixels}, layouts, signals=frozenset({SALIENCY}))
            for pixels in (images["pixel_values"], special)
        )
    token = int((changed.features[0] - plain.features[0]).norm(dim=-1).argmax())
    _, row, column = layouts[0].place(torch.tensor([token]))
    assert (int(row), int(column)) == (1, 3)
    assert plain.saliency[0].shape == (layouts[0].tokens,)


def processor() -> PaliGemmaProcessor:
    tokens = ["<pad>", "<bos>", "<eos>", "\n", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    letters = Tokenizer(models.WordLevel({**vocabulary, "?": len(vocabulary)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = (SIDE // PATCH) ** 2
    return PaliGemmaProcessor(images, tokenizer)


@pytest.mark.parametrize("suffix", [None, "c d"])
@pytest.mark.parametrize("photos", [1, 2])
def test_what_the_stock_processor_makes(photos: int, suffix: str | None) -> None:
    made = processor()
    model = build(image_token_index=made.image_token_id)
    model.resize_token_embeddings(len(made.tokenizer))
    pictures = [Image.effect_noise(size, 60).convert("RGB") for size in ((64, 48), (100, 200))[:photos]]
    inputs = made(images=[pictures], text="<image>" * photos + " a b", suffix=suffix, return_tensors="pt")
    assert "token_type_ids" in inputs
    with torch.no_grad(), AdaFV(keep=5)(model) as adafv:
        pruned = model(**inputs)
    assert adafv.last.tokens_before == [16] * photos
    assert adafv.last.tokens_after == [5] * photos
    with torch.no_grad():
        stock = model(**masked_inputs(dict(inputs), adafv.last.keep_mask))
    torch.testing.assert_close(pruned.logits[:, -1], stock.logits[:, -1], atol=2e-5, rtol=2e-5)
