"""Methods that act inside the language model: FastV, PyramidDrop, SparseVLM, and the stage that they share.

The oracle is the stock model, whole, in which each layer has an attention mask of its own that hides what is gone from it
on. It needs nothing of adafv but the record of what was kept.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import pytest
import torch
from models import FAMILIES, make_inputs, text_config
from sharing import shared_model
from torch import Tensor
from transformers import DynamicCache, MistralConfig, Qwen2Config, StaticCache

from adafv import AdaFV, Kept, Method, Pruner, Record, VisualTokens, compress, encode
from adafv.core.cuts import shrinking
from adafv.core.select import cuts_of
from adafv.core.tokens import LAST_ATTENTION, SALIENCY, WORD_ATTENTION, WORDS, Cut, Words
from adafv.engines.serving.settings import ServerSettings
from adafv.engines.transformers.encoded import _refuse_unwrapped
from adafv.engines.transformers.layers import _Hook
from adafv.engines.transformers.releases import CACHE, returned_cache
from adafv.errors import (
    AdaFVError,
    BudgetError,
    CacheError,
    MethodError,
    OptionError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from adafv.methods import known_methods, method_named
from adafv.methods.base import LAYERS, TOKENS
from adafv.methods.fastv import FastV
from adafv.methods.pyramiddrop import PyramidDrop
from adafv.methods.sparsevlm import SparseVLM, raters

ROWS = {row.name: row for row in FAMILIES}
INSIDE = [name for name, method in known_methods().items() if LAYERS in method.stages]
DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "Qwen2VLTextModel", "Qwen2_5_VLTextModel")
DEEP_TEXT = {"num_hidden_layers": 6}
"""Layers enough for several stages."""
CASES = [
    (FastV(layer=1), 5),
    (FastV(layer=3), 1),
    (FastV(layer=5), 9),
    (FastV(layer=1, budget="mean"), 8),
    (PyramidDrop(), 2),
    (PyramidDrop(parts=6), 3),
    (PyramidDrop(parts=3, budget="mean"), 9),
    (SparseVLM(), 4),
    (SparseVLM(layers="1,2,5"), 3),
]
IDS = [f"{method!r}-{keep}" for method, keep in CASES]


def deep_model(family: str = "llava", implementation: str = "sdpa", **options: Any) -> Any:
    model = ROWS[family].build(text=DEEP_TEXT, **options)
    model.set_attn_implementation(implementation)
    return model


def pruner(method: Method | str, keep: Any, **options: Any) -> Pruner:
    return Pruner(method, keep, text="turn", **options)


# ---------------------------------------------------------------------------------------------------------- the oracle


@contextmanager
def hidden_from_layers(
    model: Any, gone: dict[int, Tensor], length: int, attended: Tensor | None = None
) -> Iterator[None]:
    """The stock model, each of whose layers does not see some columns of the prompt.

    Args:
        gone: layer -> columns of the prompt ([n] long) that it must not see.
        length: columns of the prompt.
        attended: [length] bool, columns that are no padding.
    """

    def hide(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            count = hidden.shape[1]
            seen = count if count == length else length + later[0]
            query = torch.arange(seen - count, seen).unsqueeze(1)
            visible = torch.arange(seen) <= query
            visible[:, gone[layer]] = False
            if attended is not None:
                visible[:, :length] &= attended
            visible |= torch.arange(seen) == query  # rows that see nothing are nobody's; but no NaN
            mask = torch.zeros(1, 1, count, seen).masked_fill(~visible, torch.finfo(hidden.dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        later[0] = 0 if hidden.shape[1] == length else later[0] + hidden.shape[1]

    later = [0]
    layers = model.model.language_model.layers
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            if index == 0:
                stack.callback(layer.register_forward_pre_hook(count, with_kwargs=True).remove)
            stack.callback(layer.register_forward_pre_hook(hide(index), with_kwargs=True).remove)
        yield


def gone_of(record: Record, depth: int) -> dict[int, Tensor]:
    """Per layer, the columns that it does not see; and that the record counts them."""
    gone = {}
    for layer in range(depth):
        columns = []
        for image in record.images:
            stay = torch.arange(image.tokens_before)
            for start, kept in sorted((image.layers or {}).items()):
                stay = kept if start <= layer else stay
            there = torch.zeros(image.tokens_before, dtype=torch.bool)
            there[stay] = True
            columns.append(image.columns[~there])
        gone[layer] = torch.cat(columns)
        assert record.layer_lengths is not None
        assert record.layer_lengths[layer] == record.prompt_length_before - len(gone[layer])
    return gone


def check_against_the_oracle(model: Any, inputs: dict[str, Any], method: Method, keep: Any, new: int = 8) -> Record:
    """Logits, answer and cache of a pruned run against the stock model."""
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options["min_new_tokens"] = new
    with torch.no_grad(), pruner(method, keep)(model) as pruned:
        answer = model.generate(**inputs, **options)
        record = pruned.last
        logits = model(**inputs).logits
        assert all(
            one.keys() == two.keys() and all(one[layer].equal(two[layer]) for layer in one)
            for one, two in zip(
                [image.layers or {} for image in record.images],
                [image.layers or {} for image in pruned.last.images],
                strict=True,
            )
        )
    depth = len(model.model.language_model.layers)
    gone = gone_of(record, depth)
    attended = inputs["attention_mask"][0].bool()
    with torch.no_grad(), hidden_from_layers(model, gone, length, attended):
        expected = model(**inputs).logits
        told = model.generate(**inputs, **options)
    assert torch.equal(answer.sequences, told.sequences)
    for one, two in zip(answer.logits, told.logits, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    stays = torch.ones(length, dtype=torch.bool)
    stays[gone[depth - 1]] = False
    assert logits.shape == expected.shape
    assert logits[:, ~stays].isnan().all()
    torch.testing.assert_close(logits[:, stays & attended], expected[:, stays & attended], rtol=1e-5, atol=1e-5)
    held = [layer.keys.shape[-2] for layer in returned_cache(answer).layers]
    assert held == [length - len(gone[layer]) + new - 1 for layer in range(depth)]
    assert held[-1] < held[0]
    return record


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("method", "keep"), CASES, ids=IDS)
def test_the_oracle(method: Method, keep: int, implementation: str) -> None:
    model = deep_model(implementation=implementation)
    inputs = make_inputs(ROWS["llava"], model, [1])
    record = check_against_the_oracle(model, inputs, method, keep)
    [image] = record.images
    cuts = cuts_of(method, 6, 16, keep)
    assert {cut.layer: cut.keep for cut in cuts} == {layer: len(kept) for layer, kept in (image.layers or {}).items()}
    assert image.kept.equal((image.layers or {})[cuts[-1].layer])
    assert record.tokens_after == [cuts[-1].keep]
    assert record.keep_mask.sum() == record.prompt_length_after == record.layer_lengths[-1]  # type: ignore[index]
    assert record.kv_bytes_after / record.kv_bytes_before == pytest.approx(
        sum(record.layer_lengths or []) / (6 * record.prompt_length_before)
    )


@pytest.mark.parametrize("method", [PyramidDrop(parts=6), SparseVLM()], ids=lambda method: method.name)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_around_one_prompt(method: Method, padding: str) -> None:
    model = deep_model(implementation="eager")
    inputs = make_inputs(ROWS["llava"], model, [1])
    more = {name: torch.zeros(1, 5, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    for name, values in more.items():
        parts = (values, inputs[name]) if padding == "left" else (inputs[name], values)
        inputs[name] = torch.cat(parts, dim=1)
    plain = make_inputs(ROWS["llava"], model, [1])
    with torch.no_grad(), pruner(method, 3)(model) as pruned:
        padded = model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)).logits
        kept = pruned.last.kept[0]
        alone = model(**plain).logits
        assert kept.equal(pruned.last.kept[0])
    there = inputs["attention_mask"][0].bool()
    torch.testing.assert_close(padded[:, there], alone, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("family", [row.name for row in FAMILIES])
def test_every_family_is_served_or_refused_by_name(family: str, name: str) -> None:
    row = ROWS[family]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [1])
        decoder = type(getattr(model.model, "language_model", None)).__name__
        if decoder in DECODERS:
            check_against_the_oracle(model, inputs, method_named(name), 0.3, new=2)
            return
        with (
            pruner(name, 0.3)(model),
            pytest.raises(UnsupportedModelError, match=f"LlamaModel, .*not the {decoder} of this"),
        ):
            model(**inputs)


def test_two_images_have_a_budget_each() -> None:
    row = ROWS["llava-next"]
    model = row.build(text=DEEP_TEXT)
    inputs = make_inputs(row, model, [2])
    for method in (PyramidDrop(), SparseVLM(), FastV()):
        record = check_against_the_oracle(model, inputs, method, 7)
        assert record.tokens_after == [7, 7]
        assert all(image.layout.shows_patch[image.kept].all() for image in record.images)  # newlines go first


@dataclass(frozen=True)
class Seeing(FastV):
    """Notes what it is shown: of the tower, too."""

    seen: ClassVar[list[VisualTokens]] = []
    needs = frozenset({LAST_ATTENTION, SALIENCY})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        self.seen.append(tokens)
        return super().select(tokens, keep)


@dataclass(frozen=True)
class SeeingBefore(Seeing):
    """The same in front of the language model."""

    seen: ClassVar[list[VisualTokens]] = []
    needs = frozenset({SALIENCY})
    stages = frozenset({TOKENS})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        self.seen.append(tokens)
        return Kept(torch.arange(keep).expand(len(tokens.source), keep))


def test_what_is_shown_is_what_other_stages_are_shown() -> None:
    """Crops as they are arranged, and nothing where a newline stands: as in the one preparation of all methods."""
    row = ROWS["llava-next"]
    model = row.build(text=DEEP_TEXT)
    inputs = make_inputs(row, model, [1])
    for method in (Seeing(layer=1), SeeingBefore()):
        method.seen.clear()
        with torch.no_grad(), Pruner(method, 7)(model):
            model(**inputs)
    [inside], [before] = Seeing.seen, SeeingBefore.seen
    assert not before.candidates.all()
    assert (inside.signals[SALIENCY][~inside.candidates] == 0).all()
    assert before.tiling is not None
    assert inside.tiling == before.tiling
    for name in ("features", "candidates", "source", "crops", "rows", "columns"):
        one, other = getattr(inside, name), getattr(before, name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert torch.equal(inside.signals[SALIENCY], before.signals[SALIENCY])


def test_videos() -> None:
    row = ROWS["qwen2-vl"]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [0], videos_per_prompt=[1])
        record = check_against_the_oracle(model, inputs, FastV(), 0.25, new=4)
        assert record.modalities == ["video"]


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_other_decoders(kind: str) -> None:
    from models import IMAGE, finish, vision_config
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    plain = text_config(**DEEP_TEXT).to_diff_dict()
    text = MistralConfig(**{**plain, "sliding_window": None}) if kind == "mistral" else Qwen2Config(**plain)
    config = LlavaConfig(vision_config=vision_config(), text_config=text, image_token_id=IMAGE, image_seq_length=16)
    model = finish(LlavaForConditionalGeneration(config), 0, torch.float32)
    inputs = make_inputs(ROWS["llava"], model, [1])
    for method in (PyramidDrop(parts=3), SparseVLM()):
        check_against_the_oracle(model, inputs, method, 3)
    if kind == "mistral":
        text.sliding_window = 8
        with pruner("fastv", 3)(model), pytest.raises(UnsupportedModelError, match="sliding window"):
            model(**inputs)


# ------------------------------------------------------------------------------------------------- what they look at


def stock_attention(model: Any, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """(attention of every layer [H, S, S], what every layer is given [S, D]) of the stock model, whole."""
    given: list[Tensor] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args[0] if args else kwargs["hidden_states"])[0])

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in model.model.language_model.layers]
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    return [layer[0] for layer in attention], given


def best(scores: Sequence[float], keep: int) -> list[int]:
    """Plain: the `keep` largest, in order; of equals the first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(order[:keep])


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "qianfan-ocr"])
def test_the_attention_is_that_of_the_stock_model(family: str) -> None:
    """Rotary positions along the prompt and in three axes, fewer heads of keys, normed queries and keys."""
    row = ROWS[family]
    seen: list[VisualTokens] = []

    @dataclass(frozen=True)
    class Looking(FastV):
        needs: ClassVar[Any] = frozenset({LAST_ATTENTION, SALIENCY})

        def select(self, tokens: VisualTokens, keep: int) -> Kept:
            seen.append(tokens)
            return super().select(tokens, keep)

    model = row.build()
    model.set_attn_implementation("eager")
    inputs = make_inputs(row, model, [1])
    with torch.no_grad(), pruner(Looking(layer=2), 4)(model) as pruned:
        model(**inputs)
        columns = pruned.last.images[0].columns
    attention, given = stock_attention(model, inputs)
    expected = attention[1][:, -1, columns].mean(0)
    torch.testing.assert_close(seen[0].signals[LAST_ATTENTION][0], expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(seen[0].features[0], given[0][columns])
    assert seen[0].signals[SALIENCY].shape == (1, len(columns))


def test_fastv_as_plain_loops() -> None:
    model = deep_model(implementation="eager")
    inputs = make_inputs(ROWS["llava"], model, [1])
    attention, _ = stock_attention(model, inputs)
    for layer in (1, 2, 4):
        with torch.no_grad(), pruner(FastV(layer), 6)(model) as pruned:
            model(**inputs)
        columns = pruned.last.images[0].columns.tolist()
        heads = attention[layer - 1]
        scores = [sum(float(head[-1, column]) for head in heads) / len(heads) for column in columns]
        assert pruned.last.kept[0].tolist() == best(scores, 6)


def test_pyramiddrop_as_plain_loops() -> None:
    """Stage by stage: what stays of one is shown to the stock model, with the rest hidden, to rate for the next."""
    model = deep_model(implementation="eager")
    inputs = make_inputs(ROWS["llava"], model, [1])
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), pruner(PyramidDrop(parts=3), 4)(model) as pruned:
        model(**inputs)
    [image] = pruned.last.images
    columns = image.columns.tolist()
    gone: dict[int, Tensor] = {layer: torch.tensor([], dtype=torch.long) for layer in range(6)}
    there = list(range(16))
    for layer, count in ((2, 8), (4, 4)):
        with hidden_from_layers(model, gone, length):
            attention, _ = stock_attention(model, inputs)
        scores = [sum(float(head[-1, columns[token]]) for head in attention[layer]) for token in there]
        there = [there[place] for place in best(scores, count)]
        assert (image.layers or {})[layer].tolist() == there
        for deeper in range(layer, 6):
            gone[deeper] = torch.tensor([column for place, column in enumerate(columns) if place not in there])


def test_sparsevlm_as_plain_loops() -> None:
    model = deep_model(implementation="eager")
    inputs = make_inputs(ROWS["llava"], model, [1])
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), pruner(SparseVLM(layers="1,4"), 5)(model) as pruned:
        model(**inputs)
    [image] = pruned.last.images
    columns = image.columns.tolist()
    words = list(range(columns[-1] + 1, length))  # all of the turn that stands behind the image
    _, given = stock_attention(model, inputs)
    shares = [0.0] * len(words)
    for column in columns:
        products = [float(given[0][column] @ given[0][word]) for word in words]
        powers = torch.tensor(products).softmax(0).tolist()
        shares = [share + power / len(columns) for share, power in zip(shares, powers, strict=True)]
    rating_words = [word for word, share in zip(words, shares, strict=True) if share > sum(shares) / len(shares)]
    assert 0 < len(rating_words) < len(words)
    gone: dict[int, Tensor] = {layer: torch.tensor([], dtype=torch.long) for layer in range(6)}
    there = list(range(16))
    for layer, count in zip((1, 4), shrinking(6, 16, 5, (1, 4)), strict=True):
        with hidden_from_layers(model, gone, length):
            attention, _ = stock_attention(model, inputs)
        heads = attention[layer - 1]
        scores = [sum(float(head[word, columns[token]]) for head in heads for word in rating_words) for token in there]
        there = [there[place] for place in best(scores, count)]
        assert (image.layers or {})[layer].tolist() == there
        for deeper in range(layer, 6):
            gone[deeper] = torch.tensor([column for place, column in enumerate(columns) if place not in there])


def test_raters_that_are_all_alike() -> None:
    words = torch.ones(1, 3, 4)
    mask = torch.tensor([[True, True, False]])
    assert raters(torch.randn(1, 5, 4), words, mask).tolist() == [[True, True, False]]


def test_padding_of_words_rates_nothing() -> None:
    image = VisualTokens(
        torch.randn(1, 4, 6),
        torch.ones(1, 4, dtype=torch.bool),
        torch.arange(4).unsqueeze(0),
        crops=1,
        rows=2,
        columns=2,
        signals={WORD_ATTENTION: torch.tensor([[[0.1, 9.0], [0.4, 0.0], [0.3, 0.0], [0.2, 0.0]]])},
        words=Words(torch.randn(1, 2, 6), torch.tensor([[True, False]]), torch.tensor([[5, -1]])),
        read=torch.randn(1, 4, 6),
    )
    assert SparseVLM().select(image, 2).indices.tolist() == [[1, 2]]


# ------------------------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize(
    ("method", "depth", "tokens", "keep", "expected"),
    [
        (FastV(), 32, 576, 288, [(2, 288)]),
        (FastV(budget="mean"), 32, 576, 192, [(2, 166)]),  # (32 * 192 - 2 * 576) / 30 = 166.4
        (PyramidDrop(), 32, 576, 72, [(8, 288), (16, 144), (24, 72)]),  # the paper's halves
        (PyramidDrop(), 6, 144, 14, [(2, 66), (3, 30), (5, 14)]),
        (PyramidDrop(), 2, 16, 4, [(1, 4)]),
        (SparseVLM(), 32, 576, 110, None),
        (SparseVLM(), 6, 144, 36, [(1, 72), (3, 36)]),
    ],
    ids=str,
)
def test_where_tokens_go(method: Method, depth: int, tokens: int, keep: int, expected: Any) -> None:
    cuts = cuts_of(method, depth, tokens, keep)
    if expected is None:
        assert [cut.layer for cut in cuts] == [3, 7, 16]
        assert [cut.rated for cut in cuts] == [2, 6, 15]
    else:
        assert [(cut.layer, cut.keep) for cut in cuts] == expected


@pytest.mark.parametrize("depth", [3, 6, 28, 32, 80])
@pytest.mark.parametrize("tokens", [16, 144, 576, 2880])
def test_the_mean_over_layers_is_the_budget(depth: int, tokens: int) -> None:
    met = 0
    for name in INSIDE:
        for share in (0.05, 0.2, 0.4, 0.7, 0.9):
            keep = max(1, round(share * tokens))
            if keep == tokens:
                continue
            method: Any = method_named(name, budget="mean")
            first = method.cuts(depth, tokens, tokens - 1)[0].layer
            if depth * keep < first * tokens + depth - first:  # one token in each of the deeper layers is too much
                with pytest.raises(BudgetError, match=r"as the mean over .*; give at least") as error:
                    cuts_of(method, depth, tokens, keep)
                least = int(str(error.value).split("at least ")[1].split(",")[0])
                if least < tokens:
                    assert cuts_of(method, depth, tokens, least)
                with pytest.raises(BudgetError):
                    cuts_of(method, depth, tokens, least - 1)
                continue
            cuts = cuts_of(method, depth, tokens, keep)
            met += 1
            seen = 0
            for layer in range(depth):
                seen += [tokens, *(cut.keep for cut in cuts if cut.layer <= layer)][-1]
            assert keep - 1 < seen / depth <= keep
    assert met > 3


def test_budgets_that_cannot_be() -> None:
    model = deep_model()
    inputs = make_inputs(ROWS["llava"], model, [1])
    with (
        pruner("fastv", 4, budget="mean")(model),
        pytest.raises(BudgetError, match=r"give at least 6, or .*budget=last"),
    ):
        model(**inputs)
    for name in INSIDE:
        with pytest.raises(OptionError, match="budget='middle'; known are: last, mean"):
            method_named(name, budget="middle")
    with pytest.raises(OptionError, match="layer=0; give 1 or more"):
        FastV(0)
    with pytest.raises(OptionError, match="parts=1; give 2 or more"):
        PyramidDrop(1)
    for layers in ("", "3,2", "0,1", "a", "1,1", "1;2"):
        with pytest.raises(OptionError, match="ascending numbers from 1 on"):
            SparseVLM(layers)
    for method in (FastV(6), SparseVLM("2,6")):
        with (
            pruner(method, 4)(model),
            pytest.raises(MethodError, match=r"from layer 6 on, but .* has 6 layers, 0 to 5"),
        ):
            model(**inputs)


@pytest.mark.parametrize(
    ("cuts", "said"),
    [
        ([], "gave none"),
        ([(1, 4, 1)], "gave a tuple"),
        ([Cut(1, True, 1)], "must be of type int"),
        ([Cut(0, 4, 0)], "gave layer 0 after 0; layers ascend, from 1 to 5"),
        ([Cut(6, 4, 6)], "gave layer 6"),
        ([Cut(2, 5, 2), Cut(2, 4, 2)], "gave layer 2 after 2"),
        ([Cut(3, 4, 1)], "asked at layer 3 for the attention of layer 1"),
        ([Cut(1, 4, 1), Cut(2, 5, 2)], "keeps 5 of 4 tokens"),
        ([Cut(1, 0, 1)], "keeps 0 of 16"),
        ([Cut(1, 9, 1)], "leave 9 tokens where the budget leaves 4"),
    ],
    ids=str,
)
def test_cuts_that_break_the_contract(cuts: Any, said: str) -> None:
    model = deep_model()
    inputs = make_inputs(ROWS["llava"], model, [1])
    with pruner(inside(cuts), 4)(model), pytest.raises(MethodError, match=said):
        model(**inputs)


def inside(cuts: Any, stages: Any = frozenset({LAYERS}), **names: Any) -> Method:
    @dataclass(frozen=True)
    class Own(FastV):
        def cuts(self, depth: int, tokens: int, keep: int) -> Any:
            return cuts

    for name, value in {"stages": stages, **names}.items():
        setattr(Own, name, value)
    return Own()


def test_cuts_at_one_layer_after_the_other() -> None:
    """Rated by the layer itself and by the one in front, in turn; what takes nothing is no cut."""
    model = deep_model()
    inputs = make_inputs(ROWS["llava"], model, [1])
    cuts = [Cut(1, 16, 0), Cut(2, 11, 2), Cut(3, 9, 2), Cut(4, 6, 3), Cut(5, 2, 5)]
    record = check_against_the_oracle(model, inputs, inside(cuts), 2)
    assert list(record.images[0].layers or {}) == [2, 3, 4, 5]


def test_what_a_method_returns_is_checked() -> None:
    model = deep_model()
    inputs = make_inputs(ROWS["llava"], model, [1])
    cuts = [Cut(2, 4, 2)]
    for kept, said in (
        (Kept(torch.tensor([[3, 2, 1, 0]])), "ascending, distinct"),
        (Kept(torch.tensor([[0, 1]])), r"not long \[1, 4\]"),
        (Kept(torch.tensor([[0, 1, 2, 3]]), torch.eye(4, 16).unsqueeze(0)), "merges tokens inside"),
    ):
        method = inside(cuts, select=lambda self, tokens, keep, kept=kept: kept)
        with pruner(method, 4)(model), pytest.raises(MethodError, match=said):
            model(**inputs)
    with (
        pruner(inside(cuts, stages=frozenset({LAYERS, TOKENS})), 4)(model),
        pytest.raises(MethodError, match="two of it"),
    ):
        model(**inputs)
    bare = type("Bare", (Method,), {"name": "bare", "summary": "", "stages": {LAYERS}, "select": FastV.select})()
    with pruner(bare, 4)(model), pytest.raises(MethodError, match="has no `cuts`"):
        model(**inputs)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture(scope="module")
def model() -> Any:
    return deep_model()


def refused(model: Any, said: str, error: type[AdaFVError] = UnsupportedCallError, **options: Any) -> None:
    """A call of `generate`; afterwards the model is the stock one."""
    inputs = {**make_inputs(ROWS["llava"], model, [1]), **options}
    for name in INSIDE:
        with pruner(name, 4)(model), pytest.raises(error, match=said):
            model.generate(**inputs, max_new_tokens=2)
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 2}, "leave num_beams out"),
        ({"num_return_sequences": 2, "do_sample": True}, "leave num_return_sequences out"),
        ({"prompt_lookup_num_tokens": 3}, "leave prompt_lookup_num_tokens out"),
        ({"use_cache": False}, "leave use_cache=False out"),
        ({"cache_implementation": "static"}, "leave cache_implementation out"),
        ({"prefill_chunk_size": 4}, "leave prefill_chunk_size out"),
        ({"guidance_scale": 2.0}, "leave guidance_scale out"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "leave output_attentions out"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "leave output_hidden_states out"),
        ({"custom_generate": lambda *args, **kwargs: None}, "leave custom_generate out"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_ways_of_generating(model: Any, options: dict[str, Any], said: str) -> None:
    refused(model, said, **options)


def test_assistants(model: Any) -> None:
    refused(model, "leave assistant_model out", assistant_model=ROWS["llava"].build())


def test_static_caches(model: Any) -> None:
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=60)
    refused(model, "which a StaticCache cannot; use a DynamicCache", **{CACHE: static})


def test_batches(model: Any) -> None:
    inputs = make_inputs(ROWS["llava"], model, [1, 1])
    for name in INSIDE:
        with pruner(name, 4)(model), pytest.raises(MethodError, match="one prompt at a time, and the batch has 2"):
            model.generate(**inputs, max_new_tokens=2)
        with pruner(name, 4)(model), pytest.raises(MethodError, match="give the prompts one by one"):
            model(**inputs)


def test_calls_of_forward(model: Any) -> None:
    inputs = make_inputs(ROWS["llava"], model, [1])
    ids = inputs["input_ids"]
    with pruner("fastv", 4)(model):
        with pytest.raises(UnsupportedCallError, match="leave labels out"):
            model(**inputs, labels=ids)
        with pytest.raises(UnsupportedCallError, match="leave output_hidden_states out"):
            model(**inputs, output_hidden_states=True)
        unmasked = {name: value for name, value in inputs.items() if name != "attention_mask"}
        packed = torch.cat((torch.arange(20), torch.arange(ids.shape[1] - 20))).unsqueeze(0)
        with pytest.raises(UnsupportedCallError, match="several prompts in one row"):
            model(**unmasked, position_ids=packed, use_cache=False)
        model.train()
        try:
            with pytest.raises(UnsupportedCallError, match="nothing is trained"):
                model(**inputs)
        finally:
            model.eval()


def test_other_implementations_of_attention() -> None:
    model = deep_model()
    inputs = make_inputs(ROWS["llava"], model, [1])
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pruner("fastv", 4)(model), pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa'"):
        model(**inputs)


@pytest.mark.parametrize("name", INSIDE)
def test_where_there_is_no_such_stage(model: Any, name: str) -> None:
    inputs = make_inputs(ROWS["llava"], model, [1])
    with pytest.raises(MethodError, match=f"{name} acts at the stage 'layers', which transformers does not have here"):
        compress(model, inputs, 4, method=name, text="turn")
    with pytest.raises(MethodError, match=f"{name} acts at the stage 'layers', which vLLM does not have here"):
        ServerSettings.of({"keep": 4, "method": name})


def test_layers_that_are_not_run(model: Any) -> None:
    """As where they are compiled, and hooks are not looked at: an answer as if nothing was dropped is no answer."""
    inputs = make_inputs(ROWS["llava"], model, [1])
    layers = model.model.language_model.layers
    for layer in layers:
        layer._compiled_call_impl = layer.forward
    try:
        with torch.no_grad(), pruner("fastv", 4)(model), pytest.raises(UnsupportedModelError, match="may be compiled"):
            model(**inputs)
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def test_attention_of_layers_is_for_methods_that_act_there(model: Any) -> None:
    inputs = make_inputs(ROWS["llava"], model, [1])
    method = inside([], stages=frozenset({TOKENS}))
    with pytest.raises(MethodError, match="fastv needs last attention"):
        compress(model, inputs, 4, method=method)


def test_a_token_cannot_be_repeated(model: Any) -> None:
    """Places would be left over, and filled with tokens that were to go."""

    class Repeating(FastV):
        may_repeat = True

    with torch.no_grad(), pruner(Repeating(), 4)(model), pytest.raises(MethodError, match="cannot be repeated"):
        model(**make_inputs(ROWS["llava"], model, [1]))


def test_what_a_method_writes_into_what_it_sees(model: Any) -> None:
    class Writing(FastV):
        def select(self, tokens: VisualTokens, keep: int) -> Kept:
            kept = super().select(tokens, keep)
            assert tokens.read is not None
            for values in (tokens.read, tokens.features, *tokens.signals.values()):
                values.zero_()
            return kept

    inputs = make_inputs(ROWS["llava"], model, [1])
    images = encode(model, inputs, method=Writing())
    before = images.images["image"][0].features.clone()
    with torch.no_grad():
        with pruner(FastV(), 4)(model):
            expected = model(**inputs, images=images).logits
        with pruner(Writing(), 4)(model):
            found = model(**inputs, images=images).logits
    assert torch.equal(images.images["image"][0].features, before)
    torch.testing.assert_close(found, expected, equal_nan=True)


# ------------------------------------------------------------------------------------- words, encoded images, the model


def test_no_word_behind_the_image(model: Any) -> None:
    """Words in front of it do not look at it: the last token rates in their place, and a warning says so."""
    inputs = make_inputs(ROWS["llava"], model, [1])
    end = int((inputs["input_ids"][0] == 119).nonzero()[-1]) + 1
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, :end]
    method = SparseVLM(layers="1,4")
    with torch.no_grad(), pruner(method, 4)(model) as pruned:
        with pytest.warns(UserWarning, match="pyramiddrop alone .*no word that counts stands behind"):
            model(**inputs)
        assert pruned.last.methods == ["pyramiddrop"]
        assert list(pruned.last.images[0].layers or {}) == [1, 4]
    assert not method.without_text().needs_words


def test_words_and_images_for_which_no_word_counts() -> None:
    """A method that leaves such an image to one in front of the language model cannot be mixed with it."""

    @dataclass(frozen=True)
    class Wordy(SparseVLM):
        def without_text(self) -> Method:
            return method_named("saliency")

    model = deep_model()
    inputs = make_inputs(ROWS["llava"], model, [2])
    places = (inputs["input_ids"][0] == 119).nonzero().flatten()
    stay = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    stay[int(places[-1]) + 1 :] = False
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, stay]
    with (
        pruner(Wordy(), 4)(model),
        pytest.warns(UserWarning, match="saliency alone"),
        pytest.raises(MethodError, match="ask about every image"),
    ):
        model(**inputs)


@pytest.mark.parametrize("name", INSIDE)
def test_images_that_are_encoded_already(model: Any, name: str) -> None:
    inputs = make_inputs(ROWS["llava"], model, [1])
    encoded = encode(model, inputs, method=name)
    assert encoded.serves(method_named(name))
    with torch.no_grad(), pruner(name, 4)(model):
        one = model(**inputs).logits
        two = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], images=encoded).logits
    assert torch.equal(one.nan_to_num(), two.nan_to_num())


@pytest.mark.parametrize("name", INSIDE)
def test_the_model_is_the_stock_one_afterwards(name: str) -> None:
    model = deep_model()
    inputs = make_inputs(ROWS["llava"], model, [1])
    with torch.no_grad():
        before = model(**inputs).logits
        plain = copy.deepcopy(model)
        with pruner(name, 4)(model):
            pruned = model(**inputs).logits
            assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)
            words = inputs["input_ids"][:, :4]
            assert torch.equal(model(input_ids=words).logits, plain(input_ids=words).logits)
        assert torch.equal(model(**inputs).logits, before)
        assert not torch.equal(pruned[:, -1], before[:, -1])
        with pruner(name, "all")(model):
            assert torch.equal(model(**inputs).logits, before)
    assert model.__dict__.keys() == plain.__dict__.keys()
    for one, two in zip(model.modules(), plain.modules(), strict=True):
        assert one.__dict__.keys() == two.__dict__.keys()


def test_after_an_exception_too() -> None:
    model = deep_model()
    inputs = make_inputs(ROWS["llava"], model, [1])

    def fail(*args: Any) -> None:
        raise RuntimeError("in the midst")

    with torch.no_grad():
        before = model(**inputs).logits
        hook = model.model.language_model.layers[4].mlp.register_forward_pre_hook(fail)
        with pruner("pyramiddrop", 4)(model), pytest.raises(RuntimeError, match="in the midst"):
            model.generate(**inputs, max_new_tokens=3)
        hook.remove()
        assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)
        assert torch.equal(model(**inputs).logits, before)


def test_two_threads() -> None:
    """Hooks are on the model, which others may run: each call sees its own prompt."""
    row = ROWS["llava"]
    model = row.build(text=DEEP_TEXT)
    prompts = [make_inputs(row, model, [1], seed=seed) for seed in range(4)]
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    found: dict[int, list[Tensor]] = {}
    with torch.no_grad(), pruner("pyramiddrop", 4)(model):
        expected = [model.generate(**inputs, **options) for inputs in prompts]

        def answer(number: int) -> None:
            with torch.no_grad():
                found[number] = [model.generate(**prompts[number], **options) for _ in range(5)]

        threads = [threading.Thread(target=answer, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, answers in found.items():
        assert all(torch.equal(each, expected[number]) for each in answers)
    assert len(found) == 4
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)


@pytest.mark.parametrize("hook", [_Hook(cast(Any, None), 0), _refuse_unwrapped], ids=["layer", "encoded"])
def test_a_hook_that_another_thread_is_adding(hook: Any) -> None:
    """PyTorch notes that a hook wants named arguments after it has noted the hook, and forgets that last."""
    layer = torch.nn.Linear(2, 2)
    layer.register_forward_pre_hook(hook, with_kwargs=True)
    layer._forward_pre_hooks_with_kwargs.clear()
    assert layer(torch.ones(2)).shape == (2,)


def test_calls_in_the_midst_of_one() -> None:
    """Whoever looks on may run the model on something else, or copy it."""
    row = ROWS["llava"]
    model = deep_model(implementation="eager")  # which always has a mask
    inputs, other = (make_inputs(row, model, [1], seed=seed) for seed in (0, 1))
    long = torch.arange(3, 63).unsqueeze(0)
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    seen: list[Tensor] = []
    copies: list[Any] = []

    def look(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(model(input_ids=long).logits)
        seen.append(model.generate(**other, **options))
        copies.append(copy.deepcopy(model))
        return scores

    with torch.no_grad():
        text = model(input_ids=long).logits
        stock = model(**inputs).logits
        with pruner("fastv", 4)(model):
            expected = model.generate(**inputs, **options)
            others = model.generate(**other, **options)
            found = model.generate(**inputs, **options, logits_processor=[look])
        assert torch.equal(found, expected)
        assert all(torch.equal(each, text) for each in seen[::2])
        assert all(torch.equal(each, others) for each in seen[1::2])
        assert all(torch.equal(each(**inputs).logits, stock) for each in copies)
    assert len(copies) == 4


def test_parts_on_disk(tmp_path: Any) -> None:
    """Weights that accelerate loads when a part is called."""
    accelerate = pytest.importorskip("accelerate")
    row = ROWS["llava"]
    model = row.build(text=DEEP_TEXT)
    inputs = make_inputs(row, model, [1])
    with torch.no_grad():
        with pruner("pyramiddrop", 4)(model):
            expected = model(**inputs).logits
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"), offload_buffers=False)
        assert model.model.language_model.layers[2].self_attn.q_proj.weight.is_meta
        with pruner("pyramiddrop", 4)(model):
            found = model(**inputs).logits
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_tensor_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep_model()
    monkeypatch.setattr(model, "_tp_size", 2, raising=False)
    with pruner("fastv", 4)(model), pytest.raises(UnsupportedModelError, match="need all heads in one process"):
        model(**make_inputs(ROWS["llava"], model, [1]))


def test_gradients_flow_in_evaluation() -> None:
    model = deep_model()
    inputs = make_inputs(ROWS["llava"], model, [1])
    with pruner("sparsevlm", 4)(model) as pruned:
        output = model(**inputs).logits
    assert not output.isnan().any()  # a dropped column has the logits of the kept one in front of it
    output[:, -1].sum().backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
    assert not pruned.last.kept[0].requires_grad


def test_logits_that_are_asked_for(model: Any) -> None:
    inputs = make_inputs(ROWS["llava"], model, [1])
    with torch.no_grad(), pruner("fastv", 4)(model):
        whole = model(**inputs).logits
        for asked in (1, 3, 20, 26, 99):
            some = model(**inputs, logits_to_keep=asked).logits
            torch.testing.assert_close(some, whole[:, -asked:], equal_nan=True)
        some = model(**inputs, logits_to_keep=torch.tensor([0, 8, 25])).logits
        torch.testing.assert_close(some, whole[:, [0, 8, 25]], equal_nan=True)
        as_tuple = model(**inputs, return_dict=False)
        torch.testing.assert_close(as_tuple[0], whole, equal_nan=True)
    with torch.no_grad(), pruner("fastv", 4, logits="kept")(model):
        kept = model(**inputs).logits
    assert torch.equal(kept[0], whole[0][~whole[0].isnan().any(-1)])


# --------------------------------------------------------------------------------------------------- the cache, later


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_token_by_token_and_in_pieces(family: str, implementation: str) -> None:
    """The next turn on such a cache, by `forward` and by `generate`: as the oracle reads it in one go."""
    row = ROWS[family]
    model = row.build()
    model.set_attn_implementation(implementation)
    inputs = make_inputs(row, model, [1])
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 3, "do_sample": False, "min_new_tokens": 3}
    more = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad(), pruner(PyramidDrop(parts=3), 4)(model) as pruned:
        cache = DynamicCache(config=model.config.get_text_config())
        answer = model.generate(**inputs, **options, **{CACHE: cache})
        gone = gone_of(pruned.last, 3)
        copied = copy.deepcopy(cache)
        turn = torch.cat((answer, more), dim=1)
        again = {
            **inputs,
            "input_ids": turn,
            "attention_mask": torch.ones_like(turn),
            **{name: torch.nn.functional.pad(inputs[name], (0, 7)) for name in row.token_types},
        }
        second = model.generate(**again, **options, **{CACHE: cache})
        assert [layer.keys.shape[-2] for layer in cache.layers] == [
            length - len(gone[layer]) + 3 + 4 + 2 for layer in range(3)
        ]
        with pytest.raises(UnsupportedCallError, match="leave num_beams out"):
            model.generate(**again, **options, num_beams=2, **{CACHE: copied})
        with pytest.raises(UnsupportedCallError, match=r"compress\(\) cannot reach"):
            compress(model, {**again, CACHE: copied}, 4, text="turn")
    with torch.no_grad(), hidden_from_layers(model, gone, length):
        stock = DynamicCache(config=model.config.get_text_config())
        first = model.generate(**inputs, **options, **{CACHE: stock})
        seen = {name: value for name, value in again.items() if not name.startswith(("pixel", "image"))}
        told = model.generate(**seen, **options, **{CACHE: stock})
    assert torch.equal(first, answer)
    assert torch.equal(second, told)


def test_caches_that_were_changed(model: Any) -> None:
    inputs = make_inputs(ROWS["llava"], model, [1])
    with torch.no_grad(), pruner("fastv", 4)(model):
        for change in (
            lambda cache: cache.layers[-1].crop(-1),
            lambda cache: [layer.crop(-5) for layer in cache.layers],
            lambda cache: cache.batch_repeat_interleave(2),
        ):
            cache = DynamicCache()
            model(**inputs, **{CACHE: cache})
            change(cache)
            rows = cache.layers[0].keys.shape[0]
            with pytest.raises(CacheError, match="went inside the language model"):
                model(input_ids=torch.full((rows, 1), 7), **{CACHE: cache})


def test_new_images_behind_such_a_cache(model: Any) -> None:
    inputs = make_inputs(ROWS["llava"], model, [1])
    other = make_inputs(ROWS["llava"], model, [1], seed=3)
    for following in (pruner("fastv", 4), AdaFV(4, text="turn"), pruner("random", "all")):
        cache = DynamicCache()
        with torch.no_grad(), pruner("fastv", 4)(model):
            model(**inputs, **{CACHE: cache})
        del other["attention_mask"]
        with torch.no_grad(), following(model), pytest.raises(UnsupportedCallError, match="start without a cache"):
            model(**other, **{CACHE: cache})
        other["attention_mask"] = torch.ones_like(other["input_ids"])


def test_an_emptied_cache_is_a_new_one(model: Any) -> None:
    inputs = make_inputs(ROWS["llava"], model, [1])
    cache = DynamicCache()
    with torch.no_grad(), pruner("fastv", 4)(model) as pruned:
        one = model(**inputs, **{CACHE: cache}).logits
        cache.reset()
        cache = DynamicCache()
        assert torch.equal(model(**inputs, **{CACHE: cache}).logits.nan_to_num(), one.nan_to_num())
        assert pruned.last.tokens_after == [4]


def test_needs() -> None:
    """FastV and PyramidDrop look at no word, so nothing is looked up for them."""
    assert not FastV().needs_words
    assert not PyramidDrop().needs_words
    assert SparseVLM().needs_words
    assert WORDS in SparseVLM.needs
