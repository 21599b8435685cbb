"""`remember=`: images that the wrapper keeps by itself answer as their pixels do, and never after something has changed."""

import copy
import gc
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import Looking
from models import FamilyRow, make_inputs
from test_encoded import CHANGES, DECODED, ROWS, small, text_of, tower_runs

import adafv
from adafv import AdaFV, ImageStore, Pruner
from adafv.errors import OptionError, UnsupportedCallError

STORE = "100MB"


def answered(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits.nan_to_num()


def inputs_of(name: str, images: list[int], seed: int = 0) -> tuple[Any, dict[str, Any]]:
    model = small(name)
    return model, make_inputs(ROWS[name], model, images, seed=seed)


def test_every_family(any_family: FamilyRow, any_model: Any) -> None:
    """The second call runs no tower, and is the call without a store, bit by bit; so is a third, of some of the pictures."""
    both = make_inputs(any_family, any_model, [1, 1], seed=5)
    alone = make_inputs(any_family, any_model, [1], seed=5)
    stock = answered(any_model, both)
    with AdaFV(keep=0.4)(any_model) as pruner:
        expected, kept = answered(any_model, both), pruner.last.kept
        of_one = answered(any_model, alone)
    store = ImageStore(STORE)
    whole = AdaFV(keep=1.0, remember=store)(any_model)  # gives the model the images in the store, not parts of them
    with tower_runs(any_model) as runs, AdaFV(keep=0.4, remember=store)(any_model) as pruner:
        assert torch.equal(answered(any_model, both), expected)
        assert pruner.last.remembered == [False, False]
        first = len(runs)
        for _ in range(2):
            assert torch.equal(answered(any_model, both), expected)
            assert all(map(torch.equal, pruner.last.kept, kept))
            assert pruner.last.remembered == [True, True]
        assert len(runs) == first > 0
        assert (store.hits, store.misses) == (4, 2)
        found = answered(any_model, alone)
        assert pruner.last.remembered == [True]
        torch.testing.assert_close(found, of_one)  # it was encoded in a batch
        pruner.disable()
        with whole:
            for _ in range(2):
                assert torch.equal(answered(any_model, both), stock)
        assert len(runs) == first


@pytest.mark.parametrize("name", ["llava-onevision", "qwen2.5-vl"])
@pytest.mark.parametrize("video", ["clip", "frame"])
def test_videos(name: str, video: str) -> None:
    model = small(name)
    inputs = make_inputs(ROWS[name], model, [1, 0], videos_per_prompt=[0, 1], seed=4)
    options = {"keep": 0.3, "video": video}
    with AdaFV(**options)(model):
        expected = answered(model, inputs)
    with AdaFV(**options, remember=STORE)(model) as pruner, tower_runs(model) as runs:
        assert torch.equal(answered(model, inputs), expected)
        before = len(runs)
        assert torch.equal(answered(model, inputs), expected)
        assert len(runs) == before
        assert all(pruner.last.remembered)


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen2.5-vl", "idefics3"])
def test_of_a_batch_the_unknown_ones_alone_are_encoded(name: str) -> None:
    """Whatever the shapes of the others are: crops of LLaVA-NeXT are filled up to the longest row of a batch."""
    model, both = inputs_of(name, [2])
    whole = small(name)
    _, one = inputs_of(name, [1])
    with AdaFV(keep=0.4)(model):
        expected = answered(model, both)
    with AdaFV(keep=0.4, remember=STORE)(whole) as pruner:
        answered(model, one)
        found = answered(model, both)
        assert pruner.last.remembered == [True, False]
        torch.testing.assert_close(found, expected)
        assert (pruner.remembered.hits, pruner.remembered.misses) == (1, 2)


def test_a_picture_that_stands_in_a_batch_several_times_is_encoded_once() -> None:
    model, inputs = inputs_of("llava", [1, 1, 1])
    first, other = inputs["pixel_values"][:2]
    inputs["pixel_values"] = torch.stack((other, first, other))
    with AdaFV(keep=0.4)(model):
        expected = answered(model, inputs)
    seen = []
    look = lambda _, args, kwargs: seen.append((args, kwargs))  # noqa: E731
    handle = model.model.vision_tower.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with AdaFV(keep=0.4, remember=STORE)(model) as pruner:
            torch.testing.assert_close(answered(model, inputs), expected)
            assert pruner.last.remembered == [False, False, True]
            assert len(pruner.remembered) == 2
            answered(model, inputs)
    finally:
        handle.remove()
    [(args, kwargs)] = seen
    pixels = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    assert torch.equal(pixels, torch.stack((other, first)))


def test_images_that_cannot_be_encoded_alone() -> None:
    """OneVision cuts the only image of a prompt into crops, and several not: such a call is known as a whole."""
    model, inputs = inputs_of("llava-onevision", [2])
    side = model.config.vision_config.image_size
    inputs |= {"batch_num_images": torch.tensor([2]), "pixel_values": torch.randn(2, 1, 3, side, side)}
    tokens = (side // model.config.vision_config.patch_size) ** 2 + 1
    image = model.config.image_token_id
    inputs = {name: inputs[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
    row = [1, 5, *[image] * tokens, 6, *[image] * tokens, 7, 8, 9]
    inputs |= {"input_ids": torch.tensor([row])}
    with AdaFV(keep=0.4)(model):
        expected = answered(model, inputs)
    with AdaFV(keep=0.4, remember=STORE)(model) as pruner, tower_runs(model) as runs:
        for _ in range(2):
            assert torch.equal(answered(model, inputs), expected)
        assert len(runs) == 1
        assert pruner.last.remembered == [True, True]
        swapped = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
        answered(model, swapped)
        assert pruner.last.remembered == [False, False]


def test_what_another_method_needs_is_read_then_and_stays() -> None:
    model, inputs = inputs_of("llava", [1])
    store = ImageStore(STORE)
    for method, misses in zip(
        ("random", "saliency", Looking(), "saliency", "adafv", "random"), (1, 2, 3, 3, 3, 3), strict=True
    ):
        with Pruner(method, 4)(model):
            expected = answered(model, inputs)
        with Pruner(method, 4, remember=store)(model):
            assert torch.equal(answered(model, inputs), expected)
        assert store.misses == misses
    assert len(store) == 1


def test_budgets_questions_and_the_next_turn() -> None:
    model, inputs = inputs_of("llava", [1])
    text = text_of(inputs)
    store = ImageStore(STORE)
    with tower_runs(model) as runs:
        for keep in (2, 0.5, "all"):
            for seed in (0, 7):
                asked = {**make_inputs(ROWS["llava"], model, [1], seed=seed), "pixel_values": inputs["pixel_values"]}
                with AdaFV(keep=keep, remember=store)(model):
                    found = model.generate(**asked, **DECODED)
                    turn = torch.cat((found.sequences, text["input_ids"][:, :2]), 1)
                    again = {"input_ids": turn, "pixel_values": inputs["pixel_values"]}
                    model.generate(**again, past_key_values=found.past_key_values, **DECODED)
        assert len(runs) == 1


def test_downsampling_and_encoded_images_pass_it_by() -> None:
    model, inputs = inputs_of("llava", [1])
    store = ImageStore(STORE)
    with Pruner("downsample", keep=4)(model):
        expected = answered(model, inputs)
    with Pruner("downsample", keep=4, remember=store)(model) as pruner:
        assert torch.equal(answered(model, inputs), expected)
        assert pruner.last.remembered == [False]
    with AdaFV(keep=4, remember=store)(model), tower_runs(model) as runs:
        images = adafv.encode(model, inputs)
        answered(model, {**text_of(inputs), "images": images})
        assert len(runs) == 1
    assert (store.hits, store.misses, len(store)) == (0, 0, 0)


def test_compress() -> None:
    model, inputs = inputs_of("llava", [1])
    store = ImageStore(STORE)
    with tower_runs(model) as runs:
        one, other = (adafv.compress(model, inputs, 4, remember=store) for _ in range(2))
        assert len(runs) == 1
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert other.record.remembered == [True]
    with pytest.raises(OptionError, match="in a store that outlives it; make one"):
        adafv.compress(model, inputs, 4, remember="512MB")


# --------------------------------------------------------------------------------------------------------- never stale


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "device"])
def test_other_weights(change: str) -> None:
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    with AdaFV(keep=4, remember=STORE)(model) as pruner:
        answered(model, inputs)
        with torch.no_grad():
            CHANGES[change][0](model)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        found = answered(model, inputs)
        assert pruner.last.remembered == [False]
        assert len(pruner.remembered) == 1  # what was known before is of no use, and holds no memory
    with AdaFV(keep=4)(model):
        assert torch.equal(found, answered(model, inputs))


def other_layer(model: Any) -> None:
    model.config.vision_feature_layer = -1


def steered(model: Any) -> None:
    model.model.multi_modal_projector.register_forward_hook(lambda *args: args[-1] + 1)


def replaced(model: Any) -> None:
    projector = model.model.multi_modal_projector
    stock = projector.forward
    projector.forward = lambda *args, **kwargs: stock(*args, **kwargs) * 2


@pytest.mark.parametrize("change", [other_layer, steered, replaced])
def test_what_is_no_weight(change: Callable[[Any], None]) -> None:
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    with AdaFV(keep=4, remember=STORE)(model) as pruner:
        before = answered(model, inputs)
        change(model)
        found = answered(model, inputs)
        assert pruner.last.remembered == [False]
        assert not torch.equal(before, found)


def test_options_of_the_call_and_autocast() -> None:
    model, inputs = inputs_of("llava", [1])
    with AdaFV(keep=4, remember=STORE)(model) as pruner:
        answered(model, inputs)
        answered(model, {**inputs, "vision_feature_layer": -1})
        assert pruner.last.remembered == [False]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answered(model, inputs)
        assert pruner.last.remembered == [False]
        answered(model, inputs)
        assert pruner.last.remembered == [True]


def test_an_offloaded_tower() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    with AdaFV(keep=4)(model):
        expected = answered(model, inputs)
    accelerate.cpu_offload(model.model.vision_tower, execution_device=torch.device("cpu"))
    with AdaFV(keep=4, remember=STORE)(model) as pruner:
        for known in (False, True):
            assert torch.equal(answered(model, inputs), expected)
            assert pruner.last.remembered == [known]


def test_models_that_share_a_store_share_no_image() -> None:
    store = ImageStore(STORE)
    one, other = ROWS["llava"].build(), ROWS["llava"].build(seed=1)
    inputs = make_inputs(ROWS["llava"], one, [1])
    with AdaFV(keep=4)(other):
        expected = answered(other, inputs)
    with AdaFV(keep=4, remember=store)(one), Pruner("adafv", 4, remember=store)(other):
        answered(one, inputs)
        assert torch.equal(answered(other, inputs), expected)
        assert (len(store), store.hits) == (2, 0)
        answered(one, inputs)
        assert store.hits == 1
    held = store.bytes
    del one
    gc.collect()
    assert (len(store), store.bytes) == (1, held // 2)


def test_training() -> None:
    """Nothing is kept or looked up while tower or projector learn, or drop out."""
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    outside = (model.model.vision_tower, model.model.multi_modal_projector)
    with AdaFV(keep=4, remember=STORE)(model) as pruner:
        answered(model, inputs)
        with pytest.warns(
            UserWarning, match="keeps nothing while tower or projector get gradients; run under torch.no_grad"
        ):
            model(**inputs).logits[:, -1].sum().backward()
        weights = [weight.grad for part in outside for weight in part.parameters()]
        assert any(grad is not None and grad.abs().sum() > 0 for grad in weights)
        model.train()
        with pytest.warns(UserWarning, match="drop out as in training; call model.eval"):
            answered(model, inputs)
        assert pruner.remembered.hits == 0
        for part in outside:
            part.requires_grad_(False).eval()
        with torch.inference_mode():
            model(**make_inputs(ROWS["llava"], model, [1], seed=3))
        for seed in (0, 3):  # as a Trainer would: the language model learns, the tower does not
            model(**make_inputs(ROWS["llava"], model, [1], seed=seed)).logits[:, -1].sum().backward()
            assert pruner.last.remembered == [True]
        pixels = inputs["pixel_values"].clone().requires_grad_()
        model(**{**inputs, "pixel_values": pixels}).logits[:, -1].sum().backward()
        assert pixels.grad is not None


@pytest.mark.release  # 9 seconds to import PEFT; what a fingerprint knows of adapters is in test_encoded.py
def test_adapters_that_are_switched() -> None:
    peft = pytest.importorskip("peft")
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    options = peft.LoraConfig(r=2, target_modules=r".*vision.*(q_proj|fc1)", init_lora_weights=False)
    adapted = peft.get_peft_model(model, options)
    base = adapted.eval().get_base_model()
    with AdaFV(keep=4, remember=STORE)(adapted) as pruner:
        on = answered(base, inputs)
        with adapted.disable_adapter():
            assert not torch.equal(answered(base, inputs), on)
        assert torch.equal(answered(base, inputs), on)
        assert pruner.remembered.hits == 0
        assert torch.equal(answered(base, inputs), on)
        assert pruner.remembered.hits == 1


def test_a_sharded_model_is_refused() -> None:
    """One process would wait for another that knows the image already."""
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    model.model.vision_tower.__class__ = type("FSDPModule", (type(model.model.vision_tower),), {})
    with AdaFV(keep=4, remember=STORE)(model), pytest.raises(UnsupportedCallError, match="wait for ever; leave it out"):
        answered(model, inputs)


# --------------------------------------------------------------------------------------------------------------- store


@pytest.mark.parametrize(
    ("size", "expected"), [("512MB", 512 * 10**6), ("1 GiB", 2**30), ("1.5kb", 1500), (10, 10), (1e9, 10**9)]
)
def test_sizes(size: Any, expected: int) -> None:
    assert ImageStore(size).capacity == expected
    assert AdaFV(keep=4, remember=size).settings.store.capacity == expected


@pytest.mark.parametrize(
    "size",
    [0, -1, True, False, 0.5, float("nan"), float("inf"), "512", "MB", "-1MB", "0MB", "lots", "", [], "1 MB of it"],
)
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(OptionError, match=r'is no size; give bytes with their unit, such as "512MB"'):
        AdaFV(keep=4, remember=size)
    with pytest.raises(OptionError):
        Pruner("random", 4, remember=size)


def test_bytes_and_what_goes_first() -> None:
    model = small("llava")
    asked = [make_inputs(ROWS["llava"], model, [1], seed=seed) for seed in range(3)]
    with AdaFV(keep=4, remember=STORE)(model) as pruner:
        answered(model, asked[0])
        one = pruner.remembered.bytes
    config, width = model.config, model.config.get_text_config().hidden_size
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    assert one == patches * (width + 1) * 4
    store = ImageStore(2 * one + 1)
    with AdaFV(keep=4, remember=store)(model) as pruner:
        for number in (0, 1, 0, 2):  # 1 is the one that was asked for longest ago
            answered(model, asked[number])
        assert (len(store), store.bytes) == (2, 2 * one)
        for number, known in ((0, True), (2, True), (1, False), (0, False)):
            answered(model, asked[number])
            assert pruner.last.remembered == [known]
        store.clear()
        assert (len(store), store.bytes) == (0, 0)
        assert "0 images, 0 of" in repr(store)


def test_nothing_of_a_batch_is_kept_alive() -> None:
    model, inputs = inputs_of("llava", [1, 1])
    with AdaFV(keep=4, remember=STORE)(model) as pruner:
        answered(model, inputs)
        for image in pruner.remembered._images._images.values():
            for held in (image.features, *image.signals.values()):
                assert held.untyped_storage().nbytes() == held.numel() * held.element_size()


def test_too_large_an_image_is_told_once() -> None:
    model, inputs = inputs_of("llava", [1])
    with AdaFV(keep=4, remember=512)(model) as pruner:
        with pytest.warns(UserWarning, match="leaves room for 512, so it is not kept; give a size with its unit"):
            answered(model, inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answered(model, inputs)
        assert (len(pruner.remembered), pruner.remembered.bytes, pruner.remembered.misses) == (0, 0, 2)


@pytest.mark.parametrize("made", [copy.copy, copy.deepcopy, lambda pruner: pickle.loads(pickle.dumps(pruner))])
def test_copies_of_a_pruner(made: Callable[[Any], Any]) -> None:
    model, inputs = inputs_of("llava", [1])
    pruner = AdaFV(keep=4, remember=STORE)
    with pruner(model):
        expected = answered(model, inputs)
    with made(pruner)(model) as other:
        assert torch.equal(answered(model, inputs), expected)
        assert other.remembered.capacity == 100 * 10**6


def test_threads() -> None:
    """A store with room for two of three pictures, asked for by four threads: every answer is right, and bytes add up."""
    model = small("llava")
    asked = [make_inputs(ROWS["llava"], model, [1], seed=seed) for seed in range(3)]
    with AdaFV(keep=4)(model):
        expected = [answered(model, inputs) for inputs in asked]
    with AdaFV(keep=4, remember=STORE)(model) as pruner:
        answered(model, asked[0])
        one = pruner.remembered.bytes
    store = ImageStore(2 * one)
    wrong: list[Any] = []

    def work(start: int) -> None:
        try:
            for step in range(12):
                number = (start + step) % 3
                if not torch.equal(answered(model, asked[number]), expected[number]):
                    wrong.append(number)
        except Exception as error:
            wrong.append(error)

    with AdaFV(keep=4, remember=store)(model):
        threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert store.hits + store.misses == 48
    assert store.bytes == len(store) * one <= store.capacity
