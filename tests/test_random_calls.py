"""Random ways of calling `forward` and `generate`, against the oracle.

Every other test of a way of calling fixes all the others; faults hid where two met (padding on both sides and a number of
logits, a repeated cache and a second turn). Here everything is drawn at once: family, numbers of images, padding on either
side and its token, mask and positions given or not, lengths, names of the cache, and what follows on it. The examples are
the same in every run (`derandomize`), before a release four times as many; ADAFV_EXAMPLES=500 looks at more, and other ones.
Hypothesis draws a seed, and all else follows from it: drawn one by one, its choices lean to the simple, and half of what
was written here was never called.
"""

import os
import random
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from models import END, FAMILIES, PAD, FamilyRow, make_inputs, token_types, words
from oracle import VISUAL_INPUTS, masked_inputs, same_logits

from adafv import Pruner
from adafv.engines.transformers.releases import CACHE_NAMES, returned_cache

ROWS = ["llava", "llava-next", "internvl", "qwen2.5-vl", "gemma3", "mistral3"]
"""One token a patch, crops with newlines, one tensor for all images, M-RoPE, tokens that look ahead, rows of any length."""
TOLERANCE = {"atol": 3e-5, "rtol": 3e-5}
EXAMPLES = int(os.environ.get("ADAFV_EXAMPLES", "25" if os.environ.get("ADAFV_WHOLE") else "6"))
drawn = settings(
    max_examples=EXAMPLES,
    derandomize="ADAFV_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@cache
def built(name: str) -> tuple[FamilyRow, Any]:
    row = next(row for row in FAMILIES if row.name == name)
    return row, row.build()


def coin(chance: random.Random) -> bool:
    return chance.random() < 0.5


def prompts(chance: random.Random, row: FamilyRow, model: Any, right: bool) -> dict[str, Any]:
    """A batch of prompts, padded on the left and, if asked for, with answers of different lengths on the right."""
    images = [chance.randint(1, 2), *(chance.randint(0, 2) for _ in range(chance.randint(0, 2)))]
    chance.shuffle(images)
    inputs = make_inputs(row, model, images, seed=chance.randint(0, 5))
    pad = chance.choice([PAD, END])
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    prompt = ids.shape[1]
    ids[mask == 0] = pad
    front = chance.randint(0, 3)
    ids = torch.nn.functional.pad(ids, (front, 0), value=pad)
    mask = torch.nn.functional.pad(mask, (front, 0))
    if right:
        lengths = [chance.randint(0, 5) for _ in images]
        width = max(lengths) + chance.randint(0, 1)
        answers, shown = torch.full((len(images), width), pad), torch.zeros(len(images), width, dtype=torch.long)
        for number, length in enumerate(lengths):
            answers[number, :length], shown[number, :length] = torch.tensor(words(length, number)), 1
        ids, mask = torch.cat((ids, answers), 1), torch.cat((mask, shown), 1)
    visuals = {name: value for name, value in inputs.items() if name in VISUAL_INPUTS}
    return {"input_ids": ids, "attention_mask": mask, **token_types(row, ids, front + prompt), **visuals}


def options_of(chance: random.Random) -> dict[str, Any]:
    method = chance.choice(["adafv", "saliency", "uniform"])
    keep = chance.uniform(0.05, 1.0) if coin(chance) else chance.randint(1, 40)
    return {"method": method, "keep": keep, "positions": chance.choice(["compact", "original"])}


def whole_conversation(
    row: FamilyRow, first: dict[str, Any], keep: torch.Tensor, more: torch.Tensor
) -> tuple[dict[str, Any], torch.Tensor]:
    """(the prompts and what follows them, what was kept of both)."""
    ids = torch.cat((first["input_ids"], more), 1)
    wide = {"value": 1, "pad": (0, more.shape[1])}
    mask = torch.nn.functional.pad(first["attention_mask"], **wide)
    visuals = {name: value for name, value in first.items() if name in VISUAL_INPUTS}
    types = token_types(row, ids, first["input_ids"].shape[1])
    kept = torch.nn.functional.pad(keep.long(), **wide).bool()
    return {"input_ids": ids, "attention_mask": mask, **types, **visuals}, kept


@pytest.mark.parametrize("name", ROWS)
@drawn
@given(seed=st.integers(0, 2**32 - 1))
def test_forward(name: str, seed: int) -> None:
    row, model = built(name)
    chance = random.Random(seed)
    follows = coin(chance)
    inputs = prompts(chance, row, model, right=not follows)
    chosen = options_of(chance)
    given_mask, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
    call = dict(inputs)
    if given_mask.all() and coin(chance):
        del call["attention_mask"]
    if not row.rotary and coin(chance):
        call["position_ids"] = (given_mask.cumsum(-1) - 1).clamp_min(0) + row.first_position
    last = chance.randint(1, length + 2) if coin(chance) else None
    if last is not None:
        call["logits_to_keep"] = last
    as_tuple = coin(chance)
    if as_tuple:
        call["return_dict"] = False
    call["use_cache"] = follows or coin(chance)
    note(f"{chosen} {sorted(call)} {given_mask.tolist()}")
    with torch.no_grad(), Pruner(**chosen)(model) as pruner:
        output = model(**call)
        keep = pruner.last.keep_mask
        logits = output[0] if as_tuple else output.logits
        if follows:
            event("something follows")
            held = (
                next(part for part in output if hasattr(part, "get_seq_length")) if as_tuple else returned_cache(output)
            )
            rows = torch.arange(len(given_mask))
            if coin(chance):
                rows = torch.tensor([chance.choice(rows.tolist()) for _ in range(chance.randint(1, 3))])
                held.batch_select_indices(rows)
            more = torch.tensor([words(chance.randint(1, 3), 30)] * len(rows))
            mask = torch.nn.functional.pad(given_mask[rows], (0, more.shape[1]), value=1)
            then = {"input_ids": more, "attention_mask": mask, chance.choice(CACHE_NAMES): held}
            if "position_ids" in call:
                then["position_ids"] = (mask.cumsum(-1) - 1)[:, -more.shape[1] :] + row.first_position
            after = model(**then).logits
    with torch.no_grad():
        expected = model(**masked_inputs(inputs, keep, chosen["positions"], row, model)).logits
        columns = slice(-min(last, length) if last else None, None)
        same_logits(logits, expected[:, columns], given_mask[:, columns], keep[:, columns], **TOLERANCE)
        if follows:
            whole, kept = whole_conversation(row, inputs, keep, more[:1].expand(len(keep), -1))
            expected = model(**masked_inputs(whole, kept, chosen["positions"], row, model)).logits
            torch.testing.assert_close(after, expected[rows, -more.shape[1] :], **TOLERANCE)


@pytest.mark.parametrize("name", ROWS)
@drawn
@given(seed=st.integers(0, 2**32 - 1))
def test_generate(name: str, seed: int) -> None:
    row, model = built(name)
    chance = random.Random(seed)
    inputs = prompts(chance, row, model, right=False)
    chosen = options_of(chance)
    length = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "suppress_tokens": list(range(110, 120)),
        "return_dict_in_generate": True,
        "output_scores": True,
        "pad_token_id": chance.choice([PAD, END]),
        "use_cache": coin(chance),
    }
    if coin(chance):
        options["repetition_penalty"] = 1.4
    if coin(chance):
        options["no_repeat_ngram_size"] = 2
    if coin(chance):
        del options["max_new_tokens"]
        options |= {"max_length": length + 4, "min_length": length + chance.randint(0, 4)}
    call = dict(inputs)
    if inputs["attention_mask"].all() and coin(chance):
        del call["attention_mask"]
    follows = options["use_cache"] and coin(chance)
    note(f"{chosen} {options} {inputs['attention_mask'].tolist()}")
    with Pruner(**chosen)(model) as pruner:
        one = model.generate(**call, **options)
        keep = pruner.last.keep_mask
        if follows:
            event("something follows")
            rows = torch.arange(len(keep))
            held = returned_cache(one)
            if coin(chance):
                held.batch_repeat_interleave(2)
                rows = rows.repeat_interleave(2)
            more = torch.tensor([words(3, 70)] * len(rows))
            conversation = torch.cat((one.sequences[rows], more), 1)
            new = conversation.shape[1] - length
            mask = torch.nn.functional.pad(inputs["attention_mask"][rows], (0, new), value=1)
            later = {**options, "max_length": None, "min_length": None, "max_new_tokens": 1}
            two = model.generate(
                input_ids=conversation, attention_mask=mask, **{chance.choice(CACHE_NAMES): held}, **later
            )
    oracle = masked_inputs(inputs, keep, chosen["positions"], row, model, generates=True)
    expected = model.generate(**oracle, **options)
    assert one.sequences.tolist() == expected.sequences.tolist()
    for mine, theirs in zip(one.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)
    if follows:
        whole, kept = whole_conversation(
            row, inputs, keep, torch.cat((one.sequences[:, length:], more[: len(keep)]), 1)
        )
        oracle = masked_inputs(whole, kept, chosen["positions"], row, model, generates=True)
        expected = model.generate(**oracle, **later)
        torch.testing.assert_close(two.scores[0], expected.scores[0][rows], **TOLERANCE)
