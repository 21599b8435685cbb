"""Ways of calling that need more than a prompt in and tokens out. Each is right by the oracle, or refused."""

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from models import DEEP, END, IMAGE, PAD, FamilyRow, finish, image_lengths, make_inputs, text_config, words
from oracle import masked_inputs
from shortened import shortened_by_hand
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from adafv import AdaFV, compress
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.generation import refuse_unsupported
from adafv.errors import CacheError, NoRecordError, UnsupportedCallError

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
KEEP = 0.3
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def answer(sequences: torch.Tensor, inputs: dict[str, Any]) -> list[list[int]]:
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


# ---------------------------------------------------------------------------------------------- decoding


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value)

    def end(self) -> None:
        self.ended = True


def test_streaming_shows_the_callers_prompt(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    streamer = Recorder()
    with AdaFV(keep=KEEP)(model):
        output = model.generate(**inputs, **GREEDY, streamer=streamer)
    assert streamer.ended
    assert streamer.pieces[0].tolist() == inputs["input_ids"].tolist()
    assert torch.cat([piece.flatten() for piece in streamer.pieces]).tolist() == output[0].tolist()


class SeesPrompt(StoppingCriteria, LogitsProcessor):
    """What most criteria do: cut the prompt off by its length."""

    def __init__(self, prompt: torch.Tensor) -> None:
        self.prompt, self.seen = prompt, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
        rows = input_ids.shape[0] // self.prompt.shape[0]
        assert torch.equal(input_ids[:, : self.prompt.shape[1]], self.prompt.repeat_interleave(rows, 0))
        self.seen = max(self.seen, input_ids.shape[1] - self.prompt.shape[1])
        return scores if isinstance(scores, torch.Tensor) and scores.dim() == 2 else torch.zeros(len(input_ids)).bool()


@pytest.mark.parametrize("beams", [1, 3])
def test_callers_hooks_see_the_callers_prompt(family: FamilyRow, model: Any, beams: int) -> None:
    inputs = make_inputs(family, model, [1, 1])
    processor, criterion = SeesPrompt(inputs["input_ids"]), SeesPrompt(inputs["input_ids"])
    allowed_lengths = set()

    def allowed(batch: int, tokens: torch.Tensor) -> list[int]:
        assert torch.equal(tokens[: inputs["input_ids"].shape[1]], inputs["input_ids"][batch])
        allowed_lengths.add(len(tokens) - inputs["input_ids"].shape[1])
        return list(range(3, 60))

    with AdaFV(keep=KEEP)(model):
        output = model.generate(
            **inputs,
            max_new_tokens=4,
            num_beams=beams,
            do_sample=False,
            logits_processor=[processor],
            stopping_criteria=[criterion],
            prefix_allowed_tokens_fn=allowed,
        )
    assert (processor.seen, criterion.seen) == (3, 4)
    assert allowed_lengths == {0, 1, 2, 3}
    assert all(3 <= token < 60 for row in answer(output, inputs) for token in row)


def test_stopping_criterion_stops(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    with AdaFV(keep=KEEP)(model):
        free = answer(model.generate(**inputs, **GREEDY), inputs)[0]

        class Stop(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
                return torch.tensor([input_ids.shape[1] >= inputs["input_ids"].shape[1] + 2])

        stopped = answer(model.generate(**inputs, **GREEDY, stopping_criteria=[Stop()]), inputs)[0]
    assert stopped == free[:2]


def test_lengths_count_the_callers_prompt(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    length = inputs["input_ids"].shape[1]
    with AdaFV(keep=KEEP)(model):
        output = model.generate(**inputs, max_length=length + 5, min_length=length + 5, do_sample=False)
        assert output.shape[1] == length + 5
        config = copy.deepcopy(model.generation_config)
        config.max_length, config.min_length, config.do_sample = length + 4, length + 4, False
        assert model.generate(**inputs, generation_config=config).shape[1] == length + 4
        with pytest.raises(UnsupportedCallError, match="max_length"):
            model.generate(**inputs, max_length=length - 1)


def test_assisted_decoding(family: FamilyRow, model: Any) -> None:
    # With some other prompts the lookup proposes placeholders copied from the prompt, and the stock model fails.
    inputs = make_inputs(family, model, [1], seed=1)
    torch.manual_seed(0)
    assistant = LlamaForCausalLM(text_config()).eval()
    assistant.generation_config.pad_token_id, assistant.generation_config.eos_token_id = PAD, END
    twin = family.build()
    with AdaFV(keep=KEEP)(model):
        plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        lookup = model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
        assisted = model.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=assistant)
        same = model.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=twin)
        with AdaFV(keep=KEEP)(twin):
            wrapped = model.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=twin)
    for other in (lookup, assisted, same, wrapped):
        assert other.tolist() == plain.tolist()


def test_key_value_cache_is_shorter_by_what_was_dropped(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [2])
    with AdaFV(keep=5)(model) as adafv:
        output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    dropped = sum(adafv.last.tokens_before) - sum(adafv.last.tokens_after)
    assert adafv.last.tokens_after == [5, 5]
    new = output.sequences.shape[1] - inputs["input_ids"].shape[1]
    assert output.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] - dropped + new - 1
    bytes_held = sum(
        part.numel() * part.element_size()
        for layer in output.past_key_values.layers
        for part in (layer.keys, layer.values)
    )
    per_token = adafv.last.kv_bytes_after // adafv.last.prompt_length_after
    assert bytes_held == adafv.last.kv_bytes_after + (new - 1) * per_token


def test_keeping_as_many_as_there_are_is_bit_equal_to_stock(family: FamilyRow, model: Any) -> None:
    """As a number; as a share it is in test_oracle.py."""
    inputs = make_inputs(family, model, [1, 0])
    (keep,) = image_lengths(model, {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")})
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    stock, stock_forward = model.generate(**inputs, **options), model(**inputs).logits
    with AdaFV(keep=keep)(model):
        pruned, pruned_forward = model.generate(**inputs, **options), model(**inputs).logits
    assert torch.equal(torch.stack(pruned.logits), torch.stack(stock.logits))
    assert torch.equal(pruned.sequences, stock.sequences)
    assert torch.equal(pruned_forward, stock_forward)


@pytest.mark.parametrize("window", [4, 12, 200])
def test_a_sliding_window_counts_the_shortened_prompt(family: FamilyRow, window: int) -> None:
    """As any shorter prompt does: the stock model is given the prompt shortened by hand."""
    options = {
        name: value for name, value in text_config().to_dict().items() if name not in ("model_type", "architectures")
    }
    model = family.build()
    config = type(model.config).from_dict(
        model.config.to_dict() | {"text_config": {**options, "model_type": "mistral"}}
    )
    config.text_config.sliding_window = window
    model = finish(type(model)(config), 0, torch.float32)
    assert type(model.model.language_model).__name__ == "MistralModel"
    inputs = make_inputs(family, model, [1, 2])
    decoded = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), AdaFV(keep=KEEP, logits="kept")(model) as adafv:
        pruned, logits = model.generate(**inputs, **decoded), model(**inputs).logits
    short = shortened_by_hand(model, inputs, adafv.last)
    with torch.no_grad():
        assert torch.equal(model(**copy.deepcopy(short)).logits, logits)
        expected = model.generate(**short, **decoded)
    assert torch.equal(torch.stack(pruned.logits), torch.stack(expected.logits))


# ------------------------------------------------------------------------------------- conversations


def first_turn(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    return model.generate(**inputs, **GREEDY, return_dict_in_generate=True, **options)


def more_text(sequences: torch.Tensor, count: int = 5) -> torch.Tensor:
    return torch.cat((sequences, torch.tensor([words(count, 50 + row) for row in range(len(sequences))])), 1)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("batch", [([1], "left"), ([1, 2], "left"), ([0, 1], "left")], ids=str)
def test_second_turn_on_a_copied_cache(family: FamilyRow, model: Any, batch: Any, positions: str) -> None:
    inputs = make_inputs(family, model, *batch)
    adafv = AdaFV(keep=KEEP, positions=positions)
    with adafv(model) as handle:
        one = first_turn(model, inputs)
        mask = handle.last.keep_mask
        copied = copy.deepcopy(one.past_key_values)
        conversation = more_text(one.sequences)
        new = conversation.shape[1] - inputs["input_ids"].shape[1]
        attention = torch.cat((inputs["attention_mask"], torch.ones(len(conversation), new, dtype=torch.long)), 1)
    with adafv(model):  # another `with` block: what was dropped travels with the cache
        two = model.generate(
            input_ids=conversation,
            attention_mask=attention,
            past_key_values=copied,
            **GREEDY,
            return_dict_in_generate=True,
            output_logits=True,
        )
    images = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
    full_mask = torch.cat((mask, torch.ones(len(mask), new, dtype=torch.bool)), 1)
    oracle = masked_inputs({"input_ids": conversation, "attention_mask": attention, **images}, full_mask, positions)
    expected = model.generate(**oracle, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert two.sequences.tolist() == expected.sequences.tolist()
    for mine, theirs in zip(two.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


def test_third_turn(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    images = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
    with AdaFV(keep=KEEP)(model) as adafv:
        one = first_turn(model, inputs)
        two = first_turn(model, {"input_ids": more_text(one.sequences), "past_key_values": one.past_key_values})
        three = first_turn(model, {"input_ids": more_text(two.sequences), "past_key_values": two.past_key_values})
        mask = adafv.last.keep_mask
    conversation = more_text(two.sequences)
    mask = torch.cat((mask, torch.ones(1, conversation.shape[1] - mask.shape[1], dtype=torch.bool)), 1)
    expected = model.generate(**masked_inputs({"input_ids": conversation, **images}, mask), **GREEDY)
    assert three.sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("position_ids", ["left-out", "given"])
def test_decoding_by_hand_with_forward(family: FamilyRow, model: Any, positions: str, position_ids: str) -> None:
    inputs = make_inputs(family, model, [1, 2])
    mask = inputs["attention_mask"]
    length = mask.shape[1]

    def places(mask: torch.Tensor, new: int) -> dict[str, torch.Tensor]:
        return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -new:]} if position_ids == "given" else {}

    if positions == "original" and position_ids == "left-out":
        pytest.skip(
            "the stock forward counts padding then, and differs per row from the oracle's positions by it alone"
        )
    with torch.no_grad(), AdaFV(keep=KEEP, positions=positions)(model) as adafv:
        output = model(**inputs, **places(mask, length), use_cache=True)
        tokens, logits = [], []
        for _ in range(4):
            logits.append(output.logits[:, -1])
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
            output = model(
                input_ids=tokens[-1], attention_mask=mask, past_key_values=output.past_key_values, **places(mask, 1)
            )
        other = inputs["input_ids"].clone()
        other[:, -1] += 1  # the conversation is still known after steps that named only their own token
        with pytest.raises(CacheError, match="another prompt"):
            model.generate(
                input_ids=torch.cat((other, *tokens, tokens[-1]), 1),
                attention_mask=torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1),
                past_key_values=output.past_key_values,
                max_new_tokens=2,
            )
    oracle = masked_inputs(inputs, adafv.last.keep_mask, positions)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(**oracle, **options, return_dict_in_generate=True, output_logits=True)
    if expected.sequences[:, -4:].ne(END).all():
        assert torch.cat(tokens, 1).tolist() == answer(expected.sequences, inputs)
    torch.testing.assert_close(logits[0], expected.logits[0], **TOLERANCE)
    torch.testing.assert_close(logits[1], expected.logits[1], **TOLERANCE)


def test_cache_from_another_prompt_is_refused(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    with AdaFV(keep=KEEP)(model):
        one = first_turn(model, inputs)
        other = more_text(one.sequences)
        other[0, 1] = (other[0, 1] + 1) % IMAGE
        with pytest.raises(CacheError, match="another prompt"):
            model.generate(input_ids=other, past_key_values=one.past_key_values, **GREEDY)
        with pytest.raises(CacheError, match="only"):
            model.generate(input_ids=one.sequences[:, :4], past_key_values=one.past_key_values, **GREEDY)
        twice = more_text(one.sequences).repeat(2, 1)
        with pytest.raises(CacheError, match="prompts"):
            model.generate(input_ids=twice, past_key_values=one.past_key_values, **GREEDY)
        with pytest.raises(CacheError, match="attention_mask"):
            model(
                input_ids=torch.tensor([[5]]),
                attention_mask=torch.ones(1, 3, dtype=torch.long),
                past_key_values=one.past_key_values,
            )


def test_image_in_turn_two_on_a_text_cache(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    text = torch.tensor([[1, *words(6, 4)]])
    images = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
    with AdaFV(keep=KEEP)(model) as adafv:
        one = first_turn(model, {"input_ids": text})
        conversation = torch.cat((one.sequences, inputs["input_ids"]), 1)
        two = model.generate(input_ids=conversation, past_key_values=one.past_key_values, **images, **GREEDY)
        mask = adafv.last.keep_mask
    expected = model.generate(**masked_inputs({"input_ids": conversation, **images}, mask), **GREEDY)
    assert two.tolist() == expected.tolist()


# ------------------------------------------------------------------------------------ other entrances


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("batch", [([1], "left"), ([2, 0, 1], "left")], ids=str)
def test_inputs_embeds(family: FamilyRow, model: Any, batch: Any, with_ids: bool) -> None:
    inputs = make_inputs(family, model, *batch)
    ids = inputs["input_ids"] if with_ids else inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    with AdaFV(keep=KEEP)(model) as adafv:
        pruned = model.generate(**inputs, inputs_embeds=embeds, **options)
        logits = model(**{k: v for k, v in inputs.items() if k != "input_ids"}, inputs_embeds=embeds).logits
    oracle = masked_inputs(inputs, adafv.last.keep_mask)
    expected = model.generate(**oracle, inputs_embeds=embeds, **options)
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    for mine, theirs in zip(pruned.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)
    torch.testing.assert_close(logits[:, -1], expected.logits[0], **TOLERANCE)


def test_compress_by_hand(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1, 2])
    before = {name: value.clone() for name, value in inputs.items()}
    short = compress(model, inputs, keep=KEEP)
    output = model.generate(**short, **GREEDY)
    expected = model.generate(**masked_inputs(inputs, short.record.keep_mask), **GREEDY)
    assert output[:, short["input_ids"].shape[1] :].tolist() == answer(expected, inputs)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    assert "pixel_values" not in short


def test_compress_by_hand_and_caches(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    images = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
    one = first_turn(model, compress(model, inputs, keep=KEEP))
    with pytest.raises(UnsupportedCallError, match="continue a conversation"):
        compress(model, {"input_ids": more_text(one.sequences), "past_key_values": one.past_key_values}, keep=KEEP)

    short = compress(model, {**inputs, "past_key_values": DynamicCache()}, keep=KEEP)
    one = first_turn(model, short)
    conversation = torch.cat((inputs["input_ids"], one.sequences[:, short["input_ids"].shape[1] :]), 1)
    conversation = more_text(conversation)
    with AdaFV(keep=KEEP)(model):
        two = model.generate(input_ids=conversation, past_key_values=one.past_key_values, **GREEDY)
    mask = short.record.keep_mask
    mask = torch.cat((mask, torch.ones(1, conversation.shape[1] - mask.shape[1], dtype=torch.bool)), 1)
    expected = model.generate(**masked_inputs({"input_ids": conversation, **images}, mask), **GREEDY)
    assert two.tolist() == expected.tolist()


def test_errors_of_the_stock_model_stay_its_own(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    with AdaFV(keep=KEEP)(model):
        with pytest.raises(ValueError, match="alongside"):
            model.generate(inputs["input_ids"], **inputs, **GREEDY)
        with pytest.raises(ValueError, match="not used by the model"):
            model.generate(**inputs, **GREEDY, tempurature=1.0)


def test_prompt_without_image_is_untouched(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [0])
    stock = model.generate(**inputs, **GREEDY)
    with AdaFV(keep=KEEP)(model) as adafv:
        assert torch.equal(model.generate(**inputs, **GREEDY), stock)
        assert torch.equal(model.generate(inputs["input_ids"], **GREEDY), stock)
        torch.testing.assert_close(model(**inputs).logits, model(inputs["input_ids"]).logits)
    with pytest.raises(NoRecordError, match="with an image first"):
        _ = adafv.last


def test_positional_arguments(family: FamilyRow, model: Any) -> None:
    inputs = make_inputs(family, model, [1])
    ids = inputs.pop("input_ids")
    with AdaFV(keep=KEEP)(model):
        named = model.generate(input_ids=ids, **inputs, **GREEDY)
        assert torch.equal(model.generate(ids, **inputs, **GREEDY), named)
        pixels = inputs.pop("pixel_values")
        assert torch.equal(
            model(ids, pixels, **inputs).logits, model(input_ids=ids, pixel_values=pixels, **inputs).logits
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", pytest.param("llava-next", marks=pytest.mark.release)])
def test_compiled_language_model(name: str) -> None:
    """The language model of both is the same, and the images have left before it begins."""
    family = next(row for row in DEEP if row.name == name)
    model = family.build()
    inputs = make_inputs(family, model, [1])
    with torch.no_grad(), AdaFV(keep=KEEP)(model):
        plain = model(**inputs).logits
    model.model.language_model.compile(backend="aot_eager")
    with torch.no_grad(), AdaFV(keep=KEEP)(model):
        torch.testing.assert_close(model(**inputs).logits, plain, **TOLERANCE, equal_nan=True)
        output = model.generate(**inputs, **(GREEDY | {"max_new_tokens": 2}))
    assert output.shape[1] <= inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize(
    "asked", [[2, 1], slice(-3, None), slice(1, 4), -2, torch.tensor([-1, 3]), range(2, 5), np.array([5, -1])], ids=repr
)
def test_logits_of_columns_named_in_any_way(family: FamilyRow, model: Any, asked: Any) -> None:
    """The stock model takes whatever indexes a tensor, though it says int or Tensor; columns are those of the caller's."""
    inputs = make_inputs(family, model, [1])
    with torch.no_grad(), AdaFV(keep=KEEP)(model) as adafv:
        found, whole = model(**inputs, logits_to_keep=asked).logits, model(**inputs).logits
        keep = adafv.last.keep_mask
    with torch.no_grad():
        expected = model(**masked_inputs(inputs, keep), logits_to_keep=asked).logits
    columns = slice(2, None) if isinstance(asked, int) else asked
    assert found.shape == expected.shape
    torch.testing.assert_close(found, whole[:, columns], atol=0, rtol=0, equal_nan=True)
    kept = keep[:, columns]
    torch.testing.assert_close(found[kept], expected[kept], **TOLERANCE)
    assert found[~kept].isnan().all()
    with AdaFV(keep=KEEP, logits="kept")(model), pytest.raises(UnsupportedCallError, match="must be a number"):
        model(**inputs, logits_to_keep=asked)
    with torch.no_grad(), AdaFV(keep=1.0)(model):
        found, whole = model(**inputs, logits_to_keep=asked).logits, model(**inputs).logits
    torch.testing.assert_close(found, whole[:, columns], **TOLERANCE)  # the head ran on fewer columns


@pytest.mark.slow
def test_a_model_that_is_compiled_as_a_whole() -> None:
    """What is compiled leads back into the wrapper at every token of an answer, where the prompt is shortened already."""
    family = DEEP[0]
    model = family.build()
    inputs = make_inputs(family, model, [1])
    text = {"input_ids": torch.tensor([[1, *words(4, 0)]])}
    with torch.no_grad():
        stock, alone = model(**inputs).logits, model(**text).logits
        answer = model.generate(**text, **GREEDY)
        pruned = DynamicCache()
        with AdaFV(keep=KEEP)(model):
            compiled = torch.compile(model, backend="eager")
            with pytest.raises(
                UnsupportedCallError, match=r"language model alone: model.model.language_model.compile\(\)"
            ):
                compiled(**inputs)
            model(**inputs, past_key_values=pruned)
            with pytest.raises(UnsupportedCallError, match="the model is compiled as a whole"):
                compiled(**text, past_key_values=pruned)
            torch.testing.assert_close(compiled(**text).logits, alone, **TOLERANCE)
            torch.testing.assert_close(compiled(**text, past_key_values=DynamicCache()).logits, alone, **TOLERANCE)
        torch.testing.assert_close(compiled(**inputs).logits, stock, **TOLERANCE)
        torch.compiler.reset()
        model.compile(backend="eager")
        with AdaFV(keep=KEEP)(model):
            for call in (model, lambda **given: model.generate(**given, **GREEDY)):
                with pytest.raises(UnsupportedCallError, match="the model is compiled as a whole"):
                    call(**inputs)
            assert torch.equal(model.generate(**text, **GREEDY), answer)  # which has a cache, at every token


@pytest.mark.slow
def test_a_call_that_generate_compiled_outside(family: FamilyRow) -> None:
    """With a static cache it compiles the model's call, on accelerators by itself, and keeps that on the model."""
    model = family.build()
    inputs = make_inputs(family, model, [1])
    config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    static = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}

    def two_turns(**options: Any) -> list[torch.Tensor]:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
        one = model.generate(**inputs, past_key_values=cache, **static, **options)
        chat = torch.cat((one.sequences, torch.tensor([words(3, 7)])), 1)
        two = model.generate(input_ids=chat, past_key_values=cache, **static, **options)
        return [torch.stack(turn.logits) for turn in (one, two)]

    stock = two_turns(compile_config=config)
    kept = model.__dict__["_compiled_call"]
    for _ in range(2):
        with AdaFV(keep=KEEP)(model):
            plain, compiled = two_turns(), two_turns(compile_config=config)
        for one, other in zip(plain, compiled, strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)
    assert model.__dict__["_compiled_call"] is kept
    own = model.__dict__["_adafv_compiled"]._compiled_call
    with AdaFV(keep=KEEP)(model):
        two_turns(compile_config=config)
    assert model.__dict__["_adafv_compiled"]._compiled_call is own  # to compile takes long
    assert copy.deepcopy(model).__dict__["_adafv_compiled"] is None
    for one, other in zip(two_turns(compile_config=config), stock, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_a_processor_that_calls_the_model(family: FamilyRow, model: Any) -> None:
    """As contrastive decoding does with another picture; the record is that of the call which has just returned."""
    inputs, other = (make_inputs(family, model, [1], seed=seed) for seed in (0, 3))
    inner: list[torch.Tensor] = []

    def contrast(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inner.append(model(**other).logits)
        return scores

    with torch.no_grad(), AdaFV(keep=KEEP)(model) as adafv:
        plain, kept = model.generate(**inputs, **GREEDY), adafv.last.kept
        expected, others = model(**other).logits, adafv.last.kept
        assert not torch.equal(kept[0], others[0])
        found = model.generate(**inputs, **GREEDY, logits_processor=LogitsProcessorList([contrast]))
        assert torch.equal(adafv.last.kept[0], kept[0])
    assert torch.equal(found, plain)
    assert torch.equal(inner[-1].nan_to_num(), expected.nan_to_num())

    def elsewhere() -> None:
        with torch.no_grad():
            model.generate(**inputs, **GREEDY, logits_processor=LogitsProcessorList([contrast]))

    with AdaFV(keep=KEEP)(model) as adafv:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert torch.equal(adafv.last.kept[0], kept[0])  # of another thread: the last call that any finished


class Unasked(DynamicCache):
    """As a static cache, whose length lies on the device."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        raise AssertionError("nobody needs to know how long it is")


@pytest.mark.parametrize("guessing", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_decoding_of_a_later_turn_is_refused(family: FamilyRow, model: Any, guessing: str) -> None:
    """Stock transformers reads what is cached once more, and goes on as if the conversation had begun twice."""
    inputs = make_inputs(family, model, [1], seed=1)
    assistant = LlamaForCausalLM(text_config()).eval()
    option = {guessing: 3 if guessing == "prompt_lookup_num_tokens" else assistant}
    options = {**GREEDY, "min_new_tokens": 6, "return_dict_in_generate": True}
    with AdaFV(keep=KEEP)(model):
        cache = DynamicCache(config=model.config)
        one = model.generate(**inputs, past_key_values=cache, **options)  # empty: a first turn
        chat = torch.cat((one.sequences, torch.tensor([words(3, 7)])), 1)
        with pytest.raises(UnsupportedCallError, match=f"{guessing} on a cache that is filled .* out of later turns"):
            model.generate(input_ids=chat, past_key_values=cache, **options, **option)
        config = copy.deepcopy(model.generation_config)
        if guessing == "prompt_lookup_num_tokens":
            config.prompt_lookup_num_tokens = 3
            with pytest.raises(UnsupportedCallError, match="on a cache that is filled"):
                model.generate(input_ids=chat, past_key_values=cache, generation_config=config, **options)
        two = model.generate(input_ids=chat, past_key_values=cache, **options)
        whole = {"attention_mask": torch.ones_like(chat), "pixel_values": inputs["pixel_values"]}
        whole |= {name: inputs[name] for name in ("image_sizes",) if name in inputs}
        mended = model.generate(input_ids=chat, **whole, **options, **option)
    assert mended.sequences.shape == two.sequences.shape
    refuse_unsupported(model, family_of(model), {"past_key_values": Unasked()})  # by others no device is waited for
    # The stock model by itself, without an image: should a release mend it, the refusal can go.
    text = torch.tensor([[1, *words(6, 0)]])
    caches, found = [DynamicCache(config=model.config) for _ in range(2)], []
    for cache, extra in zip(caches, ({}, option), strict=True):
        first = model.generate(text, past_key_values=cache, **options)
        more = torch.cat((first.sequences, torch.tensor([words(3, 1)])), 1)
        model.generate(more, past_key_values=cache, **options, **extra)
        found.append(cache.get_seq_length())
    assert found[1] > found[0]
