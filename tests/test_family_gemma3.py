"""Gemma 3: what its row in the test table cannot show: a narrow window, continued caches, pooling, and the processor."""

from typing import Any

import pytest
import torch
from models import END, IMAGE, PATCH, SIDE, make_inputs, token_types, words
from oracle import masked_inputs
from PIL import Image
from rows.gemma3 import ROW, build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3Processor, PreTrainedTokenizerFast, StaticCache
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from adafv import AdaFV, Pruner, compress
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.towers import TappedTower
from adafv.errors import UnsupportedCallError, UnsupportedModelError

DECODED = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, "suppress_tokens": [IMAGE]}
WINDOW = 8


def masks_by_hand(types: torch.Tensor, attended: torch.Tensor, window: int) -> dict[str, torch.Tensor]:
    """What each token of a prompt may look at, token by token, from the description of the model."""
    batch, length = types.shape
    full, sliding = (torch.zeros(batch, 1, length, length, dtype=torch.bool) for _ in range(2))
    for row in range(batch):
        image = [-1] * length
        for column in range(length):
            if types[row, column] == 1:
                continues = column > 0 and types[row, column - 1] == 1
                image[column] = image[column - 1] if continues else column
        for query in range(length):
            for key in range(length):
                own_image = image[query] >= 0 and image[query] == image[key]
                sees = bool(attended[row, key]) and (key <= query or own_image)
                full[row, 0, query, key] = sees
                sliding[row, 0, query, key] = sees and key > query - window
            if not attended[row, query]:  # padding must look at something
                full[row, 0, query, query] = sliding[row, 0, query, query] = True
    return {"full_attention": full, "sliding_attention": sliding}


@pytest.mark.parametrize("per_prompt", [[1], [2], [2, 0, 1]])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_window_narrower_than_the_prompt(per_prompt: list[int], padding: str) -> None:
    """The window counts the tokens that are there: equal to the stock language model on the shorter prompt."""
    model = build(window=WINDOW)
    inputs = make_inputs(ROW, model, per_prompt, padding)
    with torch.no_grad(), AdaFV(keep=0.4)(model) as adafv:
        pruned = model(**inputs).logits
    keep, short = adafv.last.keep_mask, compress(model, inputs, 0.4)
    assert short["input_ids"].shape[1] > 2 * WINDOW
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        embeds[inputs["input_ids"] == IMAGE] = features.flatten(0, 1)
        wide = build(window=512)
        wide.load_state_dict(model.state_dict())
        for row, kept in enumerate(keep & (inputs["attention_mask"] == 1)):
            types = inputs["token_type_ids"][row, kept][None]
            everything = torch.ones_like(types)
            expected, unlimited = (
                other.lm_head(
                    other.model.language_model(
                        inputs_embeds=embeds[row, kept][None],
                        attention_mask=masks_by_hand(types, everything, window),
                    ).last_hidden_state
                )
                for other, window in ((model, WINDOW), (wide, 512))
            )
            mine = pruned[row, kept]
            torch.testing.assert_close(mine, expected[0], atol=2e-5, rtol=2e-5)
            assert (expected[0, -1] - unlimited[0, -1]).abs().max() > 1e-2  # the window matters


def test_a_narrow_window_while_decoding() -> None:
    """Sliding layers keep the last tokens of the shorter prompt alone; a forward pass over all of it agrees."""
    model = build(window=WINDOW)
    inputs = make_inputs(ROW, model, [1, 1])
    options = {**DECODED, "max_new_tokens": 16, "do_sample": False}
    with torch.no_grad(), Pruner("uniform", keep=0.4)(model):  # a choice that does not depend on the answer
        decoded = model.generate(**inputs, **options)
        sequences, new = decoded.sequences, decoded.sequences.shape[1] - inputs["input_ids"].shape[1]
        whole = {
            "input_ids": sequences,
            "attention_mask": torch.cat((inputs["attention_mask"], torch.ones(2, new, dtype=torch.long)), 1),
            "pixel_values": inputs["pixel_values"],
            **token_types(ROW, sequences),
        }
        logits = model(**whole).logits[:, -new - 1 : -1]
    for step, mine in enumerate(decoded.logits):
        unfinished = ~(sequences[:, : sequences.shape[1] - new + step + 1] == END).any(1)
        torch.testing.assert_close(mine[unfinished], logits[unfinished, step], atol=2e-5, rtol=2e-5)


def second_image(model: Any, sequences: torch.Tensor) -> dict[str, Any]:
    """The conversation with another image behind `sequences`, and that image."""
    entries, [tokens] = ROW.images(model, [[ROW.sizes[0]]], 1)
    conversation = torch.cat((sequences, torch.tensor([[*words(3, 7), *tokens, *words(4, 8)]])), 1)
    return {"input_ids": conversation, **token_types(ROW, conversation), **entries}


def test_a_static_cache_is_not_continued_with_an_image() -> None:
    """Stock transformers answers otherwise than without the cache: the image's tokens no longer look at each other."""
    model = build()
    inputs = make_inputs(ROW, model, [1])

    def one_turn(cache: Any) -> Any:
        return model.generate(**inputs, **DECODED, past_key_values=cache)

    with AdaFV(keep=0.4)(model):
        one = one_turn(StaticCache(config=model.config.get_text_config(), max_cache_len=200))
        with pytest.raises(UnsupportedCallError, match="cached tokens"):
            model.generate(**second_image(model, one.sequences), past_key_values=one.past_key_values, **DECODED)
    one = one_turn(StaticCache(config=model.config.get_text_config(), max_cache_len=200))
    both = second_image(model, one.sequences)
    continued = model.generate(**both, past_key_values=one.past_key_values, **DECODED).logits[0]
    both["pixel_values"] = torch.cat((inputs["pixel_values"], both["pixel_values"]))
    assert (continued - model.generate(**both, **DECODED).logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("types", ["all", "new"])
def test_forward_with_an_image_behind_cached_tokens(types: str) -> None:
    """`token_type_ids` are looked up from the beginning of the cache, by a model that was given those of new tokens too."""
    model = build()
    inputs = make_inputs(ROW, model, [1])
    length = inputs["input_ids"].shape[1]
    whole = second_image(model, inputs["input_ids"])
    new = {
        "input_ids": whole["input_ids"][:, length:],
        "token_type_ids": whole["token_type_ids"][:, 0 if types == "all" else length :],
        "pixel_values": whole["pixel_values"],
    }
    with torch.no_grad(), Pruner("saliency", keep=0.4)(model) as pruner:
        cache = model(**inputs, use_cache=True).past_key_values
        first = pruner.last.keep_mask
        continued = model(**new, past_key_values=cache).logits
        second = pruner.last.keep_mask
    whole["pixel_values"] = torch.cat((inputs["pixel_values"], whole["pixel_values"]))
    with torch.no_grad():
        expected = model(**masked_inputs(whole, torch.cat((first, second), 1))).logits
    torch.testing.assert_close(continued[:, -1], expected[:, -1], atol=2e-5, rtol=2e-5)


def test_saliency_and_layout_are_those_of_the_tokens() -> None:
    """A token is a square of patches: the mean of their saliencies; and what changes in a square changes its token."""
    model = build()
    family, side = family_of(model), 2 * SIDE
    images, _ = ROW.images(model, [[(side, side)] * 2], 0)
    layouts = family.layouts(model, "image", images, [])
    with torch.no_grad():
        encoded = family.encode(model, "image", images, layouts, signals=frozenset({SALIENCY}))
        tower = TappedTower(model.model.vision_tower, -1, signals=frozenset({SALIENCY}))
        tower(images["pixel_values"])
        scores = tower.read(lambda patches: list(patches.chunk(2)))[SALIENCY]
    rows = side // PATCH
    for saliency, patches, layout in zip(encoded.saliency, scores, layouts, strict=True):
        by_hand = torch.zeros(layout.tokens)
        for patch, value in enumerate(patches.tolist()):
            by_hand[patch // rows // 2 * layout.columns + patch % rows // 2] += value / 4
        torch.testing.assert_close(saliency, by_hand)
    special = images["pixel_values"].clone()
    special[0, :, 3 * PATCH : 4 * PATCH, 6 * PATCH : 7 * PATCH] += 3
    with torch.no_grad():
        changed = family.encode(model, "image", {"pixel_values": special}, layouts, signals=frozenset()).features[0]
    token = int((changed - encoded.features[0]).norm(dim=-1).argmax())
    _, row, column = layouts[0].place(torch.tensor([token]))
    assert (int(row), int(column)) == (3 // 2, 6 // 2)


def test_other_towers_are_refused() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = build()
    model.model.vision_tower = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    )
    with pytest.raises(UnsupportedModelError, match="CLIPVisionModel"):
        family_of(model)


def processor() -> Gemma3Processor:
    words_and_markers = ["<pad>", "<bos>", "<eos>", "<begin>", "<end>", "<soft>", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: number for number, token in enumerate(words_and_markers)}
    letters = Tokenizer(models.WordLevel({**vocabulary, "?": len(vocabulary)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={"boi_token": "<begin>", "eoi_token": "<end>", "image_token": "<soft>"},
    )
    side = {"height": 2 * SIDE, "width": 2 * SIDE}
    return Gemma3Processor(Gemma3ImageProcessorPil(size=side), tokenizer, image_seq_length=16)


@pytest.mark.parametrize("pan_and_scan", [False, True])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 1200), (64, 64)])
def test_what_the_stock_processor_makes(size: tuple[int, int], pan_and_scan: bool) -> None:
    """Every crop that pan and scan adds is an image with placeholders of its own, in the order of the pixels."""
    model = build(boi_token_index=3, eoi_token_index=4, image_token_index=5)
    photo = Image.effect_noise(size, 60).convert("RGB")
    inputs = processor()(
        images=photo,
        text="a b <begin> c d",
        return_tensors="pt",
        do_pan_and_scan=pan_and_scan,
        pan_and_scan_min_crop_size=100,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    crops = len(inputs["pixel_values"])
    if not pan_and_scan or size == (64, 64):
        assert crops == 1
    else:
        assert crops > 1
    layouts = family_of(model).layouts(model, "image", inputs, [])
    with torch.no_grad(), AdaFV(keep=4)(model) as adafv:
        model(**inputs)
    assert adafv.last.tokens_before == [layout.tokens for layout in layouts] == [16] * crops
    assert adafv.last.tokens_after == [4] * crops
    columns = inputs["token_type_ids"][0]
    assert torch.equal(columns == 1, inputs["input_ids"][0] == 5)


def test_layers_with_a_window_keep_a_window_of_keys() -> None:
    model = ROW.build(window=8)
    with torch.no_grad(), AdaFV(keep=0.5)(model) as adafv:
        output = model(**make_inputs(ROW, model, [1, 1]), use_cache=True)
    layers = output.past_key_values.layers
    held = sum(part.numel() * part.element_size() for layer in layers for part in (layer.keys, layer.values))
    assert held == adafv.last.kv_bytes_after
