"""Every way of calling a model, against the oracle (see oracle.py), for every family."""

from typing import Any

import pytest
import torch
from models import IMAGE, FamilyRow, make_inputs
from oracle import STOCK_MIXES_UP_IMAGES, encoded_by_prompt, kept_logits, masked_inputs

from adafv import AdaFV, compress
from adafv.engines.transformers.generation import CHUNKED_PREFILL_KEEPS_IMAGES
from adafv.errors import UnsupportedCallError

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
KEEP = 0.3

BATCHES = {
    "one": ([1], "left"),
    "batch-left": ([1, 1, 1], "left"),
    "batch-right": ([1, 1], "right"),
    "several-images": ([2], "left"),
    "mixed-left": ([2, 0, 1], "left"),
    "mixed-right": ([1, 0, 2], "right"),
}

GENERATE = {
    "greedy": {},
    "sample": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "beam-sample": {"num_beams": 2, "do_sample": True},
    "return-sequences": {"num_return_sequences": 2, "do_sample": True},
    "beams-return": {"num_beams": 3, "num_return_sequences": 2},
    "static-cache": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "encoder-penalties": {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2},
    "guidance": {"guidance_scale": 1.7},
    "decaying-length": {"exponential_decay_length_penalty": (2, 1.5)},
    "chunked-prefill": {"prefill_chunk_size": 7},
}

EXPANDING = {"beams", "beam-sample", "return-sequences", "beams-return"}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_forward(family: FamilyRow, model: Any, batch: str, positions: str) -> None:
    inputs = make_inputs(family, model, *BATCHES[batch])
    with torch.no_grad(), AdaFV(keep=KEEP, positions=positions)(model) as adafv:
        pruned = model(**inputs)
    oracle = masked_inputs(inputs, adafv.last.keep_mask, positions)
    with torch.no_grad():
        expected = model(**oracle)
        full = model(**inputs)
    short = compress(model, inputs, KEEP, positions=positions)
    compared = list(
        zip(
            kept_logits(pruned.logits, short["attention_mask"]),
            kept_logits(expected.logits, oracle["attention_mask"]),
            strict=True,
        )
    )
    for mine, theirs in compared:
        torch.testing.assert_close(mine, theirs, **TOLERANCE)
    # The oracle can fail: without the mask the answer is another one.
    last = kept_logits(full.logits, inputs["attention_mask"])[0][-1]
    assert (compared[0][0][-1] - last).abs().max() > 1e-2
    assert pruned.logits.shape[1] < inputs["input_ids"].shape[1] or 0 in BATCHES[batch][0]


@pytest.mark.parametrize("mode", GENERATE)
@pytest.mark.parametrize("batch", ["one", "batch-left", "several-images", "mixed-left"])
def test_generate(family: FamilyRow, model: Any, batch: str, mode: str) -> None:
    inputs = make_inputs(family, model, *BATCHES[batch])
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, **GENERATE[mode]}
    if mode == "chunked-prefill" and not CHUNKED_PREFILL_KEEPS_IMAGES:
        with AdaFV(keep=KEEP)(model), pytest.raises(UnsupportedCallError, match="chunked prefill"):
            model.generate(**inputs, **options)
        return
    torch.manual_seed(3)
    with AdaFV(keep=KEEP)(model) as adafv:
        pruned = model.generate(**inputs, **options)
    oracle = masked_inputs(inputs, adafv.last.keep_mask)
    if mode == "chunked-prefill":
        options.pop("prefill_chunk_size")
    if STOCK_MIXES_UP_IMAGES and mode in EXPANDING:
        oracle = encoded_by_prompt(model, oracle, IMAGE)
    torch.manual_seed(3)
    expected = model.generate(**oracle, **options)
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    for mine, theirs in zip(pruned.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


@pytest.mark.parametrize("batch", ["one", "batch-left", "several-images", "mixed-left"])
def test_generate_with_original_positions(family: FamilyRow, model: Any, batch: str) -> None:
    inputs = make_inputs(family, model, *BATCHES[batch])
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    with AdaFV(keep=KEEP, positions="original")(model) as adafv:
        pruned = model.generate(**inputs, **options)
    expected = model.generate(**masked_inputs(inputs, adafv.last.keep_mask, "original"), **options)
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    for mine, theirs in zip(pruned.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


def test_generate_padded_on_the_right(family: FamilyRow, model: Any) -> None:
    """Stock transformers warns of it, and goes on; the pruned model must do the same thing."""
    inputs = make_inputs(family, model, *BATCHES["mixed-right"])
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    with AdaFV(keep=KEEP)(model) as adafv:
        pruned = model.generate(**inputs, **options)
    oracle = masked_inputs(inputs, adafv.last.keep_mask)
    del oracle["position_ids"]  # generate derives them from the mask, in its own way for trailing padding
    expected = model.generate(**oracle, **options)
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    full = inputs["attention_mask"][:, -1].bool()  # a row that ends in padding is continued from padding
    torch.testing.assert_close(pruned.logits[0][full], expected.logits[0][full], **TOLERANCE)
