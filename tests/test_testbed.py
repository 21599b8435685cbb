"""A real small model on real photographs, where the project's testbed is present (see the Makefile); skipped elsewhere."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import masked_inputs

from adafv import AdaFV, Pruner
from adafv.images import load_image

MODEL, PHOTOS = os.environ.get("ADAFV_TESTBED", ""), os.environ.get("ADAFV_PHOTOS", "")
pytestmark = pytest.mark.skipif(
    not (Path(MODEL, "config.json").is_file() and Path(PHOTOS).is_dir()), reason="the testbed is not here"
)


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(MODEL)
    processor.tokenizer.padding_side = "left"
    return processor


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def inputs(processor: Any) -> Any:
    """Two photos, two questions of different length each."""
    photos = [load_image(str(path)) for path in sorted(Path(PHOTOS).glob("*.jpg"))[:2]]
    questions = ["Is there a person in the image?", "What is in the picture? Answer in one short sentence."]
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for _ in photos
        for question in questions
    ]
    return processor(images=[p for p in photos for _ in questions], text=texts, padding=True, return_tensors="pt")


def test_oracle_on_real_weights(model: Any, processor: Any, inputs: Any) -> None:
    with torch.no_grad(), AdaFV(keep=0.1, processor=processor)(model) as adafv:
        pruned = model(**inputs, logits_to_keep=1).logits
    with torch.no_grad():
        expected = model(**masked_inputs(dict(inputs), adafv.last.keep_mask), logits_to_keep=1).logits
    assert adafv.last.tokens_after == [20] * 4
    torch.testing.assert_close(pruned, expected, atol=1e-3, rtol=1e-4)  # 30 layers, logits of tens
    assert torch.equal(pruned.argmax(-1), expected.argmax(-1))


def test_keeping_all_is_bit_equal(model: Any, processor: Any, inputs: Any) -> None:
    options = {"max_new_tokens": 3, "do_sample": False}
    stock = model.generate(**inputs, **options)
    with AdaFV(keep=1.0, processor=processor)(model):
        assert torch.equal(model.generate(**inputs, **options), stock)


def test_certificates_on_real_scores(model: Any, processor: Any, inputs: Any) -> None:
    found = {}
    for objective in ("joint", "split"):
        with torch.no_grad(), AdaFV(keep=0.05, objective=objective, processor=processor)(model) as adafv:
            model(**inputs, logits_to_keep=1)
        found[objective] = adafv.last
    assert torch.tensor(found["joint"].certificate).median() < 0.01
    for joint, split in zip(found["joint"].objective, found["split"].objective, strict=True):
        assert joint >= split * (1 - 1e-6)  # both are of float32


def test_the_question_decides_what_is_kept(model: Any, processor: Any, inputs: Any) -> None:
    """Two questions on one photo: AdaFV keeps different tokens, saliency the same."""
    with torch.no_grad(), AdaFV(keep=0.1, processor=processor)(model) as adafv:
        model(**inputs, logits_to_keep=1)
    assert any(not torch.equal(one, two) for one, two in zip(adafv.last.kept[::2], adafv.last.kept[1::2], strict=True))
    with torch.no_grad(), Pruner("saliency", keep=0.1)(model) as saliency:
        model(**inputs, logits_to_keep=1)
    assert all(
        torch.equal(one, two) for one, two in zip(saliency.last.kept[::2], saliency.last.kept[1::2], strict=True)
    )
