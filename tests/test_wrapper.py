"""Wrapping and unwrapping: the model is exactly what it was, whatever happened in between."""

import copy
import gc
import pickle
import random
import threading
import warnings
from typing import Any

import pytest
import torch
from models import FamilyRow, llava, make_inputs, text_config
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from adafv import AdaFV, Pruner, compress
from adafv.engines.transformers import check_transformers
from adafv.engines.transformers.towers import TAPPED_ATTENTION
from adafv.errors import (
    AdaFVError,
    AlreadyEnabledError,
    BudgetError,
    OptionError,
    PromptError,
    UnsupportedCallError,
    UnsupportedModelError,
    VersionError,
)

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def state(model: Any) -> dict[str, Any]:
    """Everything that a wrapper could leave behind."""
    return {
        "class": type(model),
        "attributes": sorted(model.__dict__),
        "hooks": {
            (name, attribute): len(value)
            for name, module in model.named_modules()
            for attribute, value in vars(module).items()
            if "hooks" in attribute and isinstance(value, dict)
        },
        "module attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "attention": [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
    }


def test_everything_is_as_before(family: FamilyRow) -> None:
    model = family.build()
    inputs = make_inputs(family, model, [1, 0, 2])
    stock = model.generate(**inputs, **GREEDY)
    before = state(model)
    with AdaFV(keep=0.3)(model) as adafv:
        assert adafv.enabled
        model.generate(**inputs, **GREEDY)
    assert not adafv.enabled
    assert state(model) == before
    assert TAPPED_ATTENTION not in before["attention"]
    assert torch.equal(model.generate(**inputs, **GREEDY), stock)


def test_exceptions_leave_nothing_behind(model: Any, family: FamilyRow) -> None:
    inputs = make_inputs(family, model, [1])
    model.generate(**inputs, **GREEDY)
    before = state(model)

    def broken(batch: int, tokens: torch.Tensor) -> list[int]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), AdaFV(keep=0.3)(model):
        model.generate(**inputs, **GREEDY, prefix_allowed_tokens_fn=broken)
    assert state(model) == before


def test_permanent_use(model: Any, family: FamilyRow) -> None:
    inputs = make_inputs(family, model, [1])
    stock = model(**inputs).logits
    adafv = AdaFV(keep=0.3)(model).enable()
    with torch.no_grad():
        assert model(**inputs).logits.isnan().any()
    adafv.disable()
    adafv.disable()  # no harm
    assert torch.equal(model(**inputs).logits, stock)
    assert adafv.last is not None


def test_wrapping_twice_is_refused(model: Any) -> None:
    with AdaFV(keep=0.3)(model) as adafv:
        with pytest.raises(AlreadyEnabledError, match="disable"):
            AdaFV(keep=0.5)(model).enable()
        with pytest.raises(AlreadyEnabledError):
            adafv.enable()
        assert adafv.enabled
    with AdaFV(keep=0.5)(model):
        pass


def test_one_pruner_for_two_models(family: FamilyRow) -> None:
    one, two = family.build(seed=1), family.build(seed=2)
    inputs = make_inputs(family, one, [1])
    pruner = AdaFV(keep=0.3)
    with pruner(one) as first, pruner(two) as second:
        one.generate(**inputs, **GREEDY)
        two.generate(**inputs, **GREEDY)
    assert first.last is not second.last


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_unwrapped(family: FamilyRow, how: Any) -> None:
    model, plain = family.build(), family.build()
    inputs = make_inputs(family, plain, [1])
    stock = plain.generate(**inputs, **GREEDY)
    with AdaFV(keep=0.3)(model):
        twin = how(model)  # before its first run: after it, transformers' own hooks cannot be pickled
        assert type(twin) is type(model).__mro__[1]
        assert torch.equal(twin.generate(**inputs, **GREEDY), stock)
        with AdaFV(keep=0.5)(twin) as adafv:
            twin.generate(**inputs, **GREEDY)
        assert adafv.last is not None
        with torch.no_grad():
            assert model(**inputs).logits.isnan().any()


def test_replicas_are_refused(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    with AdaFV(keep=0.3)(model):
        replica = model._replicate_for_data_parallel()  # what nn.DataParallel calls
        with pytest.raises(UnsupportedCallError, match="DistributedDataParallel"):
            replica(**inputs)


def test_saving_while_enabled(tmp_path: Any) -> None:
    model = llava()
    with AdaFV(keep=0.3)(model):
        assert isinstance(model, LlavaForConditionalGeneration)
        assert type(model).__name__ == "LlavaForConditionalGeneration"
        model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.architectures == ["LlavaForConditionalGeneration"]
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_forward_replaced_on_the_object(family: FamilyRow) -> None:
    """As accelerate and `model.forward = torch.compile(model.forward)` do it, before and while wrapped."""
    model = family.build()
    inputs = make_inputs(family, model, [1])
    with AdaFV(keep=0.3)(model) as adafv:
        expected = model(**inputs).logits
    calls = []
    original = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["input_ids"].shape[1])
        return original(*args, **kwargs)

    counted.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    model.forward = counted
    with AdaFV(keep=0.3)(model):
        assert torch.equal(model(**inputs).logits, expected)
    assert calls == [adafv.last.prompt_length_after]
    del model.forward
    with AdaFV(keep=0.3)(model):
        model.forward = counted
        assert torch.equal(model(**inputs).logits, expected)
        del model.forward
    assert "forward" not in model.__dict__


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.1, 1.5, float("nan"), float("inf"), True, "64 tokens", None, [3]])
def test_bad_budgets(keep: Any) -> None:
    with pytest.raises(BudgetError):
        AdaFV(keep=keep)


def test_budget_above_the_image(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    """A number is an upper bound, as in vLLM: an image that has fewer tokens keeps them all."""
    stock = model.generate(**inputs, **GREEDY)
    with AdaFV(keep=10_000)(model) as adafv:
        assert torch.equal(model.generate(**inputs, **GREEDY), stock)
    assert adafv.last.tokens_after == adafv.last.tokens_before
    short = compress(model, inputs, keep=10_000)
    assert torch.equal(short["input_ids"], inputs["input_ids"])


@pytest.mark.parametrize(
    "options",
    [{"objective": "best"}, {"variant": "new"}, {"positions": "relative"}, {"text": "all"}, {"text": "question"}],
    ids=str,
)
def test_bad_options(options: dict[str, str]) -> None:
    with pytest.raises(OptionError):
        AdaFV(keep=0.1, **options)  # type: ignore[arg-type]


def test_unknown_method() -> None:
    with pytest.raises(OptionError, match="known are: adafv"):
        Pruner("best", keep=0.1)
    with pytest.raises(OptionError, match="no option 'objective'"):
        Pruner("saliency", keep=0.1, objective="split")
    with pytest.raises(OptionError, match="no option 'seeds'; it has seed"):
        Pruner("random", keep=0.1, seeds=3)


def test_unsupported_models() -> None:
    with pytest.raises(UnsupportedModelError, match="LlavaForConditionalGeneration"):
        AdaFV(keep=0.1)(LlamaForCausalLM(text_config(num_hidden_layers=1)))
    with pytest.raises(UnsupportedModelError, match="supported"):
        AdaFV(keep=0.1)(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match=r"language_model.compile\(\)"):
        AdaFV(keep=0.1)(torch.compile(llava()))


def test_unsupported_configurations() -> None:
    from transformers import LlavaConfig, SiglipVisionConfig

    for options in (
        {"vision_feature_select_strategy": "full"},
        {"vision_feature_layer": 0},
        {"vision_feature_layer": 9},
    ):
        with pytest.raises(UnsupportedModelError, match="vision_feature"):
            AdaFV(keep=0.1)(llava(**options))
    siglip = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=siglip, text_config=text_config()))
    with pytest.raises(UnsupportedModelError, match="CLS"):
        AdaFV(keep=0.1)(model)


def test_old_transformers() -> None:
    for old in ("5.17.0", "4.57.6"):
        with pytest.raises(VersionError, match=r"pip install --upgrade transformers"):
            check_transformers(old)
    check_transformers("5.18.0")
    check_transformers("6.0.0.dev0")


@pytest.mark.parametrize("method", ["adafv", "saliency"])
def test_placeholders_must_fit_the_images(family: FamilyRow, model: Any, method: str) -> None:
    inputs = make_inputs(family, model, [1])
    truncated = {**inputs, "input_ids": inputs["input_ids"][:, :-8], "attention_mask": inputs["attention_mask"][:, :-8]}
    one_short = {**inputs, "input_ids": inputs["input_ids"].clone()}
    place = (inputs["input_ids"][0] == 119).nonzero()[3]
    one_short["input_ids"][0, place] = 7
    with Pruner(method, keep=0.3)(model):
        with pytest.raises(PromptError, match="placeholders"):
            model.generate(**one_short, **GREEDY)
        with pytest.raises(PromptError, match="placeholders"):
            model.generate(
                **{**truncated, "input_ids": truncated["input_ids"][:, :8], "attention_mask": None}, **GREEDY
            )
        two = {
            name: torch.cat((value, value)) for name, value in inputs.items() if name in ("pixel_values", "image_sizes")
        }
        with pytest.raises(PromptError, match=r"2 image\(s\)"):
            model.generate(**{**inputs, **two}, **GREEDY)
        with pytest.raises(PromptError, match="no prompt"):
            model(pixel_values=inputs["pixel_values"], image_sizes=inputs.get("image_sizes"))


def test_no_text_at_all(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    only_image = {**inputs, "input_ids": inputs["input_ids"][inputs["input_ids"] == 119][None], "attention_mask": None}
    with Pruner("saliency", keep=0.3)(model) as pruner:
        expected = model.generate(**only_image, **GREEDY)
    assert pruner.last is not None
    for text, where in ((None, "no text"), ("after", "after the image")):
        with AdaFV(keep=0.3, text=text)(model) as adafv, pytest.warns(UserWarning, match=where):
            assert torch.equal(model.generate(**only_image, **GREEDY), expected)
        assert adafv.last.methods == ["saliency"]
    with AdaFV(keep=9, variant="published")(model), pytest.raises(PromptError, match="after the image"):
        model.generate(**only_image, **GREEDY)


def test_unsupported_calls(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    length = inputs["input_ids"].shape[1]
    with AdaFV(keep=0.3)(model):
        with pytest.raises(UnsupportedCallError, match="token_healing"):
            model.generate(**inputs, **GREEDY, token_healing=True)
        with pytest.raises(UnsupportedCallError, match="custom_generate"):
            model.generate(**inputs, **GREEDY, custom_generate="somebody/recipe")
        with pytest.raises(UnsupportedCallError, match="4-D"):
            model(**{**inputs, "attention_mask": torch.zeros(1, 1, length, length)})
        with pytest.raises(UnsupportedCallError, match="paged"):
            model.generate(**inputs, **GREEDY, cache_implementation="paged")


def test_published_needs_two_tokens_per_crop(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    with AdaFV(keep=1, variant="published")(model), pytest.raises(BudgetError, match="per crop"):
        model.generate(**inputs, **GREEDY)


def test_a_method_looked_up_before_the_block(family: FamilyRow, model: Any) -> None:
    """It is the stock one, and would not prune; text alone, and what is looked up inside, run as ever."""
    inputs, text = make_inputs(family, model, [1]), make_inputs(family, model, [0])
    before = model.generate
    stock = before(**text, **GREEDY)
    with AdaFV(keep=0.3)(model):
        with pytest.raises(UnsupportedCallError, match="looked up before"):
            before(**inputs, **GREEDY)
        assert torch.equal(before(**text, **GREEDY), stock)
        model.generate(**inputs, **GREEDY)
    before(**inputs, **GREEDY)


def test_looking_up_while_another_thread_leaves(family: FamilyRow) -> None:
    model = family.build()
    handle = AdaFV(keep=0.3)(model)
    failures: list[BaseException] = []
    done = threading.Event()

    def look_up() -> None:
        while not done.is_set():
            try:
                for name in ("generate", "forward"):
                    assert callable(getattr(model, name))
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=look_up) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        handle.enable()
        handle.disable()
    done.set()
    for thread in threads:
        thread.join()
    assert not failures
    entry = handle.enable().model.__class__.__dict__["generate"]
    handle.disable()
    assert entry.__get__(model)(torch.tensor([[1, 5, 6]]), **GREEDY).shape[0] == 1  # found, then the block was left


# ------------------------------------------------------------------------------------------- endurance


@pytest.mark.parametrize(
    "count", [100, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.release])], ids=["hundred", "thousand"]
)
def test_many_generations(family: FamilyRow, count: int) -> None:
    """Random prompts, images and budgets, some of which raise in the middle: same model, no growth afterwards."""
    model = family.build()
    probe = make_inputs(family, model, [1, 2], seed=7)
    stock = model.generate(**probe, **GREEDY)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = state(model)
    chance = random.Random(0)
    prompts = [make_inputs(family, model, images, seed=seed) for seed, images in enumerate([[1], [2], [1, 0], [1, 1]])]
    raised = 0

    def objects() -> int:
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(isinstance(item, (torch.Tensor, torch.nn.Module)) for item in gc.get_objects())

    def explode(batch: int, tokens: torch.Tensor) -> list[int]:
        raise ZeroDivisionError

    baseline = 0
    for number in range(count):
        if number == count // 4:  # what is kept once is there by now
            baseline = objects()
        options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": chance.random() < 0.3}
        keep = chance.choice([chance.randint(1, 16), chance.uniform(0.01, 1.0), 10_000])
        if chance.random() < 0.2:
            options["prefix_allowed_tokens_fn"] = explode
        method = chance.choice(["adafv", "adafv", "saliency", "text", "random", "uniform", "downsample"])
        try:
            with Pruner(method, keep=keep)(model):
                model.generate(**chance.choice(prompts), **options)
        except (AdaFVError, ZeroDivisionError):
            raised += 1
    assert count / 10 < raised < count * 0.9
    assert objects() <= baseline + 10
    assert state(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert torch.equal(model.generate(**probe, **GREEDY), stock)
