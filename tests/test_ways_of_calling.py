"""Ways of calling that users of other projects reported, in every family: right in the caller's own columns, or refused.

What is right is what the stock model makes of the same prompts with the dropped placeholders masked (oracle.py). Each of
these was silently wrong, or an error, while all other tests passed: those call with one prompt per row, padding on one
side, and look at the last columns.
"""

import contextlib
import copy
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import BEGIN, END, IMAGE, PAD, FamilyRow, make_inputs, token_types, words
from oracle import STOCK_MIXES_UP_IMAGES, VISUAL_INPUTS, masked_inputs, rotary_positions, same_logits
from sharing import logged
from transformers import DynamicCache
from transformers.trainer_pt_utils import LabelSmoother

from adafv import AdaFV, Pruner, compress
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.reading import read_prompt
from adafv.engines.transformers.releases import CACHE, CACHE_NAMES, returned_cache
from adafv.errors import PromptError, UnsupportedCallError, UnsupportedModelError

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
KEEP = 0.3
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": list(range(110, 120))}
DECODED = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}


def along_the_prompt(row: FamilyRow, inputs: dict[str, Any]) -> list[str]:
    return [name for name in ("input_ids", *row.token_types) if name in inputs]


# ------------------------------------------------------------------------------------------------- packed prompts


def packed(row: FamilyRow, model: Any, batch: dict[str, Any], rows: list[list[int]]) -> tuple[dict[str, Any], Any]:
    """The prompts of a padded batch, packed: (inputs, for every packed row which (prompt, column) its columns were)."""
    attended = batch["attention_mask"].bool()
    first = row.first_position
    pairs = [[(p, int(c)) for p in prompts for c in attended[p].nonzero().flatten()] for prompts in rows]
    prompt, column = (torch.tensor([[pair[i] for pair in row] for row in pairs]) for i in range(2))
    inputs = {name: value for name, value in batch.items() if name != "attention_mask"}
    for name in along_the_prompt(row, batch):
        inputs[name] = batch[name][prompt, column]
    along = ((batch["attention_mask"].cumsum(-1) - 1).clamp_min(0) + first)[prompt, column]
    if row.rotary:
        places = rotary_positions(row, model, batch, batch["attention_mask"], None)[:, prompt, column]
        along = torch.cat((along[None], places))
    return {**inputs, "position_ids": along, "use_cache": False}, (prompt, column)


def two_rows_of_one_length(row: FamilyRow, model: Any) -> tuple[dict[str, Any], list[list[int]]]:
    """Two prompts with images make one row; another with an image makes one with a text as long as needed."""
    batch = make_inputs(row, model, [1, 1, 1], seed=2)
    lengths = batch["attention_mask"].sum(1).tolist()
    rest = lengths[0] + lengths[1] - lengths[2]
    text = torch.tensor([1, *words(rest - 1, 77)])
    width = max(batch["input_ids"].shape[1], rest)
    for name, fill in (("input_ids", PAD), ("attention_mask", 0)):
        wide = torch.nn.functional.pad(batch[name], (width - batch[name].shape[1], 0), value=fill)
        last = torch.full((1, width), fill)
        last[0, width - rest :] = text if name == "input_ids" else 1
        batch[name] = torch.cat((wide, last))
    return {**batch, **token_types(row, batch["input_ids"])}, [[0, 1], [2, 3]]


@pytest.mark.parametrize("rows", ["one", "two"])
def test_packed_prompts(any_family: FamilyRow, any_model: Any, rows: str) -> None:
    """Every prompt of a row is a prompt of its own: in words, positions and lengths."""
    row, model = any_family, any_model
    if rows == "one":
        batch, chosen = make_inputs(row, model, [1, 2], seed=1), [[0, 1]]
    else:
        batch, chosen = two_rows_of_one_length(row, model)
    inputs, place = packed(row, model, batch, chosen)
    with torch.no_grad():
        stock = model(**inputs).logits
        with AdaFV(keep=1.0)(model):
            assert torch.equal(model(**inputs).logits, stock)
        if not row.packed_rows:
            unpacked = model(**batch, use_cache=False).logits[place]
            assert (stock - unpacked).abs().max() > 1e-2  # the stock model mixes them up
            with AdaFV(keep=KEEP)(model), pytest.raises(UnsupportedCallError, match="packed into one row"):
                model(**inputs)
            return
        with AdaFV(keep=KEEP)(model) as adafv:
            pruned, keep = model(**inputs).logits, adafv.last.keep_mask
            model(**batch)
            alone = adafv.last.keep_mask[place]
        expected = model(**masked_inputs(batch, adafv.last.keep_mask, row=row, model=model)).logits[place]
        short = compress(model, inputs, KEEP)
    assert torch.equal(keep, alone)  # the words of one prompt do not count for the images of another
    assert not keep.all()
    same_logits(pruned, expected, torch.ones_like(keep), keep, **TOLERANCE)
    along = short["position_ids"][0] if row.rotary else short["position_ids"]
    assert along.min() >= 0
    if not row.rotary:
        with AdaFV(keep=KEEP, positions="original")(model), pytest.raises(UnsupportedCallError, match="compact"):
            model(**inputs)


def test_borders_of_packed_prompts_move_with_them(any_family: FamilyRow, any_model: Any) -> None:
    """`cu_seq_lens_*`, as flash attention wants them: with or without positions that say the same."""
    row, model = any_family, any_model
    if not row.packed_rows:
        pytest.skip("packed prompts are refused, see test_packed_prompts")
    batch = make_inputs(row, model, [1, 2], seed=1)
    inputs, _ = packed(row, model, batch, [[0, 1]])
    ends = torch.tensor([0, *batch["attention_mask"].sum(1).tolist()]).cumsum(0).int()
    borders = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 99, "max_length_k": torch.tensor(99)}
    short = compress(model, {**inputs, **borders}, KEEP)
    with_positions = short.record.keep_mask
    expected = [0, *[int(with_positions[0, : int(end)].sum()) for end in ends[1:]]]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert short[name].tolist() == expected
        assert short[name].dtype == torch.int32
    longest = max(end - start for start, end in pairwise(expected))
    assert short["max_length_q"] == short["max_length_k"] == longest
    assert short["input_ids"].shape[1] == expected[-1]
    del inputs["position_ids"]
    without = compress(model, {**inputs, **borders}, KEEP)
    assert torch.equal(without.record.keep_mask, with_positions)
    assert without["cu_seq_lens_q"].tolist() == expected


# --------------------------------------------------------------------------------------- the caller's own columns


def both_sides(row: FamilyRow, batch: dict[str, Any]) -> dict[str, Any]:
    """Prompts padded on the left and answers of different lengths padded on the right, as TRL's GRPO makes them."""
    rows, prompt = len(batch["input_ids"]), batch["input_ids"].shape[1]
    answers = torch.full((rows, 4), PAD)
    mask = torch.zeros(rows, 4, dtype=torch.long)
    for number in range(rows):
        length = 4 - (2 * number) % 3
        answers[number, :length], mask[number, :length] = torch.tensor(words(length, 60 + number)), 1
    ids = torch.cat((batch["input_ids"], answers), 1)
    mask = torch.cat((batch["attention_mask"], mask), 1)
    return {**batch, "input_ids": ids, "attention_mask": mask, **token_types(row, ids, prompt)}


@pytest.mark.parametrize("asked", ["all", "last", "more-than-are-left", "by-number"])
@pytest.mark.parametrize("images", [[1, 2], [2, 0, 1]], ids=str)
def test_rows_padded_on_both_sides(any_family: FamilyRow, any_model: Any, asked: str, images: list[int]) -> None:
    row, model = any_family, any_model
    inputs = both_sides(row, make_inputs(row, model, images))
    length = inputs["input_ids"].shape[1]
    wanted: dict[str, Any] = {
        "all": {},
        "last": {"logits_to_keep": 5},
        "more-than-are-left": {"logits_to_keep": length - 1},
        "by-number": {"logits_to_keep": torch.tensor([1, length - 5, length - 2])},
    }[asked]
    with torch.no_grad():
        with AdaFV(keep=KEEP)(model) as adafv:
            pruned = model(**inputs, **wanted).logits
        expected = model(**masked_inputs(inputs, adafv.last.keep_mask, row=row, model=model)).logits
    columns = torch.arange(length)[wanted["logits_to_keep"] if asked == "by-number" else slice(0)]
    if asked != "by-number":
        columns = torch.arange(length)[-wanted.get("logits_to_keep", 0) :]
    given, keep = inputs["attention_mask"][:, columns], adafv.last.keep_mask[:, columns]
    same_logits(pruned, expected[:, columns], given, keep, **TOLERANCE)


def test_the_short_prompts_logits_can_be_had(any_family: FamilyRow, any_model: Any) -> None:
    model, inputs = any_model, make_inputs(any_family, any_model, [2, 1])
    with torch.no_grad():
        with AdaFV(keep=KEEP, logits="kept")(model) as adafv:
            short = model(**inputs).logits
        with AdaFV(keep=KEEP)(model):
            long = model(**inputs).logits
    attended = inputs["attention_mask"].bool() & adafv.last.keep_mask
    assert short.shape[1] == adafv.last.prompt_length_after < long.shape[1] == inputs["input_ids"].shape[1]
    for mine, theirs, kept in zip(short, long, attended, strict=True):
        assert torch.equal(mine[-int(kept.sum()) :], theirs[kept])


def test_hidden_states_are_in_the_callers_columns(any_family: FamilyRow, any_model: Any) -> None:
    row, model = any_family, any_model
    inputs = make_inputs(row, model, [1, 2])
    with torch.no_grad():
        with AdaFV(keep=KEEP)(model) as adafv:
            pruned = model(**inputs, output_hidden_states=True).hidden_states
            generated = model.generate(**inputs, **DECODED, output_hidden_states=True).hidden_states
        expected = model(**masked_inputs(inputs, adafv.last.keep_mask, row=row, model=model), output_hidden_states=True)
    assert len(pruned) == len(expected.hidden_states)
    for mine, first, theirs in zip(pruned, generated[0], expected.hidden_states, strict=True):
        same_logits(mine, theirs, inputs["attention_mask"], adafv.last.keep_mask, **TOLERANCE)
        same_logits(first, theirs, inputs["attention_mask"], adafv.last.keep_mask, **TOLERANCE)


# ------------------------------------------------------------------------------------------------------ the cache


@contextlib.contextmanager
def no_deprecation() -> Any:
    from transformers.utils import logging

    logging.set_verbosity_warning()
    logging.enable_propagation()
    logging.warning_once.cache_clear()
    try:
        with logged() as records, warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            warnings.simplefilter("error", DeprecationWarning)
            yield
    finally:
        logging.set_verbosity_error()
        logging.disable_propagation()
    assert not [record for record in records if "past_key_values" in record.getMessage()]


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_under_either_name(any_family: FamilyRow, any_model: Any, name: str) -> None:
    """transformers 5.24 calls it `cache`, before it was `past_key_values`; here both are the same, in every release."""
    row, model = any_family, any_model
    inputs = make_inputs(row, model, [1])
    with AdaFV(keep=KEEP)(model) as adafv, no_deprecation():
        one = model.generate(**inputs, **DECODED, **{name: DynamicCache(config=model.config.get_text_config())})
        keep = adafv.last.keep_mask
        conversation = torch.cat((one.sequences, torch.tensor([words(4, 50)])), 1)
        cache = returned_cache(one)
        before = cache.get_seq_length()
        two = model.generate(input_ids=conversation, **DECODED, **{name: copy.deepcopy(cache)})
        with torch.no_grad():
            new = model(input_ids=conversation[:, -5:], **{name: cache}, use_cache=True)
        assert returned_cache(new).get_seq_length() == before + 5
    visuals = {name: value for name, value in inputs.items() if name in VISUAL_INPUTS}
    more = conversation.shape[1] - keep.shape[1]
    whole = {
        "input_ids": conversation,
        "attention_mask": torch.ones_like(conversation),
        **token_types(row, conversation, keep.shape[1]),
        **visuals,
    }
    mask = torch.nn.functional.pad(keep, (0, more), value=True)
    expected = model.generate(**masked_inputs(whole, mask, row=row, model=model, generates=True), **DECODED)
    assert two.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(two.logits), torch.stack(expected.logits), **TOLERANCE)
    torch.testing.assert_close(new.logits[:, -1], expected.logits[0], **TOLERANCE)


def test_a_cache_under_another_name_is_refused(any_family: FamilyRow, any_model: Any) -> None:
    """So the next renaming is not silent."""
    model, inputs = any_model, make_inputs(any_family, any_model, [1])
    with AdaFV(keep=KEEP)(model):
        one = model.generate(**inputs, **DECODED)
        for call in (model.generate, model):
            with pytest.raises(UnsupportedCallError, match="memory"):
                call(input_ids=one.sequences, memory=returned_cache(one))
        with pytest.raises(UnsupportedCallError, match="twice"):
            model.generate(input_ids=one.sequences, cache=DynamicCache(), past_key_values=DynamicCache())
        along = torch.ones_like(inputs["input_ids"])
        for name in ("position_numbers", "span_ids"):
            with pytest.raises(UnsupportedCallError, match=name):
                model(**inputs, **{name: along})


@pytest.mark.parametrize("how", ["return-sequences", "repeated", "chosen", "repeated-copy"])
def test_several_answers_continued(any_family: FamilyRow, any_model: Any, how: str) -> None:
    """A cache whose rows were repeated or chosen holds other prompts than it was filled with."""
    row, model = any_family, any_model
    inputs = make_inputs(row, model, [1, 2])
    rows = torch.tensor([1, 0, 1]) if how == "chosen" else torch.tensor([0, 0, 1, 1])
    torch.manual_seed(4)
    with AdaFV(keep=KEEP)(model) as adafv:
        if how == "return-sequences" and STOCK_MIXES_UP_IMAGES and "image" in family_of(model).as_tensor:
            with pytest.raises(UnsupportedCallError, match="mixes up prompts"):
                model.generate(**inputs, **{**DECODED, "do_sample": True}, num_return_sequences=2)
            return
        if how == "return-sequences":
            one = model.generate(**inputs, **{**DECODED, "do_sample": True}, num_return_sequences=2)
            said = one.sequences
        else:
            one = model.generate(**inputs, **DECODED)
            said = one.sequences[rows]
        keep, cache = adafv.last.keep_mask[rows], returned_cache(one)
        if how == "repeated-copy":
            cache = copy.deepcopy(cache)
        if how == "chosen":
            cache.batch_select_indices(rows)
        elif how != "return-sequences":
            cache.batch_repeat_interleave(2)
        conversation = torch.cat((said, torch.tensor([words(3, 40 + i) for i in range(len(rows))])), 1)
        more = conversation.shape[1] - keep.shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"][rows], (0, more), value=1)
        two = model.generate(input_ids=conversation, attention_mask=mask, **{CACHE: cache}, **DECODED)
    asked = make_inputs(row, model, [1, 2])  # for each answer to the first prompt, one to the second stands below it
    of_first, of_second = ([place for place, prompt in enumerate(rows.tolist()) if prompt == each] for each in (0, 1))
    expected = torch.full_like(two.logits[0], torch.nan)
    for number in range(max(len(of_first), len(of_second))):
        places = [of_first[min(number, len(of_first) - 1)], of_second[min(number, len(of_second) - 1)]]
        whole = {**asked, "input_ids": conversation[places], "attention_mask": mask[places]}
        whole |= token_types(row, conversation[places], asked["input_ids"].shape[1])
        kept = torch.nn.functional.pad(keep[places], (0, more), value=True)
        oracle = masked_inputs(whole, kept, row=row, model=model, generates=True)
        expected[places] = model.generate(**oracle, **{**DECODED, "max_new_tokens": 1, "min_new_tokens": 1}).logits[0]
    torch.testing.assert_close(two.logits[0], expected, **TOLERANCE)


def test_as_a_tuple(any_family: FamilyRow, any_model: Any) -> None:
    """`return_dict=False`: the cache in a tuple is continued as the one in an output is."""
    row, model = any_family, any_model
    inputs = make_inputs(row, model, [1, 1])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    ids = torch.tensor([words(2, 9), words(2, 8)])
    results = []
    with torch.no_grad(), AdaFV(keep=KEEP, positions="original")(model):
        for options in ({}, {"return_dict": False}):
            output = model(**inputs, use_cache=True, **options)
            if options:
                assert isinstance(output, tuple)
                logits, cache = output[0], next(part for part in output if hasattr(part, "get_seq_length"))
            else:
                logits, cache = output.logits, returned_cache(output)
            after = model(input_ids=ids, attention_mask=mask, **{CACHE: cache}, **options)
            results.append((logits, after[0] if options else after.logits))
    for by_name, in_tuple in zip(*results, strict=True):
        torch.testing.assert_close(by_name, in_tuple, atol=0, rtol=0, equal_nan=True)


# ----------------------------------------------------------------------------------------------- losses and labels


def test_losses_outside_the_model(any_family: FamilyRow, any_model: Any) -> None:
    """Label smoothing, as Trainer calls it, on the logits; and `shift_labels`, where the labels are shifted already."""
    row, model = any_family, any_model
    inputs = make_inputs(row, model, [1, 2])
    visual = inputs["input_ids"] == IMAGE
    labels = inputs["input_ids"].masked_fill(visual | (inputs["attention_mask"] == 0), -100)
    labels = labels.masked_fill((inputs["attention_mask"] == 0).roll(1, 1), -100)  # nothing stands in front of it
    labels[:, 0] = -100
    comparable = labels.masked_fill(visual.roll(1, 1), -100)  # stock predicts those from a token that may be masked
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    smooth = LabelSmoother(0.1)
    with AdaFV(keep=KEEP)(model) as adafv:
        pruned = model(**inputs)
        mine = smooth(pruned, comparable, shift_labels=True)
        assert pruned.logits.isfinite().all()  # gradients are recorded: somebody may train on them
        flat = torch.nn.functional.cross_entropy(pruned.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        inside = model(**inputs, labels=labels).loss
        by_shift = model(**inputs, labels=labels, shift_labels=shifted).loss
    stock = model(**masked_inputs(inputs, adafv.last.keep_mask, row=row, model=model))
    torch.testing.assert_close(mine, smooth(stock, comparable, shift_labels=True), **TOLERANCE)
    torch.testing.assert_close(flat, inside, **TOLERANCE)
    torch.testing.assert_close(by_shift, inside, **TOLERANCE)


def test_the_first_tokens_label_stays_out(any_family: FamilyRow, any_model: Any) -> None:
    """Padding that pruning puts in front of a row predicts nothing."""
    row, model = any_family, any_model
    inputs = make_inputs(row, model, [1])
    ids = torch.cat((torch.tensor([[1, *words(inputs["input_ids"].shape[1] - 1, 7)]]), inputs["input_ids"]))
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), **token_types(row, ids)}
    visual = ids == IMAGE
    labels = ids.masked_fill(visual | visual.roll(1, 1), -100)
    with torch.no_grad():
        with AdaFV(keep=KEEP)(model) as adafv:
            mine = model(**inputs, labels=labels).loss
        oracle = masked_inputs(inputs, adafv.last.keep_mask, row=row, model=model)
        torch.testing.assert_close(mine, model(**oracle, labels=labels).loss, **TOLERANCE)


# ------------------------------------------------------------------------------------------------------ surroundings


def test_another_default_device(any_family: FamilyRow, any_model: Any) -> None:
    """As `torch.set_default_device("cuda")` in a script; tensors on `meta` can do nothing, so none may be made there."""
    model, inputs = any_model, make_inputs(any_family, any_model, [1, 2])
    with torch.no_grad(), AdaFV(keep=KEEP)(model):
        expected = model(**inputs).logits
    try:
        with torch.device("meta"), torch.no_grad():
            model(**inputs)
    except (RuntimeError, NotImplementedError):
        # The stock model cannot; then what we do ourselves must.
        with torch.device("meta"):
            short = compress(model, inputs, KEEP)
        with torch.no_grad():
            torch.testing.assert_close(model(**short).logits[:, -1], expected[:, -1], **TOLERANCE)
        return
    with torch.device("meta"), torch.no_grad(), AdaFV(keep=KEEP)(model):
        found = model(**inputs).logits
    torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)


def test_hooks_on_the_embeddings_see_a_batch(any_family: FamilyRow) -> None:
    """As NEFTune's, which reads the output's shape."""
    model = any_family.build()
    inputs = make_inputs(any_family, model, [1, 2])

    def expects_a_batch(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0 * (output.size(1) * output.size(2))

    model.get_input_embeddings().register_forward_hook(expects_a_batch)
    with torch.no_grad(), AdaFV(keep=KEEP)(model) as adafv:
        model(**inputs)
    assert adafv.last.tokens_after


def test_a_number_is_an_upper_bound(any_family: FamilyRow, any_model: Any) -> None:
    """A picture with fewer tokens beside a larger one keeps all that it has, as in vLLM."""
    row, model = any_family, any_model
    inputs = make_inputs(row, model, [1, 1])
    with torch.no_grad():
        with AdaFV(keep=1)(model) as adafv:
            model(**inputs)
            sizes = adafv.last.tokens_before
        with AdaFV(keep=min(sizes) + 1)(model) as adafv:
            pruned = model(**inputs).logits
        with AdaFV(keep=max(sizes) + 1)(model):
            assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        expected = model(**masked_inputs(inputs, adafv.last.keep_mask, row=row, model=model)).logits
    assert adafv.last.tokens_after == [min(min(sizes) + 1, size) for size in sizes]
    same_logits(pruned, expected, inputs["attention_mask"], adafv.last.keep_mask, **TOLERANCE)


def test_padding_is_the_callers_own(any_family: FamilyRow, any_model: Any) -> None:
    """Also where it is the token that ends an answer, as many tokenizers pad: a penalty sees the tokens of the prompt."""
    row, model = any_family, any_model
    inputs = make_inputs(row, model, [2, 0, 1])
    inputs["input_ids"][inputs["attention_mask"] == 0] = END
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "pad_token_id": END}
    options |= {"repetition_penalty": 1.7, "min_new_tokens": 0}
    with AdaFV(keep=KEEP)(model) as adafv:
        pruned = model.generate(**inputs, **options)
        assert (compress(model, inputs, KEEP)["input_ids"] != PAD).all() or (inputs["input_ids"] == PAD).any()
    oracle = masked_inputs(inputs, adafv.last.keep_mask, row=row, model=model, generates=True)
    expected = model.generate(**oracle, **options)
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    for mine, theirs in zip(pruned.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


def test_a_question_without_a_word_that_counts(any_family: FamilyRow, any_model: Any) -> None:
    """Saliency chooses then, and a warning and the record say so; the words of the other prompt count as ever."""
    row, model = any_family, any_model
    inputs = make_inputs(row, model, [1, 1])
    with torch.no_grad():
        with AdaFV(keep=KEEP)(model) as adafv:
            model(**inputs)
            by_words = adafv.last.kept[1]
        with Pruner("saliency", keep=KEEP)(model) as pruner:
            model(**inputs)
            by_saliency = pruner.last.kept[0]
    prompt = read_prompt(model, family_of(model), inputs)
    inputs["input_ids"][0, prompt.attended[0] & ~prompt.special[0] & ~prompt.is_visual[0]] = BEGIN
    with torch.no_grad():
        with AdaFV(keep=KEEP)(model) as adafv, pytest.warns(UserWarning, match="no word of the prompt counts"):
            pruned = model(**inputs).logits
        expected = model(**masked_inputs(inputs, adafv.last.keep_mask, row=row, model=model)).logits
    assert adafv.last.methods == ["saliency", "adafv"]
    assert torch.equal(adafv.last.kept[0], by_saliency)
    assert torch.equal(adafv.last.kept[1], by_words)
    same_logits(pruned, expected, inputs["attention_mask"], adafv.last.keep_mask, **TOLERANCE)


def test_what_is_missing_is_named(any_family: FamilyRow, any_model: Any) -> None:
    """`image_sizes`, `image_grid_thw` and the like, which a caller forgets who picks out what to pass."""
    model, inputs = any_model, make_inputs(any_family, any_model, [1])
    pixels = family_of(model).images[0]
    for name in family_of(model).images[1:]:
        if name not in inputs:
            continue
        rest = {other: value for other, value in inputs.items() if other != name}
        with torch.no_grad(), AdaFV(keep=KEEP)(model):
            expected = model(**inputs).logits
            try:  # some do without: what it says can be seen
                found = model(**rest).logits
            except PromptError as raised:
                error = str(raised)
            else:
                torch.testing.assert_close(found, expected, **TOLERANCE, equal_nan=True)
                continue
        assert name in error
        assert pixels in error


def test_a_compiled_base_model(any_family: FamilyRow) -> None:
    model = any_family.build()
    model.model = torch.compile(model.model, backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"model\.model\.compile\(\)"):
        AdaFV(keep=KEEP)(model)
