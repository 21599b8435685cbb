"""What a pruned call keeps alive: what the tower made of an image is gone when the language model begins, in every family.

Python's collector of cycles is off meanwhile: what waits for it stays for as long as it likes.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import FAMILIES, FamilyRow, make_inputs, noise
from torch import Tensor

from adafv import Pruner, compress, encode
from adafv.engines.transformers.releases import returned_cache
from adafv.evaluation.speed.counting import Counting, Living, tensors_of
from adafv.evaluation.speed.stages import Stages, listening

CPU = torch.device("cpu")
LLAVA = next(row for row in FAMILIES if row.name == "llava")


class AtPrefill(Stages):
    """Remembers what was alive when the stock model began."""

    def __init__(self) -> None:
        super().__init__()
        self.living = Living()
        self.made_in: dict[str, int] = {}

    def enter(self, stage: str) -> None:
        super().enter(stage)
        if self.current == "prefill" and not self.made_in:
            self.made_in = dict(self.living.made_in)


@contextmanager
def watched() -> Iterator[AtPrefill]:
    gc.collect()
    gc.disable()
    try:
        stages = AtPrefill()
        count = Counting(stages, CPU)
        stages.living = count.living
        with torch.no_grad(), listening(stages), count:
            yield stages
    finally:
        gc.enable()


def handed_over(inputs: dict[str, Any]) -> list[Tensor]:
    return tensors_of([dict(each) for each in inputs["mm_encoder_outputs"].values()])


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def held_by(tensors: list[Tensor]) -> int:
    """Of the memory that they keep, whatever else is in it."""
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def test_what_the_tower_made_is_gone(any_family: FamilyRow, any_model: Any) -> None:
    """But for the saliency, which the record shows: four bytes a token."""
    inputs = make_inputs(any_family, any_model, [1, 1])
    with watched() as stages:
        short = compress(any_model, inputs, 0.3)
    tokens, columns = sum(short.record.tokens_before), inputs["input_ids"].numel()
    made_in, handed = stages.living.made_in, handed_over(short)
    assert 0 <= made_in["tower"] <= 4 * tokens
    assert held_by(handed) == bytes_of(handed)
    scores, prompt = 2 * 4 * tokens + 8 * sum(short.record.tokens_after), 64 * columns
    assert stages.living.bytes <= bytes_of(handed) + scores + prompt


def test_an_image_that_stays_whole_does_not_hold_the_others(any_family: FamilyRow, any_model: Any) -> None:
    inputs = make_inputs(any_family, any_model, [1, 1, 1])
    sizes = compress(any_model, inputs, 0.9).record.tokens_before
    if len(set(sizes)) == 1:
        pytest.skip("all images have as many tokens")
    with torch.no_grad():
        short = compress(any_model, inputs, min(sizes))
    assert min(short.record.tokens_after) == min(sizes)
    handed = handed_over(short)
    assert held_by(handed) == bytes_of(handed)


class TestBatch:
    """Eight images of 256 tokens, 24 kept: features are most of what there is."""

    WIDTH, IMAGES, TOKENS, KEEP = 384, 8, 256, 24
    FULL = 4 * WIDTH * IMAGES * TOKENS
    KEPT = 4 * WIDTH * IMAGES * KEEP

    @pytest.fixture(scope="class")
    def model(self) -> Any:
        side = 14 * 16
        return LLAVA.build(vision={"image_size": side}, text={"hidden_size": self.WIDTH})

    @pytest.fixture(scope="class")
    def inputs(self, model: Any) -> dict[str, Any]:
        one = [1, 5, *[model.config.image_token_id] * self.TOKENS, 7, 9, 11]
        pixels = torch.stack([noise(number, 3, 224, 224) for number in range(self.IMAGES)])
        ids = torch.tensor([one]).repeat(self.IMAGES, 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    @pytest.mark.parametrize("call", ["forward", "generate"])
    def test_at_prefill_kept_features_alone_are_there(self, model: Any, inputs: dict[str, Any], call: str) -> None:
        with watched() as stages, Pruner("adafv", keep=self.KEEP)(model):
            if call == "forward":
                output = model(**inputs, logits_to_keep=1, use_cache=True)
                cache = returned_cache(output)
            else:
                output = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
                cache = returned_cache(output)
        assert stages.made_in["tower"] <= 4 * self.IMAGES * self.TOKENS
        assert self.KEPT <= sum(stages.made_in.values()) <= 1.25 * self.KEPT
        # Behind the call there are the cache, logits and the record; a cache of all tokens would be more than eight times this one.
        held = held_by(tensors_of([[layer.keys, layer.values] for layer in cache.layers]))
        columns = inputs["input_ids"].shape[1] - self.TOKENS + self.KEEP
        heads = model.config.text_config.num_key_value_heads * model.config.text_config.head_dim
        assert held == 4 * 2 * len(cache.layers) * self.IMAGES * columns * heads
        del output, cache
        assert stages.living.bytes <= 0.25 * self.KEPT

    def test_choosing_makes_no_second_copy(self, model: Any, inputs: dict[str, Any]) -> None:
        """Of images that went through the tower together, nor of one that is asked about several times."""
        with watched() as stages:
            compress(model, inputs, self.KEEP, method="saliency")
        peaks = stages.living.peaks
        assert self.FULL <= peaks["selection"] <= 1.5 * self.FULL
        assert peaks["compaction"] <= 1.5 * self.KEPT
        one = {**inputs, "pixel_values": inputs["pixel_values"][:1]}
        with torch.no_grad():
            encoded = encode(model, {**one, "input_ids": inputs["input_ids"][:1]}).repeated(self.IMAGES)
        asked = {name: value for name, value in inputs.items() if name != "pixel_values"}
        with watched() as stages:
            compress(model, {**asked, "images": encoded}, self.KEEP, method="saliency")
        assert stages.living.peaks["selection"] <= 1.5 * self.KEPT

    def test_words_are_compared_a_few_images_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On the path of a GPU, which takes float32 copies."""
        from adafv.core import scores

        text, visual = torch.randn(8, 6, 64), torch.randn(8, 256, 64).bfloat16()
        masks = torch.rand(8, 6) < 0.7, torch.rand(8, 256) < 0.7
        masks[0][:, 0] = True
        few = scores._text_attention_in_few_operations
        together = few(text, visual, *masks, 100.0)
        monkeypatch.setattr(scores, "_COPIED", 3 * 4 * 256 * 64)
        with watched() as stages:
            apart = few(text, visual, *masks, 100.0)
        torch.testing.assert_close(apart, together)
        assert stages.living.peak < 5 * 4 * 256 * 64
        torch.testing.assert_close(few(text, visual, None, None, 100.0), few(text, visual.float(), None, None, 100.0))
