"""What a pruned call keeps alive, moves and computes, against what it must: a slip of two is seen.

What the tower made of an image is gone when the language model begins, in every family. Python's collector of cycles is off
meanwhile: what waits for it stays for as long as it likes.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import FAMILIES, FamilyRow, make_inputs, noise
from sharing import little_to_look_through
from torch import Tensor

from adafv import Pruner, compress, encode
from adafv.core.stages import stage
from adafv.engines.transformers.releases import returned_cache
from adafv.evaluation.speed.counting import Counting, Counts, Living, tensors_of
from adafv.evaluation.speed.stages import Stages, listening

CPU = torch.device("cpu")
LLAVA = next(row for row in FAMILIES if row.name == "llava")


@pytest.fixture(scope="module", autouse=True)
def collects_often() -> Iterator[None]:
    with little_to_look_through():
        yield


class AtPrefill(Stages):
    """Remembers what was alive when the stock model began."""

    def __init__(self) -> None:
        super().__init__()
        self.living = Living()
        self.counts: dict[str, Counts] = {}
        self.made_in: dict[str, int] = {}
        self.left: dict[str, int] = {}
        """What is alive behind the call, by the stage that made it."""

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
        stages.living, stages.counts = count.living, count.counts
        with torch.no_grad(), listening(stages), count:
            yield stages
            stages.left = dict(stages.living.made_in)
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
    """But for the saliency, which the record shows: four bytes a token. And an image that stays whole holds no other."""
    inputs = make_inputs(any_family, any_model, [1, 1])
    with watched() as stages:
        short = compress(any_model, inputs, 0.3)
    before, columns = short.record.tokens_before, inputs["input_ids"].numel()
    handed = handed_over(short)
    assert 0 <= stages.left["tower"] <= 4 * sum(before)
    assert held_by(handed) == bytes_of(handed)
    scores, prompt = 2 * 4 * sum(before) + 8 * sum(short.record.tokens_after), 64 * columns
    assert sum(stages.left.values()) <= bytes_of(handed) + scores + prompt
    if len(set(before)) > 1:
        short = compress(any_model, inputs, min(before))
        handed = handed_over(short)
        assert short.record.tokens_after == [min(before)] * 2
        assert held_by(handed) == bytes_of(handed)


WIDTH, IMAGES, TOKENS, KEEP = 384, 8, 256, 24
FULL = 4 * WIDTH * IMAGES * TOKENS
KEPT = 4 * WIDTH * IMAGES * KEEP


@pytest.fixture(scope="module")
def wide() -> tuple[Any, dict[str, Any]]:
    """A model and its inputs: features are most of what there is."""
    model = LLAVA.build(vision={"image_size": 224}, text={"hidden_size": WIDTH})
    one = [1, 5, *[model.config.image_token_id] * TOKENS, 7, 9, 11]
    pixels = torch.stack([noise(number, 3, 224, 224) for number in range(IMAGES)])
    ids = torch.tensor([one]).repeat(IMAGES, 1)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class TestBatch:
    @pytest.mark.parametrize("call", ["forward", "generate"])
    def test_at_prefill_kept_features_alone_are_there(self, wide: Any, call: str) -> None:
        model, inputs = wide
        with watched() as stages, Pruner("adafv", keep=KEEP)(model):
            if call == "forward":
                output = model(**inputs, logits_to_keep=1, use_cache=True)
                cache = returned_cache(output)
            else:
                output = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
                cache = returned_cache(output)
        assert stages.made_in["tower"] <= 4 * IMAGES * TOKENS
        assert KEPT <= sum(stages.made_in.values()) <= 1.25 * KEPT
        # Then there are the cache and the logits; and the record.
        held = held_by(tensors_of([[layer.keys, layer.values] for layer in cache.layers]))
        columns = inputs["input_ids"].shape[1] - TOKENS + KEEP
        heads = model.config.text_config.num_key_value_heads * model.config.text_config.head_dim
        assert held == 4 * 2 * len(cache.layers) * IMAGES * columns * heads
        del output, cache
        assert stages.living.bytes <= 0.25 * KEPT

    def test_choosing_makes_no_second_copy(self, wide: Any) -> None:
        """Of images that went through the tower together, nor of one that is asked about several times."""
        model, inputs = wide
        with watched() as stages:
            compress(model, inputs, KEEP, method="saliency")
        peaks = stages.living.peaks
        assert FULL <= peaks["selection"] <= 1.5 * FULL
        assert peaks["compaction"] <= 1.5 * KEPT
        one = {**inputs, "pixel_values": inputs["pixel_values"][:1]}
        with torch.no_grad():
            encoded = encode(model, {**one, "input_ids": inputs["input_ids"][:1]}).repeated(IMAGES)
        asked = {name: value for name, value in inputs.items() if name != "pixel_values"}
        with watched() as stages:
            compress(model, {**asked, "images": encoded}, KEEP, method="saliency")
        assert stages.living.peaks["selection"] <= 1.5 * KEPT

    def test_no_more_arithmetic_than_tower_and_kept_tokens(self, wide: Any) -> None:
        """Counted by hand from the shapes: the layers of the tower that are read, the projector, and a prompt of K tokens."""
        model, inputs = wide
        with watched() as stages, Pruner("adafv", keep=KEEP)(model):
            model(**inputs, logits_to_keep=1, use_cache=True)
        counts, (words, columns) = stages.counts, (5, 5 + KEEP)
        encoding = tower_flops(model.config.vision_config, layers=3) + projector_flops(model)
        reading = language_flops(model.config.text_config, columns)
        comparing = IMAGES * 2 * words * TOKENS * WIDTH
        assert counts["tower"].flops == pytest.approx(encoding, rel=0.02)
        assert counts["prefill"].flops == pytest.approx(reading, rel=0.02)
        assert comparing / 2 <= counts["scores"].flops + counts["selection"].flops <= 1.1 * comparing
        assert sum(each.flops for each in counts.values()) <= 1.03 * (encoding + reading + comparing)

    def test_few_bytes_move(self, wide: Any) -> None:
        """In tower and projector no more than in the stock model, which runs a layer more; and around them."""
        model, inputs = wide
        with watched() as stages, stage("stock"):
            model.model.get_image_features(inputs["pixel_values"])
        stock = stages.counts["stock"].bytes
        moved = {}
        for method in ("saliency", "adafv"):
            with watched() as stages:
                compress(model, inputs, KEEP, method=method)
            moved[method] = {name: counts.bytes for name, counts in stages.counts.items()}
        chosen, searched = moved["saliency"], moved["adafv"]
        assert 0.6 * stock < chosen["tower"] <= 0.95 * stock
        assert 2 * KEPT <= chosen["selection"] <= 3.2 * KEPT  # read and written once
        assert chosen["compaction"] <= 1.5 * KEPT
        assert searched["scores"] <= 5.5 * FULL  # squared, summed, and multiplied with the words
        assert searched["selection"] - chosen["selection"] <= 350 * 8 * IMAGES * TOKENS

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


def tower_flops(config: Any, layers: int) -> float:
    """Of CLIP with one crop an image; a multiplication and an addition are two."""
    width, tokens = config.hidden_size, TOKENS + 1
    patches = 2 * TOKENS * 3 * config.patch_size**2 * width
    layer = 2 * tokens * (4 * width**2 + 2 * width * config.intermediate_size) + 4 * tokens**2 * width
    return IMAGES * (patches + layers * layer)


def projector_flops(model: Any) -> float:
    return IMAGES * TOKENS * 2 * (model.config.vision_config.hidden_size * WIDTH + WIDTH**2)


def language_flops(config: Any, columns: int) -> float:
    """Of Llama, causal attention in full, with the logits of one column."""
    own, shared = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    weights = WIDTH * (2 * own + 2 * shared + 3 * config.intermediate_size)
    layer = 2 * columns * weights + 4 * columns**2 * own
    return IMAGES * (config.num_hidden_layers * layer + 2 * WIDTH * config.vocab_size)
