"""`adafv.encode`: images that went through the tower once answer as their pixels do, and are refused once they are stale."""

import copy
import functools
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from contract import Looking, Merging
from models import END, FAMILIES, make_inputs, present, token_types, words
from oracle import VISUAL_INPUTS
from sharing import state_of

import adafv
from adafv import AdaFV, EncodedImages, Pruner, compress
from adafv.engines.transformers.encoded import digest_of
from adafv.engines.transformers.families import family_of
from adafv.errors import AdaFVError, PromptError, StaleImagesError, UnsupportedCallError

ROWS = {row.name: row for row in FAMILIES}
PLACES = present(
    "llava", "llava-next", "llava-onevision", "qwen2.5-vl", "qwen3-vl", "internvl", "mistral3", "gemma3", "idefics3"
)
DECODED = {
    "max_new_tokens": 3,
    "min_new_tokens": 3,
    "do_sample": False,
    "suppress_tokens": list(range(110, 120)),
    "return_dict_in_generate": True,
    "output_logits": True,
}
METHODS = ["adafv", "saliency", Merging(), Looking()]


def text_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in VISUAL_INPUTS}


@contextmanager
def tower_runs(model: Any) -> Iterator[list[int]]:
    """How often the tower is run meanwhile."""
    runs: list[int] = []
    towers = {id(tower): tower for tower in family_of(model).towers(model)}.values()
    handles = [tower.register_forward_hook(lambda *_: runs.append(1)) for tower in towers]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


@functools.cache
def small(name: str) -> Any:
    """A model of this row, for tests that do not change it. As long as images of it live, it has a hook."""
    return ROWS[name].build()


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Any:
    return ROWS[request.param], small(request.param)


def agree(model: Any, inputs: dict[str, Any], encoded: EncodedImages, method: Any, keep: float, **options: Any) -> None:
    """The same answers and kept tokens, bit by bit, in `generate`, `forward` and `compress`; the tower is not run."""
    with torch.no_grad(), Pruner(method, keep, **options)(model) as pruner:
        stock = model.generate(**inputs, **DECODED)
        logits, kept = model(**inputs).logits, pruner.last.kept
    for given in (text_of(inputs), inputs):
        with torch.no_grad(), tower_runs(model) as runs, Pruner(method, keep, **options)(model) as pruner:
            found = model.generate(**given, images=encoded, **DECODED)
            assert all(map(torch.equal, pruner.last.kept, kept))
            again = model(**given, images=encoded).logits
            assert all(map(torch.equal, pruner.last.kept, kept))
            short = compress(model, {**given, "images": encoded}, keep, method=method, **options)
        assert runs == []
        assert torch.equal(found.sequences, stock.sequences)
        assert torch.equal(torch.stack(found.logits), torch.stack(stock.logits))
        assert torch.equal(again.nan_to_num(), logits.nan_to_num())
        assert all(map(torch.equal, short.record.kept, kept))


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_as_the_pixels(place: Any) -> None:
    row, model = place
    inputs = make_inputs(row, model, [2, 1], seed=3)
    before = state_of(model)
    encoded = adafv.encode(model, inputs, method=METHODS)
    for method, keep in zip([*METHODS, "adafv"], [0.3, 4, 0.5, 0.3, 1.0], strict=True):
        agree(model, inputs, encoded, method, keep)
    assert len(encoded) == 3
    assert encoded.bytes > 0
    del encoded
    gc.collect()
    assert state_of(model) == before


@pytest.mark.parametrize("video", ["clip", "frame"])
@pytest.mark.parametrize("place", ["llava-onevision", "qwen2.5-vl", "qwen3-vl"], indirect=True)
def test_videos_as_their_pixels(place: Any, video: str) -> None:
    row, model = place
    inputs = make_inputs(row, model, [0, 0], videos_per_prompt=[1, 1], seed=4)
    agree(model, inputs, adafv.encode(model, inputs), "adafv", 0.3, video=video)


@pytest.mark.parametrize("place", ["llava", "qwen2.5-vl", "qwen3-vl"], indirect=True)
@pytest.mark.parametrize("second", ["text", "image"])
def test_a_chat(place: Any, second: str) -> None:
    """Encoded images of both turns are given in the second, as a processor gives the pixels of a whole conversation."""
    row, model = place
    [seen, [one]], [new, [two]] = row.images(model, [[row.sizes[0]]], 0), row.images(model, [[row.sizes[1]]], 1)
    if second == "text":
        two = []
    start = torch.tensor([[1, *words(3, 0), *one, *words(2, 1)]])
    tail = torch.tensor([[*words(3, 7), *two, *words(4, 8)]])
    both = {name: torch.cat((seen[name], new[name])) for name in seen} if two else seen
    chats = []
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [(seen, both)]
    ways.append(({"images": adafv.encode(model, seen)}, {"images": adafv.encode(model, both)}))
    for first, whole in ways:
        with AdaFV(keep=0.4)(model) as pruner:
            turn = model.generate(input_ids=start, **token_types(row, start), **first, **DECODED)
            chat = torch.cat((turn.sequences, tail), 1)
            cache = turn.past_key_values
            found = model.generate(input_ids=chat, **token_types(row, chat), **whole, past_key_values=cache, **DECODED)
            kept = pruner.last.kept if two else []
        chats.append((torch.stack(found.logits), turn.sequences, found.sequences, *kept))
    logits, *exact = zip(*chats, strict=True)
    assert all(torch.equal(*pair) for pair in exact)
    # Of the pixels the second turn reads the new image alone. Of one image some CPUs round otherwise than of two.
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-5)


def test_one_image_for_many_questions() -> None:
    model = small("llava")
    inputs = make_inputs(ROWS["llava"], model, [1, 1, 1])
    pixels = inputs["pixel_values"][:1]
    inputs["pixel_values"] = pixels.expand(3, -1, -1, -1)
    encoded = adafv.encode(model, {"pixel_values": pixels})
    many = encoded.repeated(3)
    assert many.images["image"][0].features.data_ptr() == many.images["image"][2].features.data_ptr()
    with torch.no_grad(), AdaFV(keep=5)(model) as pruner:
        expected, kept = model(**inputs).logits, pruner.last.kept
        found = model(**text_of(inputs), images=many).logits
        assert all(map(torch.equal, pruner.last.kept, kept))
        torch.testing.assert_close(found, expected, equal_nan=True)  # the tower ran on one, not on three
        for count in (2, 4):
            with pytest.raises(PromptError):
                model(**text_of(inputs), images=encoded.repeated(count))
    with pytest.raises(PromptError, match="only one image can be repeated, and these are 3"):
        many.repeated(2)


@pytest.mark.parametrize("made", [copy.copy, copy.deepcopy, lambda encoded: pickle.loads(pickle.dumps(encoded))])
def test_copies(made: Callable[[Any], Any]) -> None:
    model = small("qwen3-vl")
    inputs = make_inputs(ROWS["qwen3-vl"], model, [1])
    encoded = adafv.encode(model, inputs)
    agree(model, inputs, made(encoded), "adafv", 5)
    agree(model, inputs, encoded.to("cpu"), "adafv", 5)
    elsewhere = encoded.to("meta")
    assert {image.features.device.type for image in elsewhere.images["image"]} == {"meta"}


# ---------------------------------------------------------------------------------------------------------- stale


def optimizer_step(model: Any) -> None:
    weight = model.model.multi_modal_projector.linear_1.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def other_weights(model: Any) -> None:
    model.load_state_dict(ROWS["llava"].build(seed=5).state_dict())


def through_data(model: Any) -> None:
    other = ROWS["llava"].build(seed=5).model.vision_tower
    for weight, value in zip(model.model.vision_tower.parameters(), other.parameters(), strict=True):
        weight.data.copy_(value)


def one_matrix_through_data(model: Any) -> None:
    model.model.vision_tower.get_submodule("encoder.layers.1.mlp.fc1").weight.data += 0.01


def another_tensor(model: Any) -> None:
    weight = model.model.multi_modal_projector.linear_2.weight
    weight.data = weight.data.clone()


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "optimizer": (optimizer_step, "multi_modal_projector.linear_1.weight of the model has changed"),
    "load_state_dict": (other_weights, "of the model has changed"),
    "data": (through_data, "weights of the vision tower or the projector have changed"),
    "one matrix": (one_matrix_through_data, "weights of the vision tower or the projector have changed"),
    "another tensor": (another_tensor, "linear_2.weight of the model has changed"),
    "half": (lambda model: model.to(torch.bfloat16), "has changed since .*precision"),
    "device": (lambda model: model.to("meta"), "has changed since .*device"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights(change: str) -> None:
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    encoded = adafv.encode(model, inputs)
    with torch.no_grad():
        CHANGES[change][0](model)
    refused(model, inputs, encoded, CHANGES[change][1] + ".*encode the images again")


def another_layer(model: Any) -> None:
    model.config.vision_feature_layer = -1


def smaller_steps(model: Any) -> None:
    model.config.vision_config.layer_norm_eps = 0.1


def replaced_forward(model: Any) -> None:
    projector = model.model.multi_modal_projector
    stock = projector.forward
    projector.forward = lambda *args: stock(*args) * 2


def another_activation(model: Any) -> None:
    model.model.multi_modal_projector.act = torch.nn.ReLU()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_layer, "vision_feature_layer of the model's configuration has changed since"),
        (smaller_steps, r"vision_config.layer_norm_eps of the model's configuration has changed since"),
        (replaced_forward, "a module or its forward was replaced in the vision tower or the projector since"),
        (another_activation, "a module or its forward was replaced in the vision tower or the projector since"),
    ],
)
def test_what_is_no_weight(change: Callable[[Any], None], message: str) -> None:
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    encoded = adafv.encode(model, inputs)
    change(model)
    refused(model, inputs, encoded, message + ".*encode the images again")


def test_a_class_that_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As faster kernels are put in."""
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    encoded = adafv.encode(model, inputs)
    projector = type(model.model.multi_modal_projector)
    stock = projector.forward
    monkeypatch.setattr(projector, "forward", lambda *args: stock(*args) * 2)
    refused(model, inputs, encoded, "a module or its forward was replaced")


def test_settings_that_do_not_concern_images_may_change() -> None:
    """As a Trainer aligns special tokens, and switches the cache off for checkpointing."""
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    encoded = adafv.encode(model, inputs)
    model.config.use_cache = False
    model.config.pad_token_id = END
    model.config.remark = "of the caller's own"
    model.config.get_text_config().attention_dropout = 0.1
    agree(model, inputs, encoded, "adafv", 4)


def test_another_model_where_this_one_lay() -> None:
    """On an accelerator the next checkpoint gets the memory of the last one; they may share a tower, and what is sampled."""
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    encoded, other = adafv.encode(model, inputs), copy.deepcopy(model)
    for weight, before in zip(other.parameters(), model.parameters(), strict=True):
        weight.data = before.data
    for buffer, before in zip(other.buffers(), model.buffers(), strict=True):
        buffer.data = before.data
    refused(other, inputs, encoded, "encoded by another model, or by this one in another process")
    agree(model, inputs, encoded, "adafv", 4)


def test_a_copy_of_a_model_with_encoded_images_is_refused_by_that_name() -> None:
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    encoded = adafv.encode(model, inputs)
    refused(copy.deepcopy(model), inputs, encoded, "before it was copied; encode the images again")


def test_dropout_in_training() -> None:
    """One draw would stand for all calls, also of a model that is put back into evaluation."""
    model = ROWS["llava"].build(vision={"attention_dropout": 0.5}).train()
    inputs = make_inputs(ROWS["llava"], model, [1])
    with pytest.raises(UnsupportedCallError, match=r"drops out at random \(dropout=0.5\).*call model.eval\(\) before"):
        adafv.encode(model, inputs)
    agree(model.eval(), inputs, adafv.encode(model, inputs), "adafv", 4)
    model.model.multi_modal_projector.act = torch.nn.Dropout(0.1)
    with pytest.raises(UnsupportedCallError, match=r"multi_modal_projector.act is in training mode .*\(p=0.1\)"):
        adafv.encode(model.train(), inputs)


@pytest.mark.parametrize("place", present("llava-next", "qwen2.5-vl", "qwen3-vl"), indirect=True)
def test_inputs_that_are_written_to_later(place: Any) -> None:
    row, model = place
    inputs, later = (make_inputs(row, model, [2, 1]) for _ in range(2))
    encoded = adafv.encode(model, later)
    for name, value in later.items():
        if name in VISUAL_INPUTS:
            value.fill_(1)
    agree(model, inputs, encoded, "adafv", 4)


def refused(
    model: Any, inputs: dict[str, Any], encoded: EncodedImages, message: str, error: type[AdaFVError] = StaleImagesError
) -> None:
    with AdaFV(keep=4)(model), tower_runs(model) as runs:
        for call in (model, lambda **given: model.generate(**given, max_new_tokens=1)):
            with pytest.raises(error, match=message):
                call(**text_of(inputs), images=encoded)
    assert runs == []


def test_the_language_model_may_change() -> None:
    """Encoded images do not depend on it; the words that are compared with them are looked up anew."""
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    encoded = adafv.encode(model, inputs)
    with torch.no_grad():
        for weight in (*model.model.language_model.parameters(), *model.lm_head.parameters()):
            weight.mul_(1.1)
    agree(model, inputs, encoded, "adafv", 4)


def test_adapters_of_the_tower() -> None:
    peft = pytest.importorskip("peft")
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    plain = adafv.encode(model, inputs)
    options = peft.LoraConfig(r=2, target_modules=r".*vision.*(q_proj|fc1)", init_lora_weights=False)
    adapted = peft.get_peft_model(model, options)
    base = adapted.get_base_model()
    refused(base, inputs, plain, "other parameters or adapters")
    encoded = adafv.encode(adapted, inputs)
    agree(base, inputs, encoded, "adafv", 4)
    with adapted.disable_adapter():
        refused(base, inputs, encoded, "adapters of the vision tower were switched or merged")
    agree(base, inputs, encoded, "adafv", 4)
    adapted.merge_adapter()
    refused(base, inputs, encoded, "adapters .* merged|has changed|have changed")
    adapted.unmerge_adapter()
    adapted.add_adapter("other", options)
    refused(base, inputs, encoded, "other parameters or adapters")
    encoded = adafv.encode(adapted, inputs)
    adapted.eval()
    named = {**text_of(inputs), "images": encoded, "adapter_names": ["other"]}
    with torch.no_grad(), AdaFV(keep=4)(base):
        for call in (adapted, lambda **given: adapted.generate(**given, max_new_tokens=1)):
            with pytest.raises(UnsupportedCallError, match=r"adapter_names= gives each prompt .*pass the pixels"):
                call(**named)


# --------------------------------------------------------------------------------------------------------- refused


def test_other_pixels_and_settings() -> None:
    row = ROWS["llava-next"]
    model = small(row.name)
    inputs, other = make_inputs(row, model, [1], seed=0), make_inputs(row, model, [1], seed=3)
    encoded = adafv.encode(model, inputs)
    with AdaFV(keep=4)(model):
        with pytest.raises(StaleImagesError, match=r"pixel_values is passed beside images= and differs"):
            model(**{**inputs, "pixel_values": other["pixel_values"]}, images=encoded)
        with pytest.raises(StaleImagesError, match=r"image_sizes is passed beside images= and differs.*setting"):
            model(**{**inputs, "image_sizes": inputs["image_sizes"] + 2}, images=encoded)
        with pytest.raises(StaleImagesError, match="vision_feature_layer is passed beside"):
            model(**inputs, images=encoded, vision_feature_layer=-1)
        deeper = adafv.encode(model, {**inputs, "vision_feature_layer": -1})
        with pytest.raises(StaleImagesError, match=r"vision_feature_layer was given to .*, but not to this call"):
            model(**inputs, images=deeper)
        with torch.no_grad():
            expected = model(**inputs, vision_feature_layer=-1).logits
            for given in ({}, {**inputs, "vision_feature_layer": -1}):
                found = model(**{**text_of(inputs), **given}, images=deeper).logits
                assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_numbers_in_a_row_are_not_run_together() -> None:
    assert digest_of([[1, 23]]) != digest_of([[12, 3]])
    assert digest_of({"sizes": [(1, 23)]}) == digest_of({"sizes": [[1, 23]]})


def test_another_family() -> None:
    one, other = small("llava"), small("llava-next")
    encoded = adafv.encode(one, make_inputs(ROWS["llava"], one, [1]))
    refused(other, make_inputs(ROWS["llava-next"], other, [1]), encoded, "encoded for LLaVA-1.5, but the model is")


def test_another_model_of_the_family() -> None:
    one, other = ROWS["llava"].build(), ROWS["llava"].build(seed=1)
    inputs = make_inputs(ROWS["llava"], one, [1])
    refused(other, inputs, adafv.encode(one, inputs), "were encoded by another model")


def test_what_the_method_needs_was_not_read() -> None:
    model = small("llava")
    inputs = make_inputs(ROWS["llava"], model, [1])
    encoded = adafv.encode(model, inputs, method="random")
    refused(model, inputs, encoded, r"without saliency, which the method adafv needs; .*method='adafv'")
    agree(model, inputs, encoded, "uniform", 4)


def test_what_choosing_crops_needs_was_not_read() -> None:
    """The message names the method that it can be read for: the one that chooses tokens needs none."""
    model = small("llava-next")
    inputs = make_inputs(ROWS["llava-next"], model, [1])
    text = {name: value for name, value in inputs.items() if name not in VISUAL_INPUTS}
    with torch.no_grad(), Pruner("random", 4, crops=1)(model):
        with pytest.raises(StaleImagesError, match=r"which choosing crops needs; .*method=\['random', 'saliency'\]"):
            model(**text, images=adafv.encode(model, inputs, method="random"))
        model(**text, images=adafv.encode(model, inputs, method=["random", "saliency"]))


def test_lower_resolution() -> None:
    model = small("llava")
    inputs = make_inputs(ROWS["llava"], model, [1])
    encoded = adafv.encode(model, inputs)
    with Pruner("downsample", keep=4)(model), pytest.raises(UnsupportedCallError, match="encoded already"):
        model(**text_of(inputs), images=encoded)


@pytest.mark.parametrize("shown", [[1, 1], [3], [0]])
def test_another_number_of_images_than_the_prompt_shows(shown: list[int]) -> None:
    model = small("llava")
    encoded = adafv.encode(model, make_inputs(ROWS["llava"], model, [1] if shown != [1, 1] else [3]))
    inputs = make_inputs(ROWS["llava"], model, shown)
    refused(model, inputs, encoded, "", PromptError)


def test_no_image() -> None:
    with pytest.raises(PromptError, match="no image to encode: give pixel_values"):
        adafv.encode(small("llava"), {"input_ids": torch.tensor([[1, 2]])})


def test_outside_a_wrapped_model() -> None:
    """The stock `forward` ignores what it does not know, and would answer as if there were no image."""
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    encoded = adafv.encode(model, inputs)
    copied = pickle.loads(pickle.dumps(encoded))
    with pytest.raises(UnsupportedCallError, match="the stock model would ignore it"):
        model(**text_of(inputs), images=encoded)
    with pytest.raises(ValueError, match="images"):
        model.generate(**text_of(inputs), images=encoded)
    with pytest.raises(UnsupportedCallError, match="the stock model would ignore it"):
        model.forward(**text_of(inputs), images=encoded)  # no hook of the model itself is asked
    with pytest.raises(UnsupportedCallError, match="the stock model would ignore it"):
        model.model(**text_of(inputs), images=encoded)
    moved = encoded.to("cpu")
    del encoded
    gc.collect()
    with pytest.raises(UnsupportedCallError, match="the stock model would ignore it"):
        model(**text_of(inputs), images=moved)
    del moved
    gc.collect()
    assert not model._forward_pre_hooks
    assert not model.model._forward_pre_hooks
    with torch.no_grad(), AdaFV(keep=4)(model):
        model(**text_of(inputs), images=copied)


@pytest.mark.parametrize(
    "call",
    [{"images": "list"}, {"encoded_images": "one"}, {"images": "named"}, {"images": "nested"}, {"images": "parts"}],
    ids=str,
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_nothing_reads_is_refused(call: dict[str, str], wrapped: bool) -> None:
    """The stock model ignores arguments that it does not know, and would answer without the image."""
    row = ROWS["llava"]
    model = row.build()
    inputs = make_inputs(row, model, [1])
    encoded = adafv.encode(model, inputs)
    ways = {"list": [encoded], "one": encoded, "named": {"image": encoded}, "nested": [[encoded]]}
    ways["parts"] = encoded.images["image"]
    given = {name: ways[how] for name, how in call.items()}
    bare = {name: value for name, value in inputs.items() if name not in VISUAL_INPUTS}
    with torch.no_grad():
        if wrapped:
            AdaFV(keep=4)(model).enable()
        with pytest.raises(UnsupportedCallError, match="read as images= alone"):
            model(**bare, **given)
        with pytest.raises(UnsupportedCallError, match="read as images= alone"):
            compress(model, {**bare, **given}, 4)


def test_pictures_under_the_name_of_encoded_ones() -> None:
    model = small("llava")
    inputs = make_inputs(ROWS["llava"], model, [1])
    given = {**text_of(inputs), "images": inputs["pixel_values"]}
    with torch.no_grad(), AdaFV(keep=4)(model):
        for call in (
            model,
            lambda **given: model.generate(**given, max_new_tokens=1),
            lambda **given: compress(model, given, 4),
        ):
            with pytest.raises(UnsupportedCallError, match=r"takes what adafv.encode returned, and this is a Tensor"):
                call(**given)


def test_training_of_what_has_no_gradients_is_refused() -> None:
    row = ROWS["llava"]
    model = row.build().train()
    inputs = make_inputs(row, model, [1])
    encoded = adafv.encode(model, inputs)
    bare = {name: value for name, value in inputs.items() if name not in VISUAL_INPUTS}
    with AdaFV(keep=4)(model):
        with pytest.raises(UnsupportedCallError, match="would not be trained; pass the pixels, or freeze"):
            model(**bare, images=encoded)
        for part in (model.model.vision_tower, model.model.multi_modal_projector):
            part.requires_grad_(False)
        encoded = adafv.encode(model, inputs)
        model(**bare, images=encoded).logits[:, -1].sum().backward()
    assert model.get_input_embeddings().weight.grad is not None


def test_images_that_another_thread_drops_while_a_model_is_looked_at() -> None:
    """With them goes a hook on the model, amid the others."""
    model = ROWS["llava"].build()
    inputs = make_inputs(ROWS["llava"], model, [1])
    held: list[EncodedImages] = []

    class Dropping:
        @property
        def keywords(self) -> dict[str, Any]:
            held.clear()
            return {}

        def __call__(self, *_: Any) -> None: ...

    model.model.register_forward_pre_hook(Dropping())
    held.append(adafv.encode(model, inputs))
    assert len(model.model._forward_pre_hooks) == 2
    agree(model, inputs, adafv.encode(model, inputs), "adafv", 4)
    assert not held


def test_gradients_of_the_pixels_are_refused() -> None:
    model = small("llava")
    inputs = make_inputs(ROWS["llava"], model, [1])
    encoded = adafv.encode(model, inputs)
    pixels = inputs["pixel_values"].clone().requires_grad_()
    with AdaFV(keep=4)(model):
        with pytest.raises(
            UnsupportedCallError, match="no gradients, and pixel_values asks for them; leave images= out"
        ):
            model(**{**inputs, "pixel_values": pixels}, images=encoded)
        assert not encoded.holds(model, {**inputs, "pixel_values": pixels})
        with torch.no_grad():
            model(**{**inputs, "pixel_values": pixels}, images=encoded)
            assert encoded.holds(model, {**inputs, "pixel_values": pixels})


@pytest.mark.parametrize("place", present("gemma3", "paligemma", "ovis2"), indirect=True)
def test_generation_that_a_family_refuses(place: Any) -> None:
    """With encoded images as with pixels: else some answer as if they were shown other images."""
    row, model = place
    inputs = make_inputs(row, model, [1])
    with AdaFV(keep=0.9)(model):
        for given in (inputs, {**text_of(inputs), "images": adafv.encode(model, inputs)}):
            with pytest.raises(UnsupportedCallError, match="leave prefill_chunk_size out"):
                model.generate(**given, **DECODED, prefill_chunk_size=3)
