"""Every family in every mode, against the oracle (see oracle.py). One table: rows/ x BATCHES x (forward, GENERATE, turns).

What a family cannot do it must refuse; no row is skipped in silence.
"""

from typing import Any

import pytest
import torch
from models import IMAGE, VIDEO, FamilyRow, Refusal, make_inputs, token_types, words
from oracle import STOCK_MIXES_UP_IMAGES, VISUAL_INPUTS, encoded_by_prompt, kept_logits, masked_inputs, same_logits
from transformers import StaticCache

from adafv import AdaFV, Pruner, compress
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.releases import CHUNKED_PREFILL_KEEPS_IMAGES
from adafv.errors import UnsupportedCallError

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
KEEP = 0.3

BATCHES = {
    # images per prompt, padding, videos per prompt
    "one": ([1], "left", None),
    "batch-left": ([1, 1, 1], "left", None),
    "batch-right": ([1, 1], "right", None),
    "several-images": ([2], "left", None),
    "mixed-left": ([2, 0, 1], "left", None),
    "mixed-right": ([1, 0, 2], "right", None),
    "video": ([0], "left", [1]),
    "two-videos": ([0, 0], "left", [1, 1]),
    "video-and-image": ([1, 0], "left", [1, 1]),
    "video-and-image-right": ([0, 1], "right", [1, 0]),
}
FOR_GENERATE = ["one", "batch-left", "several-images", "mixed-left", "video", "video-and-image"]

GENERATE = {
    "greedy": {},
    "sample": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "beam-sample": {"num_beams": 2, "do_sample": True},
    "return-sequences": {"num_return_sequences": 2, "do_sample": True},
    "beams-return": {"num_beams": 3, "num_return_sequences": 2},
    "static-cache": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "encoder-penalties": {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2},
    "guidance": {"guidance_scale": 1.7},
    "decaying-length": {"exponential_decay_length_penalty": (1, 1.5)},
    "chunked-prefill": {"prefill_chunk_size": 7},
}
EXPANDING = {"beams", "beam-sample", "return-sequences", "beams-return"}
DECODED = {
    "max_new_tokens": 3,  # by the prompt, by the first step of decoding, and by one after another
    "return_dict_in_generate": True,
    "output_logits": True,
    "suppress_tokens": [IMAGE, VIDEO],  # random models say anything
}


def inputs_for(row: FamilyRow, model: Any, batch: str) -> dict[str, Any]:
    images, padding, videos = BATCHES[batch]
    inputs = make_inputs(row, model, images, padding, videos_per_prompt=videos)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            inputs[name] = inputs[name].to(model.dtype)
    if row.one_placeholder and {"pixel_values", "pixel_values_videos"} <= inputs.keys():
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
            model(**inputs)  # stock transformers cannot do it
        with AdaFV(keep=KEEP)(model), pytest.raises(UnsupportedCallError, match="images beside videos"):
            model(**inputs)
        pytest.skip("images beside videos: refused, and the stock model fails, as was shown here")
    return inputs


def oracle_for(row: FamilyRow, model: Any, inputs: dict[str, Any], keep_mask: torch.Tensor, **options: Any) -> Any:
    return masked_inputs(inputs, keep_mask, row=row, model=model, **options)


def same_generation(pruned: Any, expected: Any) -> None:
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    for mine, theirs in zip(pruned.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_forward(any_family: FamilyRow, any_model: Any, batch: str, positions: str) -> None:
    model, inputs = any_model, inputs_for(any_family, any_model, batch)
    with torch.no_grad(), AdaFV(keep=KEEP, positions=positions)(model) as adafv:
        pruned = model(**inputs)
    oracle = oracle_for(any_family, model, inputs, adafv.last.keep_mask, positions=positions)
    with torch.no_grad():
        expected = model(**oracle)
        full = model(**inputs)
        short = model(**compress(model, inputs, KEEP, positions=positions)).logits
    given = inputs["attention_mask"]
    same_logits(pruned.logits, expected.logits, given, adafv.last.keep_mask, **TOLERANCE)
    # The oracle can fail: without the mask the answer is another one.
    row = next(i for i, ids in enumerate(inputs["input_ids"]) if ((ids == IMAGE) | (ids == VIDEO)).any())
    last = int(given[row].nonzero().max())
    assert (pruned.logits[row, last] - full.logits[row, last]).abs().max() > 1e-2
    assert short.shape[1] < inputs["input_ids"].shape[1] or 0 in BATCHES[batch][0]
    # What stands behind the last image keeps its distance from the end of the row.
    behind = last - inputs["input_ids"].shape[1]
    torch.testing.assert_close(short[row, behind], expected.logits[row, last], **TOLERANCE)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_forward_without_mask_or_cache(any_family: FamilyRow, any_model: Any, positions: str) -> None:
    """Without both, stock models take a gap in the positions for the border between prompts packed into one row."""
    model, inputs = any_model, inputs_for(any_family, any_model, "one")
    mask = inputs.pop("attention_mask")
    with torch.no_grad(), AdaFV(keep=KEEP, positions=positions)(model) as adafv:
        pruned = model(**inputs, use_cache=False).logits[:, -1]
    inputs["attention_mask"] = mask
    with torch.no_grad():
        oracle = oracle_for(any_family, model, inputs, adafv.last.keep_mask, positions=positions)
        expected = model(**oracle).logits[:, -1]
    torch.testing.assert_close(pruned, expected, **TOLERANCE)


@pytest.mark.parametrize("batch", BATCHES)
def test_forward_in_bfloat16(any_family: FamilyRow, any_model: Any, any_rough_model: Any, batch: str) -> None:
    """Within the error that bfloat16 itself makes: the oracle's distance from itself in float32."""
    exact, model = any_model, any_rough_model
    inputs = inputs_for(any_family, model, batch)
    with torch.no_grad(), AdaFV(keep=KEEP)(model) as adafv:
        pruned = model(**inputs).logits
    oracle = oracle_for(any_family, model, inputs, adafv.last.keep_mask)
    in_float32 = {name: value.float() if "pixel" in name else value for name, value in oracle.items()}
    with torch.no_grad():
        expected, reference = model(**oracle).logits, exact(**in_float32).logits
    mine, theirs, true = (
        torch.cat(kept_logits(logits.float(), oracle["attention_mask"])) for logits in (pruned, expected, reference)
    )
    assert (mine - theirs).square().mean() < 2 * (theirs - true).square().mean()
    assert (theirs - true).square().mean().sqrt() < 0.1 * true.square().mean().sqrt()  # a bound that means something


def seed(number: int) -> None:
    """As `torch.manual_seed`, which also takes down three times from where it was called, for devices that are not here."""
    torch.default_generator.manual_seed(number)


@pytest.mark.parametrize("mode", GENERATE)
@pytest.mark.parametrize("batch", FOR_GENERATE)
def test_generate(any_family: FamilyRow, any_model: Any, batch: str, mode: str) -> None:
    model, inputs = any_model, inputs_for(any_family, any_model, batch)
    options = {**DECODED, **GENERATE[mode]}
    if refusal := refusal_of(any_family, model, inputs, mode):
        is_refused(refusal, model, {**inputs, **options})
        return
    seed(3)
    with AdaFV(keep=KEEP)(model) as adafv:
        pruned = model.generate(**inputs, **options)
    oracle = oracle_for(any_family, model, inputs, adafv.last.keep_mask, generates=True)
    if mode == "chunked-prefill":
        options.pop("prefill_chunk_size")
    if (STOCK_MIXES_UP_IMAGES or any_family.mixes_up_images) and mode in EXPANDING:
        oracle = encoded_by_prompt(model, oracle)
    seed(3)
    same_generation(pruned, model.generate(**oracle, **options))


def refusal_of(row: FamilyRow, model: Any, inputs: dict[str, Any], mode: str) -> Refusal | None:
    """What this release refuses in every family, or the row's own."""
    if mode == "chunked-prefill" and not CHUNKED_PREFILL_KEEPS_IMAGES:
        return Refusal("chunked prefill")
    if STOCK_MIXES_UP_IMAGES and mode in EXPANDING and uneven_tensor(row, model, inputs):
        return Refusal("mixes up prompts")  # test_family_internvl.py shows that the stock model answers wrongly there
    return row.refuses.get(mode)


def is_refused(refusal: Refusal, model: Any, arguments: dict[str, Any]) -> None:
    """The pruned model refuses to generate, and it is true that the stock model cannot."""
    with AdaFV(keep=KEEP)(model), pytest.raises(UnsupportedCallError, match=refusal.message):
        model.generate(**arguments)
    if refusal.stock is not None:
        with pytest.raises(refusal.stock):
            model.generate(**arguments)
    if refusal.stock_answers_otherwise:
        right = model.generate(**{name: value for name, value in arguments.items() if name != "prefill_chunk_size"})
        assert (model.generate(**arguments).logits[0] - right.logits[0]).abs().max() > 1e-2


def uneven_tensor(row: FamilyRow, model: Any, inputs: dict[str, Any]) -> bool:
    """Whether prompts have different numbers of visual tokens where the stock model reads those as one tensor."""
    tokens = {"image": IMAGE, "video": VIDEO}
    counts = [(inputs["input_ids"] == tokens[modality]).sum(1) for modality in family_of(model).as_tensor]
    return any(count[count > 0].unique().numel() > 1 for count in counts)


@pytest.mark.parametrize("how", ["greedy", "beams", "second-turn"])
@pytest.mark.parametrize("batch", ["one", "mixed-left", "video-and-image"])
def test_generate_in_bfloat16(
    any_family: FamilyRow, any_model: Any, any_rough_model: Any, batch: str, how: str
) -> None:
    """What the tokens of an answer are worth, within the error of bfloat16.

    Which of two nearly equal tokens is said may differ in bfloat16. So the answer is given to the masked stock model, in
    bfloat16 and in float32, and the log-probabilities are compared.
    """
    exact, model = any_model, any_rough_model
    inputs = inputs_for(any_family, model, batch)
    if how == "beams" and STOCK_MIXES_UP_IMAGES and uneven_tensor(any_family, model, inputs):
        return  # refused: see test_generate
    options = {**DECODED, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_scores": True}
    prompt = inputs["input_ids"].shape[1]
    with AdaFV(keep=KEEP)(model) as adafv:
        output = model.generate(**inputs, **options, num_beams=3 if how == "beams" else 1)
        kept = adafv.last.keep_mask
        if how == "second-turn":
            conversation = more_text(output.sequences)
            mask = ones_behind(inputs["attention_mask"], conversation.shape[1])
            cache = output.past_key_values
            output = model.generate(input_ids=conversation, attention_mask=mask, past_key_values=cache, **options)
    said = output.sequences
    claimed = output.sequences_scores if how == "beams" else log_probability(torch.stack(output.logits, 1), said)
    mask = ones_behind(inputs["attention_mask"], said.shape[1])
    visuals = {name: value for name, value in inputs.items() if name in VISUAL_INPUTS}
    whole = {"input_ids": said, "attention_mask": mask, **token_types(any_family, said, prompt), **visuals}
    oracle = oracle_for(any_family, model, whole, ones_behind(kept, said.shape[1]))
    in_float32 = {name: value.float() if "pixel" in name else value for name, value in oracle.items()}
    with torch.no_grad():
        rough, true = model(**oracle).logits[:, -4:-1], exact(**in_float32).logits[:, -4:-1]
    rough, true = log_probability(rough, said), log_probability(true, said)
    error = (rough - true).abs().max().clamp_min(0.02)
    assert (claimed.float() - rough).abs().max() < 3 * error
    assert error < 0.5  # a bound that means something


def log_probability(logits: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """Mean log-probability of the last n tokens: [B, n, V], [B, S] -> [B]."""
    last = said[:, -logits.shape[1] :].unsqueeze(-1)
    return logits.float().log_softmax(-1).gather(-1, last).squeeze(-1).mean(-1)


def ones_behind(mask: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)


@pytest.mark.parametrize("batch", FOR_GENERATE)
def test_generate_with_original_positions(any_family: FamilyRow, any_model: Any, batch: str) -> None:
    model, inputs = any_model, inputs_for(any_family, any_model, batch)
    with AdaFV(keep=KEEP, positions="original")(model) as adafv:
        pruned = model.generate(**inputs, **DECODED)
    oracle = oracle_for(any_family, model, inputs, adafv.last.keep_mask, positions="original", generates=True)
    same_generation(pruned, model.generate(**oracle, **DECODED))


@pytest.mark.parametrize("batch", ["mixed-right", "video-and-image-right"])
def test_generate_padded_on_the_right(any_family: FamilyRow, any_model: Any, batch: str) -> None:
    """Stock transformers warns of it, and goes on; the pruned model must do the same thing."""
    model, inputs = any_model, inputs_for(any_family, any_model, batch)
    options = {**DECODED, "do_sample": False}
    with AdaFV(keep=KEEP)(model) as adafv:
        pruned = model.generate(**inputs, **options)
    oracle = oracle_for(any_family, model, inputs, adafv.last.keep_mask, generates=True)
    if not any_family.rotary:
        del oracle["position_ids"]  # generate derives them from the mask, in its own way for trailing padding
    expected = model.generate(**oracle, **options)
    full = inputs["attention_mask"][:, -1].bool()  # what ends in padding is continued from padding
    assert full.any()
    assert pruned.sequences[full].tolist() == expected.sequences[full].tolist()
    torch.testing.assert_close(pruned.logits[0][full], expected.logits[0][full], **TOLERANCE)


@pytest.mark.parametrize("batch", ["one", "mixed-left", "video-and-image"])
def test_keep_all_is_bit_equal_to_stock(any_family: FamilyRow, any_model: Any, batch: str) -> None:
    model, inputs = any_model, inputs_for(any_family, any_model, batch)
    with torch.no_grad():
        stock, stock_forward = model.generate(**inputs, **DECODED), model(**inputs).logits
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with AdaFV(keep=1.0)(model):
            pruned, pruned_forward = model.generate(**inputs, **DECODED), model(**inputs).logits
        with AdaFV(keep=KEEP)(model):
            model.generate(**inputs, **DECODED)
        again = model.generate(**inputs, **DECODED)
    assert torch.equal(torch.stack(pruned.logits), torch.stack(stock.logits))
    assert torch.equal(pruned.sequences, stock.sequences)
    assert torch.equal(pruned_forward, stock_forward)
    assert torch.equal(torch.stack(again.logits), torch.stack(stock.logits))  # and nothing was left behind
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ conversations


def more_text(sequences: torch.Tensor, count: int = 5) -> torch.Tensor:
    return torch.cat((sequences, torch.tensor([words(count, 50 + row) for row in range(len(sequences))])), 1)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("batch", ["one", "mixed-left", "video", "video-and-image"])
@pytest.mark.parametrize("cache", ["kept", "static"])
def test_second_turn(any_family: FamilyRow, any_model: Any, batch: str, positions: str, cache: str) -> None:
    model, inputs = any_model, inputs_for(any_family, any_model, batch)
    given = {}
    if cache == "static":
        given["past_key_values"] = StaticCache(config=model.config.get_text_config(), max_cache_len=400)
        if refusal := any_family.refuses.get("static-cache"):
            is_refused(refusal, model, {**inputs, **DECODED, **given})
            return
    adafv = AdaFV(keep=KEEP, positions=positions)
    with adafv(model) as handle:
        one = model.generate(**inputs, **DECODED, do_sample=False, **given)
        mask = handle.last.keep_mask
        conversation = more_text(one.sequences)
        new = conversation.shape[1] - inputs["input_ids"].shape[1]
        attention = torch.cat((inputs["attention_mask"], torch.ones(len(conversation), new, dtype=torch.long)), 1)
        two = model.generate(
            input_ids=conversation, attention_mask=attention, past_key_values=one.past_key_values, **DECODED
        )
    visuals = {name: value for name, value in inputs.items() if name in VISUAL_INPUTS}
    types = token_types(any_family, conversation, inputs["input_ids"].shape[1])
    whole = {"input_ids": conversation, "attention_mask": attention, **types, **visuals}
    full_mask = torch.cat((mask, torch.ones(len(mask), new, dtype=torch.bool)), 1)
    oracle = oracle_for(any_family, model, whole, full_mask, positions=positions, generates=True)
    same_generation(two, model.generate(**oracle, **DECODED))


@pytest.mark.parametrize("pixels", ["all", "new"])
def test_new_image_in_turn_two(any_family: FamilyRow, any_model: Any, pixels: str) -> None:
    row, model = any_family, any_model
    first, second = row.sizes[:2]
    seen, [seen_tokens] = row.images(model, [[first]], 0)
    new, [new_tokens] = row.images(model, [[second]], 1)
    start = torch.tensor([[1, *words(3, 0), *seen_tokens, *words(2, 1)]])
    types = token_types(row, start)
    with AdaFV(keep=KEEP)(model) as adafv:
        one = model.generate(input_ids=start, **types, **seen, **DECODED)
        first_mask = adafv.last.keep_mask
        tail = torch.tensor([[*words(3, 7), *new_tokens, *words(4, 8)]])
        conversation = torch.cat((one.sequences, tail), 1)
        both = joined(row, seen, new)
        types = token_types(row, conversation)
        turn_two = {"input_ids": conversation, **types, **(both if pixels == "all" else new), **DECODED}
        if not row.continued_with_images:
            with pytest.raises(UnsupportedCallError, match="cached tokens"):
                model.generate(**turn_two, past_key_values=one.past_key_values)
        else:
            two = model.generate(**turn_two, past_key_values=one.past_key_values)
        mask = adafv.last.keep_mask
    if not row.continued_with_images:  # nor can stock transformers
        one = model.generate(input_ids=start, **token_types(row, start), **seen, **DECODED)
        stock = {"input_ids": torch.cat((one.sequences, tail), 1), **types, **DECODED}
        continued = model.generate(**stock, **new, past_key_values=one.past_key_values).logits[0]
        assert (continued - model.generate(**stock, **both).logits[0]).abs().max() > 1e-2
        return
    assert torch.equal(mask[:, : first_mask.shape[1]], first_mask)
    assert adafv.last.tokens_before == [new_tokens.count(IMAGE)]
    whole = {"input_ids": conversation, **types, **both}
    same_generation(two, model.generate(**oracle_for(row, model, whole, mask, generates=True), **DECODED))


def joined(row: FamilyRow, seen: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The inputs of two images together, as the processor returns them for the whole conversation."""
    if row.joined is not None:
        return row.joined(seen, new)
    both = {}
    for name, value in seen.items():
        wide = [max(pair) for pair in zip(value.shape[1:], new[name].shape[1:], strict=True)]
        both[name] = torch.zeros(len(value) + len(new[name]), *wide, dtype=value.dtype)
        for place, part in ((0, value), (len(value), new[name])):
            inside = (slice(place, place + len(part)), *(slice(size) for size in part.shape[1:]))
            both[name][inside] = part
    return both


@pytest.mark.parametrize("batch", ["one", "mixed-left", "video"])
def test_decoding_by_hand_with_forward(any_family: FamilyRow, any_model: Any, batch: str) -> None:
    model, inputs = any_model, inputs_for(any_family, any_model, batch)
    mask = inputs["attention_mask"]
    rows = len(mask)
    with torch.no_grad(), AdaFV(keep=KEEP)(model) as adafv:
        output = model(**inputs, use_cache=True)
        kept = adafv.last.keep_mask
        tokens, logits = [], []
        for _ in range(3):
            logits.append(output.logits[:, -1])
            tokens.append(logits[-1][:, :VIDEO].argmax(-1, keepdim=True))  # no placeholder: random models say anything
            mask = torch.cat((mask, torch.ones(rows, 1, dtype=torch.long)), 1)
            output = model(input_ids=tokens[-1], attention_mask=mask, past_key_values=output.past_key_values)
    conversation = torch.cat((inputs["input_ids"], *tokens), 1)
    visuals = {name: value for name, value in inputs.items() if name in VISUAL_INPUTS}
    types = token_types(any_family, conversation, inputs["input_ids"].shape[1])
    whole = {"input_ids": conversation, "attention_mask": mask, **types, **visuals}
    full = torch.cat((kept, torch.ones(rows, 3, dtype=torch.bool)), 1)
    with torch.no_grad():
        expected = model(**oracle_for(any_family, model, whole, full)).logits[:, -4:-1]
    torch.testing.assert_close(torch.stack(logits, 1), expected, **TOLERANCE)


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("batch", ["one", "mixed-left", "mixed-right", "video"])
def test_labels_and_gradients(any_family: FamilyRow, any_model: Any, batch: str) -> None:
    model, inputs = any_model, inputs_for(any_family, any_model, batch)
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    padding = inputs["attention_mask"] == 0
    # The token right after an image is predicted from the last visual token, which may be dropped: not comparable. Nor is
    # what padding predicts.
    hidden = padding | padding.roll(1, 1) | visual | visual.roll(1, 1)
    labels = inputs["input_ids"].masked_fill(hidden, -100)
    model.zero_grad()
    with AdaFV(keep=KEEP)(model) as adafv:
        pruned = model(**inputs, labels=labels)
        pruned.loss.backward()
    mine = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    expected = model(**oracle_for(any_family, model, inputs, adafv.last.keep_mask), labels=labels)
    expected.loss.backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    torch.testing.assert_close(pruned.loss, expected.loss, **TOLERANCE)
    towers = {name.split(".")[1] for name, _ in model.named_parameters() if "vis" in name or "tower" in name}
    assert any(name.split(".")[1] in towers for name in mine)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-4, rtol=1e-3, msg=name)
    model.zero_grad()


# -------------------------------------------------------------------------------------------- methods and budgets


@pytest.mark.parametrize("method", ["saliency", "text", "random", "uniform"])
def test_other_methods(any_family: FamilyRow, any_model: Any, method: str) -> None:
    model, inputs = any_model, inputs_for(any_family, any_model, "mixed-left")
    generator = torch.get_rng_state()
    with torch.no_grad(), Pruner(method, keep=KEEP)(model) as pruner:
        pruned = model(**inputs).logits
    assert torch.equal(torch.get_rng_state(), generator)  # the global generator belongs to the caller
    with torch.no_grad():
        expected = model(**oracle_for(any_family, model, inputs, pruner.last.keep_mask)).logits
    same_logits(pruned, expected, inputs["attention_mask"], pruner.last.keep_mask, **TOLERANCE)


@pytest.mark.parametrize("batch", ["video", "two-videos", "video-and-image"])
def test_a_budget_for_every_frame(any_family: FamilyRow, any_model: Any, batch: str) -> None:
    model, inputs = any_model, inputs_for(any_family, any_model, batch)
    with AdaFV(keep=2, video="frame")(model) as adafv:
        pruned = model.generate(**inputs, **DECODED)
    last = adafv.last
    for modality, frame, after in zip(last.modalities, last.frames, last.tokens_after, strict=True):
        assert after == 2
        assert (frame is None) == (modality == "image")
    frames = [frame for frame in last.frames if frame is not None]
    assert len(frames) > 1
    oracle = oracle_for(any_family, model, inputs, last.keep_mask, generates=True)
    same_generation(pruned, model.generate(**oracle, **DECODED))


def test_inputs_embeds(any_family: FamilyRow, any_model: Any) -> None:
    model, inputs = any_model, inputs_for(any_family, any_model, "mixed-left")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    if any_family.needs_ids:
        given = {name: value for name, value in inputs.items() if name != "input_ids"}
        with AdaFV(keep=KEEP)(model), pytest.raises(UnsupportedCallError, match="pass input_ids"):
            model(**given, inputs_embeds=embeds)
        return
    with torch.no_grad(), AdaFV(keep=KEEP)(model) as adafv:
        by_ids = model(**inputs).logits
        kept = adafv.last.keep_mask
        without_ids = {name: value for name, value in inputs.items() if name != "input_ids"}
        by_embeds = model(**without_ids, inputs_embeds=embeds).logits
    assert torch.equal(adafv.last.keep_mask, kept)
    torch.testing.assert_close(by_embeds[:, -1], by_ids[:, -1], **TOLERANCE)


def test_record_agrees_with_the_stock_features(any_family: FamilyRow, any_model: Any) -> None:
    """What went to the language model is, bit by bit, the stock feature at the index that `kept` names."""
    model, inputs = any_model, inputs_for(any_family, any_model, "mixed-left")
    short = compress(model, inputs, keep=KEEP)
    sent = short["mm_encoder_outputs"]["image"].pooler_output
    sent = torch.cat([part.reshape(-1, model.config.get_text_config().hidden_size) for part in sent])
    family = family_of(model)
    visuals = {name: value for name, value in inputs.items() if family.named(name) in family.images}
    with torch.no_grad():
        stock = model.model.get_image_features(**visuals, return_dict=True).pooler_output
    stock = torch.cat([part.flatten(0, -2) for part in stock]).split(short.record.tokens_before)
    expected = torch.cat([features[kept] for features, kept in zip(stock, short.record.kept, strict=True)])
    torch.testing.assert_close(sent, expected, atol=1e-6, rtol=1e-6)
    for layout, saliency, row, column in zip(
        short.record.layouts, short.record.saliency, short.record.row, short.record.column, strict=True
    ):
        assert saliency.shape == (layout.tokens,)
        assert (saliency[layout.shows_patch] >= 0).all()
        assert saliency[layout.shows_patch].sum() > 0
        assert row.max() < layout.rows
        assert column.max() < layout.columns


@pytest.mark.parametrize("batch", ["one", "batch-left"])
def test_the_cache_holds_what_the_record_says(any_family: FamilyRow, any_model: Any, batch: str) -> None:
    model, inputs = any_model, inputs_for(any_family, any_model, batch)
    with AdaFV(keep=KEEP)(model) as adafv:
        output = model(**inputs, use_cache=True)
    layers = output.past_key_values.layers
    kept = [part for layer in layers for part in (layer.keys, layer.values) if part is not None]
    held = sum(part.numel() * part.element_size() for part in kept)
    assert held == adafv.last.kv_bytes_after < adafv.last.kv_bytes_before
