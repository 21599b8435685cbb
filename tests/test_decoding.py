"""What looks at tokens while an answer is decoded, the caller's own loops, and caches that are emptied, pickled, cropped.

None of it depends on the family, so it runs over the few that test the wrapper; what does is in test_ways_of_calling.py.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from models import END, FamilyRow, make_inputs, words
from oracle import STOCK_MIXES_UP_IMAGES, VISUAL_INPUTS, encoded_by_prompt, masked_inputs, same_logits
from transformers import (
    DynamicCache,
    LogitsProcessor,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
)

from adafv import AdaFV, Pruner, compress
from adafv.engines.transformers.releases import CACHE, returned_cache
from adafv.errors import CacheError, OptionError, UnsupportedCallError

KEEP = 0.3
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
OPTIONS = {
    "max_new_tokens": 5,
    "do_sample": False,
    "suppress_tokens": list(range(110, 120)),
    "return_dict_in_generate": True,
    "output_scores": True,
}


def same_answers(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """The answer, after comparing it with that of the masked stock model; what can be used once is made by a function."""

    def fresh() -> dict[str, Any]:
        return {name: value() if type(value) is type(fresh) else value for name, value in options.items()}

    torch.manual_seed(9)
    with AdaFV(keep=KEEP)(model) as adafv:
        pruned = model.generate(**inputs, **{**OPTIONS, **fresh()})
    oracle = masked_inputs(inputs, adafv.last.keep_mask)
    if STOCK_MIXES_UP_IMAGES and options.get("num_beams", 1) > 1:
        oracle = encoded_by_prompt(model, oracle)
    torch.manual_seed(9)
    expected = model.generate(**oracle, **{**OPTIONS, **fresh()})
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    for mine, theirs in zip(pruned.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)
    return pruned


# ------------------------------------------------------------------------------------- processors and criteria


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3, "logits_processor": lambda: [RepetitionPenaltyLogitsProcessor(1.05)]},
        {"no_repeat_ngram_size": 1, "logits_processor": lambda: [NoRepeatNGramLogitsProcessor(3)]},
        {"logits_processor": lambda: [MinLengthLogitsProcessor(90, END), RepetitionPenaltyLogitsProcessor(2.0)]},
        {"min_new_tokens": 2, "logits_processor": lambda: [MinNewTokensLengthLogitsProcessor(40, 5, END)]},
        {"exponential_decay_length_penalty": (2, 1.5), "encoder_repetition_penalty": 1.4},
        {"sequence_bias": [[[20], 3.0]], "forced_eos_token_id": END},
    ],
    ids=["penalty", "n-grams", "own-lengths", "min-new", "lengths", "bias"],
)
def test_processors_of_a_type_that_generate_makes_too(
    family: FamilyRow, model: Any, options: dict[str, Any], beams: int
) -> None:
    """The caller's replaces it, as in stock; and all of them see the caller's prompt, padding included."""
    same_answers(model, make_inputs(family, model, [2, 0, 1]), **options, num_beams=beams)


def test_an_own_length_criterion_replaces_the_one_of_generate(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1, 2])
    length = inputs["input_ids"].shape[1]
    options = {"min_new_tokens": 5, "stopping_criteria": lambda: [MaxLengthCriteria(length + 3)]}
    pruned = same_answers(model, inputs, **options)
    assert pruned.sequences.shape[1] == length + 3


def test_the_lists_of_generate_pass_for_what_they_hold(family: FamilyRow, model: Any) -> None:
    """A loop of the caller's own looks for processors by type, by attribute and by the signature of their call."""
    inputs = make_inputs(family, model, [1])

    class Extra(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, strength: float) -> torch.Tensor:
            assert input_ids.shape[1] == inputs["input_ids"].shape[1]
            return scores * strength

    seen: dict[str, Any] = {}

    def loop(model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, **options: Any) -> Any:
        scores = torch.ones(1, 120)
        seen["penalty"] = next(item for item in logits_processor if isinstance(item, RepetitionPenaltyLogitsProcessor))
        seen["scaled"] = logits_processor(input_ids, scores, strength=3.0)
        seen["longest"] = stopping_criteria.max_length - input_ids.shape[1]
        seen["ends"] = any(hasattr(item, "eos_token_id") for item in stopping_criteria)
        seen["copies"] = copy.deepcopy(stopping_criteria)(input_ids, None)
        return input_ids

    options = {"max_new_tokens": 4, "custom_generate": loop, "repetition_penalty": 1.5}
    with AdaFV(keep=KEEP)(model):
        model.generate(**inputs, logits_processor=[Extra()], **options)
    assert seen["penalty"].penalty == 1.5
    assert seen["scaled"].max() == 3.0
    assert seen["longest"] == 4
    assert seen["ends"]
    assert not seen["copies"].any()


@pytest.mark.parametrize("options", [{"eos_token_id": None}, {"repetition_penalty": None}], ids=str)
def test_a_setting_that_is_switched_off(family: FamilyRow, model: Any, options: dict[str, Any]) -> None:
    """None as an argument overrules the model's own configuration."""
    inputs, own = make_inputs(family, model, [1]), model.generation_config
    model.generation_config = copy.deepcopy(own)
    model.generation_config.repetition_penalty = 3.0
    try:
        pruned = same_answers(model, inputs, sequence_bias={(END,): 80.0}, **options)
    finally:
        model.generation_config = own
    assert pruned.sequences.shape[1] - inputs["input_ids"].shape[1] == (5 if "eos_token_id" in options else 1)


@pytest.mark.parametrize("options", [{"num_return_sequences": 2, "do_sample": True}, {"num_beams": 3}], ids=str)
def test_allowed_tokens_for_several_answers(family: FamilyRow, model: Any, options: dict[str, Any]) -> None:
    inputs = make_inputs(family, model, [1, 1])
    asked: dict[str, set[int]] = {"stock": set(), "pruned": set()}

    def allowed(who: str) -> Any:
        def tokens(batch: int, prompt: torch.Tensor) -> list[int]:
            asked[who].add(batch)
            assert prompt.shape[0] >= inputs["input_ids"].shape[1]
            return list(range(3, 60))

        return tokens

    common = {"max_new_tokens": 2, **options}
    model.generate(**inputs, **common, prefix_allowed_tokens_fn=allowed("stock"))
    with AdaFV(keep=KEEP)(model):
        output = model.generate(**inputs, **common, prefix_allowed_tokens_fn=allowed("pruned"))
    assert asked["pruned"] == asked["stock"]
    assert ((output[:, -2:] >= 2) & (output[:, -2:] < 60)).all()


def test_a_criterion_that_counts_from_the_prompt(family: FamilyRow, model: Any) -> None:
    """As most do: from the caller's."""
    inputs = make_inputs(family, model, [1])
    length = inputs["input_ids"].shape[1]

    class Third(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
            return torch.tensor([input_ids.shape[1] == length + 3])

    assert same_answers(model, inputs, stopping_criteria=lambda: [Third()]).sequences.shape[1] <= length + 3


# ------------------------------------------------------------------------------------------------ own loops


def test_a_loop_of_the_callers_own(family: FamilyRow, model: Any) -> None:
    """What it returns is the caller's: with the prompt it has the caller's, without it nothing is put in front."""
    inputs = make_inputs(family, model, [1, 2])
    rows = len(inputs["input_ids"])
    new = torch.arange(20, 20 + 3 * rows).view(rows, 3)
    wide = torch.arange(300).view(rows, -1) % 100 + 3  # longer than any prompt here, and no prompt

    class Result:
        text = "an answer"

    with AdaFV(keep=KEEP)(model) as adafv:

        def ask(answer: Any) -> Any:
            return model.generate(**inputs, custom_generate=answer, max_new_tokens=3)

        with_prompt = ask(lambda model, input_ids, **_: torch.cat((input_ids, new), 1))
        twice = ask(lambda model, input_ids, **_: torch.cat((input_ids, new), 1).repeat_interleave(2, 0))
        assert torch.equal(ask(lambda model, input_ids, **_: new), new)
        assert torch.equal(ask(lambda model, input_ids, **_: wide), wide)
        assert ask(lambda model, input_ids, **_: ["a", "b"]) == ["a", "b"]
        assert ask(lambda model, input_ids, **_: None) is None
        assert ask(lambda model, input_ids, **_: Result()).text == "an answer"
        own = ask(lambda model, input_ids, **_: DynamicCache())
        assert isinstance(own, DynamicCache)
        scores = torch.rand(rows, 60)
        assert torch.equal(ask(lambda model, input_ids, **_: scores), scores)

        def greedy(model: Any, input_ids: torch.Tensor, **options: Any) -> Any:
            names = ("attention_mask", "mm_encoder_outputs", "position_ids")
            given = {name: options[name] for name in names if options.get(name) is not None}
            return model(input_ids=input_ids, **given).logits[:, -1].argmax(-1, keepdim=True)

        first = ask(greedy)
        last = adafv.last
    assert torch.equal(with_prompt, torch.cat((inputs["input_ids"], new), 1))
    assert torch.equal(twice, with_prompt.repeat_interleave(2, 0))
    with torch.no_grad():
        expected = model(**masked_inputs(inputs, last.keep_mask)).logits[:, -1].argmax(-1, keepdim=True)
    assert torch.equal(first, expected)


# ------------------------------------------------------------------------------------- gaps that look like borders


@pytest.mark.parametrize("options", [{"use_cache": False}, {}], ids=str)
def test_gaps_in_positions_are_no_borders(family: FamilyRow, model: Any, options: dict[str, Any]) -> None:
    """`generate` drops a mask that masks nothing; without one and without a cache, stock reads gaps as packed prompts."""
    inputs = make_inputs(family, model, [1])
    with AdaFV(keep=KEEP, positions="original")(model) as adafv:
        pruned = model.generate(**inputs, **OPTIONS, **options)
    expected = model.generate(**masked_inputs(inputs, adafv.last.keep_mask, "original"), **OPTIONS, **options)
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    for mine, theirs in zip(pruned.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


def test_flash_attention_sees_a_mask_where_positions_have_gaps(family: FamilyRow) -> None:
    """It drops a mask that masks nothing, too; so one column of padding stands in front."""
    model = family.build()
    inputs = make_inputs(family, model, [1])
    without = compress(model, inputs, KEEP, positions="original")
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    short = compress(model, inputs, KEEP, positions="original")
    assert short["attention_mask"].tolist() == [[0, *without["attention_mask"][0].tolist()]]
    assert compress(model, inputs, KEEP)["attention_mask"].all()


# ------------------------------------------------------------------------------------------------------ attentions


@pytest.mark.parametrize("images", [[1], [1, 2]], ids=str)
def test_attentions_are_in_the_callers_columns(family: FamilyRow, images: list[int]) -> None:
    model = family.build()
    model.set_attn_implementation("eager")
    inputs = make_inputs(family, model, images)
    with torch.no_grad(), AdaFV(keep=KEEP)(model) as adafv:
        pruned = model(**inputs, output_attentions=True).attentions
        said = model.generate(**inputs, **OPTIONS, output_attentions=True)
    oracle = masked_inputs(inputs, adafv.last.keep_mask)
    with torch.no_grad():
        expected = model(**oracle, output_attentions=True).attentions
        stock = model.generate(**oracle, **OPTIONS, output_attentions=True)
    given, keep = inputs["attention_mask"], adafv.last.keep_mask
    for mine, first, theirs in zip(pruned, said.attentions[0], expected, strict=True):
        for found in (mine, first):
            same_logits(found.movedim(2, 1), theirs.movedim(2, 1), given, keep, **TOLERANCE)
    for mine, theirs in zip(said.attentions[2], stock.attentions[2], strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


# ---------------------------------------------------------------------------------------------------------- caches


def first_turn(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    return model.generate(**inputs, **OPTIONS, **options)


def second_turn(model: Any, said: torch.Tensor, cache: Any) -> Any:
    more = torch.cat((said, torch.tensor([words(4, 50)])), 1)
    return model.generate(input_ids=more, **{CACHE: cache}, **OPTIONS)


def test_a_pickled_cache_is_followed(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    with AdaFV(keep=KEEP)(model):
        one = first_turn(model, inputs)
        cache = pickle.loads(pickle.dumps(returned_cache(one)))
        expected = second_turn(model, one.sequences, copy.deepcopy(cache))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1]))
        assert second_turn(model, one.sequences, cache).sequences.tolist() == expected.sequences.tolist()
        assert isinstance(cache, DynamicCache)
        assert type(cache).__qualname__ == "DynamicCache"


def test_a_reset_cache_starts_anew(family: FamilyRow, model: Any) -> None:
    """What was written on it is of the conversation before."""
    inputs = make_inputs(family, model, [1])
    text = {"input_ids": torch.tensor([[1, *words(30, 4)]])}
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    stock = first_turn(model, text)
    two = second_turn(model, stock.sequences, returned_cache(stock))
    with AdaFV(keep=KEEP)(model):
        first_turn(model, inputs, **{CACHE: cache})
        cache.reset()
        one = first_turn(model, text, **{CACHE: cache})
        assert one.sequences.tolist() == stock.sequences.tolist()
        assert second_turn(model, one.sequences, cache).sequences.tolist() == two.sequences.tolist()


def test_a_pruned_cache_is_refused_outside(family: FamilyRow, model: Any) -> None:
    """The stock model would take what it holds for the first columns of the prompt."""
    inputs, more = make_inputs(family, model, [1]), torch.tensor([words(2, 5)])
    text = {"input_ids": torch.tensor([[1, *words(30, 4)]])}
    with AdaFV(keep=KEEP)(model):
        one = first_turn(model, inputs)
        cache = copy.deepcopy(returned_cache(one))
        with pytest.raises(CacheError, match="inside `with"):  # not by a part of the model, either
            model.model.language_model(inputs_embeds=torch.zeros(1, 1, 48), **{CACHE: cache})
        expected = second_turn(model, one.sequences, copy.deepcopy(cache))
    for held in (cache, pickle.loads(pickle.dumps(cache))):
        with pytest.raises(CacheError, match="inside `with"):
            second_turn(model, one.sequences, held)
        with pytest.raises(CacheError, match="inside `with"):
            model(input_ids=more, **{CACHE: held})
    with Pruner("saliency", keep=2)(model):
        assert second_turn(model, one.sequences, cache).sequences.tolist() == expected.sequences.tolist()
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    with AdaFV(keep=KEEP)(model):
        first_turn(model, inputs, **{CACHE: cache})
    cache.reset()
    assert first_turn(model, text, **{CACHE: cache}).sequences.tolist() == first_turn(model, text).sequences.tolist()


class Stopped(Exception):
    """What stops an answer in the midst of it: a reader who has gone, an interrupt."""


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_an_answer_that_was_stopped_goes_on(family: FamilyRow, model: Any, turn: int, tokens: int) -> None:
    """What is cached of it is known, though `generate` never returned."""
    inputs = make_inputs(family, model, [1])
    length, said = inputs["input_ids"].shape[1], []
    visuals = {name: value for name, value in inputs.items() if name in VISUAL_INPUTS}

    def stop(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said[:] = ids[0].tolist()
        if ids.shape[1] - length >= tokens:
            raise Stopped
        return scores

    with Pruner("saliency", keep=KEEP)(model):
        cache = DynamicCache(config=model.config.get_text_config())
        if turn == 2:
            one = first_turn(model, inputs, **{CACHE: cache})
            inputs = {"input_ids": torch.cat((one.sequences, torch.tensor([words(4, 50)])), 1)}
            length = inputs["input_ids"].shape[1]
        with pytest.raises(Stopped):
            model.generate(**inputs, **OPTIONS, logits_processor=[stop], **{CACHE: cache})
        assert len(said) == length + tokens
        ids = torch.tensor([[*said, *words(3, 60)]])
        then = model.generate(input_ids=ids, **OPTIONS, **{CACHE: copy.deepcopy(cache)})
        whole = model.generate(input_ids=ids, **visuals, **OPTIONS)
        assert then.sequences.tolist() == whole.sequences.tolist()
        torch.testing.assert_close(then.scores, whole.scores, **TOLERANCE)
        other = ids.clone()
        other[0, 1] += 1
        with pytest.raises(CacheError, match="from another prompt"):
            model.generate(input_ids=other, **OPTIONS, **{CACHE: cache})
    with pytest.raises(CacheError, match="inside `with"):
        model.generate(input_ids=ids, **OPTIONS, **{CACHE: cache})


def test_a_cropped_cache_of_rows_that_begin_with_an_image(family: FamilyRow, model: Any) -> None:
    """What was dropped in front of the first kept token counts too, when later positions close up."""
    inputs = make_inputs(family, model, [1])
    start = int((inputs["input_ids"][0] == 119).nonzero()[0])
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, start:], inputs["attention_mask"][:, start:]
    length = inputs["input_ids"].shape[1]
    more = torch.tensor([words(3, 5)])
    with torch.no_grad(), AdaFV(keep=KEEP)(model) as adafv:
        cache = returned_cache(model(**inputs, use_cache=True))
        positions = torch.arange(length, length + 3)[None]
        new = model(input_ids=more, position_ids=positions, **{CACHE: cache}).logits
        keep = torch.nn.functional.pad(adafv.last.keep_mask, (0, 3), value=True)
        with_image = {name: value for name, value in inputs.items() if name in VISUAL_INPUTS}
        whole = {"input_ids": torch.cat((inputs["input_ids"], more), 1), **with_image}
    with torch.no_grad():
        expected = model(**masked_inputs(whole, keep)).logits[:, -3:]
    torch.testing.assert_close(new, expected, **TOLERANCE)


def test_what_is_no_cache_is_refused(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    layer = (torch.zeros(1, 2, 5, 12), torch.zeros(1, 2, 5, 12))
    with AdaFV(keep=KEEP)(model):
        for legacy in ((layer, layer), [layer]):
            with pytest.raises(CacheError, match="DynamicCache"):
                model.generate(**inputs, **OPTIONS, past_key_values=legacy)
            with pytest.raises(UnsupportedCallError, match="stored_keys"):
                model(**inputs, stored_keys=legacy)


# --------------------------------------------------------------------------------------------------------- options


def test_logits_is_an_option(family: FamilyRow, model: Any) -> None:
    with pytest.raises(OptionError, match="prompt, kept"):
        AdaFV(keep=KEEP, logits="short")
    inputs = make_inputs(family, model, [1])
    with (
        AdaFV(keep=KEEP, logits="kept")(model),
        torch.no_grad(),
        pytest.raises(UnsupportedCallError, match="must be a number"),
    ):
        model(**inputs, logits_to_keep=torch.tensor([3]))


def test_a_row_that_is_masked_as_a_whole(family: FamilyRow, model: Any) -> None:
    """As one that fills up a distributed batch: its placeholders are still counted by the stock model."""
    inputs = make_inputs(family, model, [1, 1])
    inputs["attention_mask"][1] = 0
    with torch.no_grad():
        with AdaFV(keep=KEEP)(model) as adafv:
            pruned, padding = model(**inputs).logits
        expected = model(**masked_inputs(inputs, adafv.last.keep_mask)).logits[0]
    assert not padding.isnan().any()  # a sum over it, times the mask, is no NaN
    kept = inputs["attention_mask"][0].bool() & adafv.last.keep_mask[0]
    torch.testing.assert_close(pruned[kept], expected[kept], **TOLERANCE)
