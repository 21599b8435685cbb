"""The contract of a method, against plain loops: each kind of method through each way in which a model takes images.

What is expected comes from the stock model alone. Its own features of every image are chosen from (and mixed) by loops,
put back into the full prompt, and the dropped placeholders are masked (oracle.py).
"""

import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from contract import FIRST_HIDDEN, METHODS, PLAIN, Far, Looking, Merging, OneImage, far, mixed
from models import END, FAMILIES, IMAGE, VIDEO, FamilyRow, make_inputs, present, token_types, words
from oracle import VISUAL_INPUTS, masked_inputs, same_logits
from sharing import shared_model
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adafv import Pruner, compress, encode
from adafv.core import ImageLayout, top_tokens
from adafv.core.tokens import KEYS, SALIENCY, STRINGS, WORDS, Kept, Plan, Signal, VisualTokens, hidden_of, keys_of
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.reading import read_prompt
from adafv.errors import AdaFVError, BudgetError, MethodError, UnsupportedModelError
from adafv.methods import Method
from adafv.methods.base import LAYERS, TOKENS, TOWER
from adafv.prompts.prompt import frames_of, place_images
from adafv.prompts.text import text_columns

ROWS = {row.name: row for row in FAMILIES}
PLACES = present(
    "llava",
    "llava-next",
    "llava-onevision",
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "llava-pixtral",
    "mistral3",
    "idefics3",
)
SHARE = 0.4


@dataclass
class Expected:
    """What plain loops make of a call."""

    kept: list[list[int]]
    members: list[list[list[int]]]
    stock: dict[str, Any]
    """Inputs of the stock model: the full prompt, with the mixed features in place."""
    keep_mask: Tensor

    def forward(
        self, row: FamilyRow, model: Any, positions: str = "compact", generates: bool = False
    ) -> dict[str, Any]:
        """The same with the dropped placeholders masked."""
        where = {"row": row, "model": model} if row.rotary else {}
        return without_visuals(masked_inputs(self.stock, self.keep_mask, positions, generates=generates, **where))


def without_visuals(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in VISUAL_INPUTS}


def stock_features(model: Any, inputs: dict[str, Any], modality: str) -> tuple[Tensor, list[Tensor], bool]:
    """The stock model's own features of all images one after the other, [all, D], its deepstack rows of each layer, and
    whether it has the features in one tensor."""
    own = {
        name: value
        for name, value in inputs.items()
        if name in VISUAL_INPUTS and ("video" in name) == (modality == "video")
    }
    for name in ("image_sizes_videos", "second_per_grid_ts"):
        own.pop(name, None)
    made = getattr(model.model, f"get_{modality}_features")(**own, return_dict=True)
    features = made.pooler_output
    one = isinstance(features, Tensor)
    joined = features.flatten(0, -2) if one else torch.cat([x.flatten(0, -2) for x in features])
    layers = getattr(made, "deepstack_features", None) or []
    return joined, [layer if isinstance(layer, Tensor) else torch.cat(list(layer)) for layer in layers], one


def expectation(
    row: FamilyRow,
    model: Any,
    inputs: dict[str, Any],
    name: str,
    keep: float,
    modality: str = "image",
    per_frame: bool = False,
) -> Expected:
    family, token = family_of(model), IMAGE if modality == "image" else VIDEO
    prompt = read_prompt(model, family, inputs)
    visuals = {part: inputs[part] for part in family.inputs(modality) if part in inputs}
    layouts = family.layouts(model, modality, visuals, prompt.runs(modality))
    placed = place_images(modality, prompt.placeholders[modality], layouts)
    needs = METHODS[name].of_tower
    with torch.no_grad():  # held to the stock tower by test_signals.py
        signals = family.encode(model, modality, visuals, layouts, needs).signals
    if per_frame:
        placed = [frame for video in placed for frame in frames_of(video)]
    joined, layers, one = stock_features(model, inputs, modality)
    assert len(joined) == int((inputs["input_ids"] == token).sum())
    places = (inputs["input_ids"] == token).nonzero()
    pairs = {(int(r), int(c)): number for number, (r, c) in enumerate(places)}
    mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    kept, members = [], []
    written, stacked = joined.clone(), [layer.clone() for layer in layers]
    for image in placed:
        tokens = [pairs[image.row, int(column)] for column in image.columns]
        layout, own = image.layout, joined[tokens]
        budget = max(1, int(keep * layout.tokens + 0.5)) if isinstance(keep, float) else keep
        part = slice(None) if image.part is None else image.part
        seen = OneImage(
            own.detach(), layout, budget, {signal: values[image.number][part] for signal, values in signals.items()}
        )
        if METHODS[name].needs_words:
            ids = inputs["input_ids"][image.row, text_columns(prompt, image, "turn", None)]
            seen.words = model.get_input_embeddings()(ids).detach()
        chosen, mixes = PLAIN[name](seen)
        kept.append(chosen)
        members.append(mixes)
        mask[image.row, image.columns] = False
        mask[image.row, image.columns[chosen]] = True
        at = [tokens[place] for place in chosen]
        written[at] = mixed(own, mixes)
        for layer, target in zip(layers, stacked, strict=True):
            target[at] = mixed(layer[tokens], mixes)
    counts = [count for count in (int(r.sum()) for r in inputs["input_ids"] == token) if count]
    parts: Any = list(written.split(counts))
    if one:  # prompts of different lengths as images of one token, which every release reads
        parts = torch.stack(parts) if len(set(counts)) == 1 else written.unsqueeze(1)
    made = BaseModelOutputWithPooling(pooler_output=parts)
    if layers:
        made.deepstack_features = [list(layer.split(counts)) for layer in stacked]
    return Expected(kept, members, {**inputs, "mm_encoder_outputs": {modality: made}}, mask)


def check(
    row: FamilyRow,
    model: Any,
    inputs: dict[str, Any],
    name: str,
    modality: str = "image",
    keep: float = SHARE,
    tolerance: float = 2e-5,
    **options: Any,
) -> Expected:
    """One call of `forward`, kept tokens, weights and logits."""
    expected = expectation(row, model, inputs, name, keep, modality, options.get("video") == "frame")
    with torch.no_grad():
        logits = model(**expected.forward(row, model, options.get("positions", "compact"))).logits
        with Pruner(METHODS[name], keep=keep, **options)(model) as pruner:
            found = model(**inputs).logits
    assert [tokens.tolist() for tokens in pruner.last.kept] == expected.kept
    for image, mixes in zip(pruner.last.images, expected.members, strict=True):
        assert image.merged == (name == "merging")
        if image.merged:
            weights = torch.zeros(len(mixes), image.tokens_before)
            for place, tokens in enumerate(mixes):
                weights[place, tokens] = 1 / len(tokens)
            torch.testing.assert_close(image.weights, weights)
    attended = inputs["attention_mask"].bool()
    assert torch.equal(pruner.last.keep_mask[attended], expected.keep_mask[attended])
    same_logits(found, logits, inputs["attention_mask"], expected.keep_mask, tolerance, tolerance)
    return expected


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Any:
    row = ROWS[request.param]
    with shared_model(row) as model:
        yield row, model


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_images(place: Any, name: str) -> None:
    """Prompts with different numbers of images of different sizes, whose budgets are shares."""
    row, model = place
    expected = check(row, model, make_inputs(row, model, [2, 1], seed=3), name)
    if name == "merging":
        assert any(len(tokens) > 1 for mixes in expected.members for tokens in mixes)


@pytest.mark.pairs
@pytest.mark.parametrize("video", ["clip", "frame"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "place",
    [name for name in PLACES if ROWS[name].videos is not None and not ROWS[name].one_placeholder],
    indirect=True,
)
def test_videos(place: Any, name: str, video: str) -> None:
    row, model = place
    check(row, model, make_inputs(row, model, [0], videos_per_prompt=[2], seed=4), name, "video", video=video)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", ["llava", "llava-next", "mistral3"], indirect=True)
def test_original_positions(place: Any, name: str) -> None:
    row, model = place
    check(row, model, make_inputs(row, model, [1, 2], seed=6), name, positions="original")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", ["llava", "qwen3-vl"], indirect=True)
def test_a_few_tokens_of_every_image(place: Any, name: str) -> None:
    """A number in place of a share; the prompts padded on the right."""
    row, model = place
    check(row, model, make_inputs(row, model, [1, 3], "right", seed=7), name, keep=5)


# ------------------------------------------------------------------------------------------------ ways of calling

DECODED = {
    "max_new_tokens": 3,
    "min_new_tokens": 3,
    "do_sample": False,
    "suppress_tokens": list(range(110, 120)),
    "return_dict_in_generate": True,
    "output_logits": True,
}
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def same_generation(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **TOLERANCE)
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.each  # what is generated depends on what `forward` read: test_images looks at every pair
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_generate(place: Any, name: str) -> None:
    row, model = place
    inputs = make_inputs(row, model, [1, 1], seed=8)
    expected = expectation(row, model, inputs, name, SHARE)
    with Pruner(METHODS[name], keep=SHARE)(model):
        found = model.generate(**inputs, **DECODED)
    same_generation(found, model.generate(**expected.forward(row, model, generates=True), **DECODED))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", ["llava", "llava-next", "qwen2.5-vl", "qwen3-vl"], indirect=True)
def test_a_second_image_in_a_second_turn(place: Any, name: str) -> None:
    """Behind what is cached of the first, whose merged tokens are in the cache. The words are those of the image's turn."""
    row, model = place
    if not row.continued_with_images:
        pytest.skip("this release of transformers cannot be shown an image behind what is cached")
    first, second = row.sizes[:2]
    [seen, [one]], [new, [two]] = row.images(model, [[first]], 0), row.images(model, [[second]], 1)
    start = torch.tensor([[1, *words(3, 0), *one, *words(2, 1), END]])
    with Pruner(METHODS[name], keep=SHARE)(model) as pruner:
        turn = model.generate(input_ids=start, **token_types(row, start), **seen, **DECODED)
        kept = pruner.last.kept
        whole = torch.cat((turn.sequences, torch.tensor([[END, *words(3, 7), *two, *words(4, 8)]])), 1)
        types = token_types(row, whole)
        found = model.generate(input_ids=whole, **types, **new, past_key_values=turn.past_key_values, **DECODED)
        kept += pruner.last.kept
    wide = max(value.shape[1] for value in (seen["pixel_values"], new["pixel_values"]))
    both = {part: torch.cat((seen[part], new[part])) for part in seen if part != "pixel_values"}
    both["pixel_values"] = torch.cat([widened(part["pixel_values"], wide) for part in (seen, new)])
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole), **types, **both}
    expected = expectation(row, model, inputs, name, SHARE)
    assert [tokens.tolist() for tokens in kept] == expected.kept
    same_generation(found, model.generate(**expected.forward(row, model, generates=True), **DECODED))


def widened(pixels: Tensor, crops: int) -> Tensor:
    """With as many crops as another image has."""
    if pixels.dim() < 5:
        return pixels
    return torch.cat((pixels, pixels.new_zeros(len(pixels), crops - pixels.shape[1], *pixels.shape[2:])), 1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", ["llava", "llava-next", "qwen2.5-vl", "qwen3-vl", "mistral3"], indirect=True)
def test_gradients_go_through_what_stays(place: Any, name: str) -> None:
    """Of merged tokens through every token that is in the mix."""
    row, model = place
    inputs = make_inputs(row, model, [1, 1], seed=2)
    aside = (inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0)
    labels = inputs["input_ids"].masked_fill(aside | aside.roll(1, 1), -100)
    model.zero_grad()
    with Pruner(METHODS[name], keep=SHARE)(model):
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    found = {part: weight.grad.clone() for part, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    expected = expectation(row, model, inputs, name, SHARE)
    wanted = model(**expected.forward(row, model), labels=labels).loss
    wanted.backward()
    torch.testing.assert_close(loss, wanted, **TOLERANCE)
    assert any("vis" in part and gradient.abs().sum() > 0 for part, gradient in found.items())
    theirs = {part: weight.grad for part, weight in model.named_parameters() if weight.grad is not None}
    for part, gradient in found.items():
        torch.testing.assert_close(gradient, theirs[part], atol=1e-4, rtol=1e-3, msg=part)
    model.zero_grad()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llava", "llava-next", "qwen3-vl"])
def test_half_precision(family: str, name: str) -> None:
    """What is mixed is mixed in float32, and rounded once."""
    row = ROWS[family]
    with shared_model(row, torch.bfloat16) as model:
        inputs = make_inputs(row, model, [1], seed=1)
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        expected = expectation(row, model, inputs, name, SHARE)
        short = compress(model, inputs, SHARE, method=METHODS[name])
    assert [tokens.tolist() for tokens in short.record.kept] == expected.kept
    handed = short["mm_encoder_outputs"]["image"].pooler_output[0]
    full = expected.stock["mm_encoder_outputs"]["image"].pooler_output[0]
    assert handed.dtype == torch.bfloat16
    torch.testing.assert_close(handed, full[expected.kept[0]], atol=0, rtol=2**-7)  # of the last bit


# ------------------------------------------------------------------------------------------- breaking the contract


@dataclass(frozen=True)
class Breaking(Method):
    """A method out of parts, each of which may be wrong."""

    name = "breaking"
    summary = "does not keep its contract"
    plans: Callable[[ImageLayout, int], Any] = lambda layout, keep: Plan(keep)
    counts: Callable[[VisualTokens, int], Any] | None = None
    selects: Callable[[VisualTokens, int], Any] = lambda tokens, keep: Far().select(tokens, keep)

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        return self.plans(layout, keep)

    def count(self, tokens: VisualTokens, keep: int) -> Tensor:
        return super().count(tokens, keep) if self.counts is None else self.counts(tokens, keep)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        return self.selects(tokens, keep)


def good(tokens: VisualTokens, keep: int) -> Tensor:
    return top_tokens(far(tokens), keep, tokens.candidates)


def weights(tokens: VisualTokens, keep: int) -> Tensor:
    kept = Merging().select(tokens, keep)
    assert kept.weights is not None
    return kept.weights


SELECTS: dict[str, tuple[Callable[[VisualTokens, int], Any], str]] = {
    "order": (lambda t, k: Kept(good(t, k).flip(-1)), "ascending, distinct and in 0 to 15; sort them"),
    "duplicates": (lambda t, k: Kept(good(t, k)[:, :1].expand(-1, k)), "ascending, distinct"),
    "outside": (lambda t, k: Kept(good(t, k) + 16), "in 0 to 15"),
    "negative": (lambda t, k: Kept(good(t, k) - 16), "in 0 to 15"),
    "fewer": (lambda t, k: Kept(good(t, k - 1)), r"\[1, 3\], not long \[1, 4\]"),
    "more": (lambda t, k: Kept(good(t, k + 1)), r"\[1, 5\], not long \[1, 4\]"),
    "of one image": (lambda t, k: Kept(good(t, k)[0]), r"\[4\], not long \[1, 4\]"),
    "int32": (lambda t, k: Kept(good(t, k).int()), "torch.int32"),
    "list": (lambda t, k: Kept(good(t, k).tolist()), "indices is a list, not a tensor"),
    "nothing": (lambda t, k: None, "returned a NoneType; return Kept"),
    "bare tensor": (lambda t, k: good(t, k), "returned a Tensor; return Kept"),
    "device": (lambda t, k: Kept(good(t, k).to("meta")), "indices is on meta, not on cpu"),
    "NaN": (lambda t, k: Kept(good(t, k), weights(t, k) * float("nan")), "weights are not finite"),
    "infinite": (lambda t, k: Kept(good(t, k), weights(t, k) / 0), "weights are not finite"),
    "integers": (lambda t, k: Kept(good(t, k), weights(t, k).long()), "weights are torch.int64"),
    "turned weights": (lambda t, k: Kept(good(t, k), weights(t, k).mT), r"not floating-point \[1, 4, 16\]"),
    "weights elsewhere": (lambda t, k: Kept(good(t, k), weights(t, k).to("meta")), "weights is on meta"),
    "objective": (lambda t, k: Kept(good(t, k), objective=torch.ones(1, 1)), r"objective is \[1, 1\], not \[1\]"),
    "attention": (lambda t, k: Kept(good(t, k), text_attention=far(t)[:, 1:]), r"text_attention is \[1, 15\]"),
}
PLANS: dict[str, tuple[Callable[[ImageLayout, int], Any], str]] = {
    "above": (lambda layout, keep: Plan(keep + 1), "5 tokens where the budget leaves 4; it may keep fewer"),
    "none": (lambda layout, keep: Plan(0), "0 tokens where the budget leaves 4"),
    "negative": (lambda layout, keep: Plan(-1), "-1 tokens where"),
    "fraction": (lambda layout, keep: Plan(2.0), "2.0 tokens, which is no whole number"),  # type: ignore[arg-type]
    "flag": (lambda layout, keep: Plan(True), "True tokens, which is no whole number"),
    "number": (lambda layout, keep: keep, "returned a int; return a Plan"),
    "no such crop": (lambda layout, keep: Plan(keep, crops=(7,)), r"crops \(7,\) alone, which show none"),
    "no crop": (lambda layout, keep: Plan(keep, crops=()), r"crops \(\) alone, which show none"),
    "crops in a list": (lambda layout, keep: Plan(keep, crops=[0]), r"crops \[0\]; give a tuple"),  # type: ignore[arg-type]
    "grid in a list": (lambda layout, keep: Plan(4, grid=[2, 2]), r"grid \[2, 2\]; give \(rows"),  # type: ignore[arg-type]
    "no grid": (lambda layout, keep: Plan(4, grid=(0, 4)), r"grid \(0, 4\); give \(rows, columns\)"),
    "less than the grid": (lambda layout, keep: Plan(3, grid=(2, 2)), "3 tokens of a grid of 2 x 2, .* plan 4"),
    "grid, and counting": (lambda layout, keep: Plan(None, grid=(2, 2)), "None tokens of a grid of 2 x 2"),
}
COUNTS: dict[str, tuple[Callable[[VisualTokens, int], Any] | None, str]] = {
    "above": (lambda t, k: torch.tensor([k + 1]), r"counts \[5\] tokens where the budget leaves 4"),
    "none": (lambda t, k: torch.tensor([0]), r"counts \[0\] tokens"),
    "fraction": (lambda t, k: torch.tensor([2.0]), "one whole number per image"),
    "of others": (lambda t, k: torch.tensor([2, 2]), "one whole number per image"),
    "list": (lambda t, k: [2], "gave list; give one whole number per image"),
    "missing": (None, "has no `count`; write it, or plan a number"),
}


def is_refused(method: Method, message: str, error: type[AdaFVError] = MethodError, **more: Any) -> None:
    with shared_model(ROWS["llava"]) as model:
        inputs = make_inputs(ROWS["llava"], model, [1])
        with pytest.raises(error, match=message) as raised:
            compress(model, inputs, 4, method=method, **more)
        assert method.name in str(raised.value)
        with torch.no_grad():  # and nothing is left behind
            assert len(compress(model, inputs, 4, method=Far()).record.kept[0]) == 4


@pytest.mark.parametrize("fault", SELECTS)
def test_what_select_must_not_return(fault: str) -> None:
    is_refused(Breaking(selects=SELECTS[fault][0]), SELECTS[fault][1])


@pytest.mark.parametrize("fault", PLANS)
def test_what_plan_must_not_return(fault: str) -> None:
    is_refused(Breaking(plans=PLANS[fault][0]), PLANS[fault][1])


@pytest.mark.parametrize("fault", COUNTS)
def test_what_count_must_not_return(fault: str) -> None:
    is_refused(Breaking(plans=lambda layout, keep: Plan(None), counts=COUNTS[fault][0]), COUNTS[fault][1])


def test_more_than_the_crops_have() -> None:
    row = ROWS["llava-next"]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [1])
        with pytest.raises(
            BudgetError, match=r"method breaking looks at 1 of . crops, which have 16 tokens; give at most"
        ):
            compress(model, inputs, 17, method=Breaking(plans=lambda layout, keep: Plan(keep, crops=(0,))))
        counting = Breaking(lambda layout, keep: Plan(None, crops=(0,)), lambda tokens, keep: torch.tensor([keep]))
        [image] = compress(model, inputs, 17, method=counting).record.images
        assert image.tokens_after == 16
        assert image.crop.tolist() == [0] * 16


# ------------------------------------------------------------------------------------- what is left as it was


def centred(tokens: VisualTokens) -> Tensor:
    """[G, N], the distance from the mean; of float32 written into the very tokens, as it is no copy."""
    features = tokens.features.detach().float()
    features -= features.mean(1, keepdim=True)
    return features.norm(dim=-1)


def centred_by_numpy(tokens: VisualTokens) -> Tensor:
    for image in tokens.features.detach().float().cpu().numpy():
        image -= image.mean(0)
    return tokens.features.norm(dim=-1)


WRITES: dict[str, Callable[[VisualTokens, int], Kept]] = {
    "tokens": lambda tokens, keep: Kept(top_tokens(centred(tokens), keep, tokens.candidates)),
    "tokens, by NumPy": lambda tokens, keep: Kept(top_tokens(centred_by_numpy(tokens), keep, tokens.candidates)),
    "signals": lambda tokens, keep: Kept(top_tokens(tokens.saliency.neg_(), keep, tokens.candidates)),
    "everything": lambda tokens, keep: emptied(tokens, Far().select(tokens, keep)),
}


def emptied(tokens: VisualTokens, kept: Kept) -> Kept:
    for values in (tokens.features, tokens.source, tokens.candidates, *tokens.signals.values(), tokens.text.embeddings):
        values.zero_()
    return kept


def handed(short: Any) -> list[Tensor]:
    made = short["mm_encoder_outputs"]["image"]
    return [*made.pooler_output, *(part for layer in getattr(made, "deepstack_features", None) or [] for part in layer)]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("written", WRITES)
@pytest.mark.parametrize("family", ["llava", "llava-next", "qwen3-vl"])
def test_a_method_that_writes_into_what_it_sees(family: str, written: str, inference: bool) -> None:
    """Neither the language model nor the next question about the same image reads what it wrote."""
    method = replace(needing(SALIENCY, WORDS), selects=WRITES[written])  # type: ignore[type-var]
    row = ROWS[family]
    with shared_model(row) as model, torch.inference_mode(inference):
        inputs = make_inputs(row, model, [1])
        [whole] = [features.flatten(0, -2) for features in handed(compress(model, inputs, 1.0))[:1]]
        images = encode(model, inputs, method=method)
        for keep in (4, 6):
            short = compress(model, {**inputs, "images": images}, keep, method=method, text="turn")
            [kept] = short.record.kept
            assert torch.equal(handed(short)[0].flatten(0, -2), whole[kept])
        del images  # and with it a hook on the model


def test_a_method_that_counts_or_plans_in_what_it_sees() -> None:
    def counts(tokens: VisualTokens, keep: int) -> Tensor:
        return (centred(tokens) > 0).sum(1).clamp(1, keep)

    def plans(layout: ImageLayout, keep: int) -> Plan:
        layout.source.floor_divide_(layout.rows * layout.columns)  # which crop each token shows
        return Plan(None)

    row = ROWS["llava-next"]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [1])
        found = compress(model, inputs, 4, method=Breaking(plans, counts))
        expected = compress(model, inputs, 4, method=Far())
    assert torch.equal(handed(found)[0], handed(expected)[0])
    assert torch.equal(found.record.layouts[0].source, expected.record.layouts[0].source)


def test_a_method_that_returns_the_same_buffers_each_time() -> None:
    """Images of other sizes come after it returned; what it chose of the first is not theirs."""
    indices, weights = torch.zeros(4, 4, dtype=torch.long), torch.zeros(4, 4, 200)

    def selects(tokens: VisualTokens, keep: int) -> Kept:
        kept = Merging().select(tokens, keep)
        assert kept.weights is not None
        count = len(kept.indices)
        mixes = weights[:count, :keep, : kept.weights.shape[-1]]
        return Kept(indices[:count].copy_(kept.indices), mixes.copy_(kept.weights))

    row = ROWS["llava-next"]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [1, 2])
        found = compress(model, inputs, 4, method=Breaking(selects=selects))
        expected = compress(model, inputs, 4, method=Merging())
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    assert torch.equal(found.compaction.columns, expected.compaction.columns)
    for one, two in zip(found.record.images, expected.record.images, strict=True):
        assert torch.equal(one.kept, two.kept)
        assert torch.equal(one.weights, two.weights)
    assert torch.equal(torch.cat(handed(found)), torch.cat(handed(expected)))


def test_tokens_of_other_crops_than_planned() -> None:
    """With crops="thumbnail" they would not be there, and the answer another."""

    def selects(tokens: VisualTokens, keep: int) -> Kept:
        return Kept(top_tokens(tokens.source.float(), keep))

    row = ROWS["llava-next"]
    method = Breaking(plans=lambda layout, keep: Plan(keep, crops=(0,)), selects=selects)
    with shared_model(row) as model, pytest.raises(MethodError, match=r"of the crops \(0,\) alone, and chose others"):
        compress(model, make_inputs(row, model, [1]), 4, method=method)


def needing(*signals: Signal, stage: str = TOKENS) -> Method:
    @dataclass(frozen=True)
    class Needing(Breaking):
        needs: ClassVar[frozenset[Signal]] = frozenset(signals)
        stages: ClassVar[frozenset[str]] = frozenset({stage})

    return Needing()


@pytest.mark.parametrize("stage", [LAYERS, TOWER, "anywhere"])
def test_stages_that_no_engine_has(stage: str) -> None:
    is_refused(needing(stage=stage), f"acts at the stage '{stage}', which transformers does not have here.*use another")


def test_signals_that_are_not_there() -> None:
    is_refused(needing(hidden_of(99)), "hidden of layer 99 cannot be read.*ask for one of", UnsupportedModelError)
    is_refused(needing(keys_of(0)), "keys of layer 0 cannot be read", UnsupportedModelError)
    is_refused(needing(Signal("gradients")), "needs gradients of the prompt.*use another method")
    is_refused(needing(WORDS, STRINGS), "needs strings of the prompt, .*give the processor")


class Letters:
    """A tokenizer that spells tokens."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{number}>" for number in ids]


def test_words_come_with_ids_and_strings() -> None:
    """One image at a time and padded, in two prompts of different lengths."""
    seen: list[Any] = []

    def selects(tokens: VisualTokens, keep: int) -> Kept:
        seen.append(tokens.text)
        return Far().select(tokens, keep)

    method = replace(needing(WORDS, STRINGS), selects=selects)  # type: ignore[type-var]
    row = ROWS["llava"]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [1, 1])
        compress(model, inputs, 4, method=method, text="turn", processor=Letters())
        [text] = seen
        table = model.get_input_embeddings()
        for number, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            expected = [token for token in ids[mask.bool()].tolist() if token not in (IMAGE, 1)]
            count = len(expected)
            assert text.ids[number].tolist() == expected + [-1] * (text.ids.shape[1] - count)
            assert text.mask[number].tolist() == [place < count for place in range(text.ids.shape[1])]
            assert text.strings[number] == [f"<{token}>" for token in expected]
            assert torch.equal(text.embeddings[number, :count], table(torch.tensor(expected)))
        embedded = {**inputs, "inputs_embeds": table(inputs["input_ids"])}
        del embedded["input_ids"]
        with pytest.raises(MethodError, match=r"breaking needs strings .*input_ids rather than embeddings"):
            compress(model, embedded, 4, method=method, text="turn", processor=Letters())


def test_weights_and_another_grid() -> None:
    def selects(tokens: VisualTokens, keep: int) -> Kept:
        return Kept(torch.arange(keep).unsqueeze(0), torch.ones(1, keep, tokens.source.shape[1]))

    is_refused(
        Breaking(plans=lambda layout, keep: Plan(4, grid=(2, 2)), selects=selects),
        "weights mix the tokens of the image, but it plans another grid",
    )


def test_nothing_that_no_method_needs_is_computed() -> None:
    seen: list[VisualTokens] = []

    def selects(tokens: VisualTokens, keep: int) -> Kept:
        seen.append(tokens)
        return Far().select(tokens, keep)

    with shared_model(ROWS["llava"]) as model:
        inputs = make_inputs(ROWS["llava"], model, [1])
        for wanted in ((), (SALIENCY,), (KEYS, FIRST_HIDDEN)):
            compress(model, inputs, 4, method=replace(needing(*wanted), selects=selects))  # type: ignore[type-var]
            assert seen[-1].signals.keys() == set(wanted)
            assert seen[-1].words is None
    assert isinstance(METHODS["looking"], Looking)


def test_the_example_in_the_documentation() -> None:
    """It runs as it stands, and does what is written beside it."""
    text = (Path(__file__).parents[1] / "docs/extending.md").read_text()
    [source] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Folded" in block]
    module = types.ModuleType("documented")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "documented", module)
        exec(compile(source, "docs/extending.md", "exec"), vars(module))
    folding, dropping = module.Folded(), module.Folded(fold=False)
    row = ROWS["llava-next"]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [2])
        merged = compress(model, inputs, 6, method=folding).record.images
        dropped = compress(model, inputs, 6, method=dropping).record.images
    for one, two in zip(merged, dropped, strict=True):
        assert one.kept.tolist() == two.kept.tolist()
        assert not two.merged
        shown = one.layout.shows_patch
        assert int((one.weights > 0).sum()) == int(shown.sum())  # every patch is in one mix, newlines in none
        assert (one.weights[:, ~shown] == 0).all()
        torch.testing.assert_close(one.weights.sum(1), torch.ones(6))
        assert (one.weights[range(6), one.kept] > 0).all()
