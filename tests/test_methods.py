"""One matrix over all methods: what holds for every one of them, then what each claims for itself."""

import inspect
from dataclasses import is_dataclass, replace
from typing import ClassVar

import pytest
import torch
from models import DEEP, FamilyRow, make_inputs

from adafv import AdaFV, Kept, Method, Pruner, VisualTokens, compress
from adafv.core import class_attention, text_to_image_attention, top_tokens
from adafv.core.tokens import HIDDEN, KEYS, SALIENCY, Signal, Words
from adafv.errors import BudgetError, OptionError
from adafv.methods import known_methods, method_named
from adafv.methods.base import LAYERS, TAKEN, TOKENS

METHODS = known_methods()
SELECTING = [name for name, method in METHODS.items() if method.stages == {TOKENS}]
"""Those between tower and language model; test_inside_methods.py is about those inside it."""


class Signals(dict[Signal, torch.Tensor]):
    """Those of the layer that the projector reads, and the same for any other."""

    def __missing__(self, signal: Signal) -> torch.Tensor:
        return self[Signal(signal.kind)]


def tokens(groups: int = 2, rows: int = 6, columns: int = 8, newlines: bool = False, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    source = torch.arange(rows * columns)
    if newlines:
        source = torch.cat([torch.cat((line, torch.tensor([-1]))) for line in source.view(rows, columns)])
    count = len(source)
    saliency = torch.randn(groups, count, generator=generator).exp() * (source >= 0)
    return VisualTokens(
        features=torch.randn(groups, count, 12, generator=generator),
        candidates=(source >= 0).expand(groups, count),
        source=source.expand(groups, count),
        crops=1,
        rows=rows,
        columns=columns,
        signals=Signals(
            {
                SALIENCY: saliency / saliency.sum(-1, keepdim=True),
                HIDDEN: torch.randn(groups, count, 10, generator=generator) * (source >= 0).unsqueeze(-1),
                KEYS: torch.randn(groups, count, 2, 6, generator=generator) * (source >= 0).view(-1, 1, 1),
            }
        ),
        words=Words(
            torch.randn(groups, 5, 12, generator=generator),
            torch.arange(5).expand(groups, 5) < 4,
            torch.arange(5).expand(groups, 5),
            [["\u0120is", "\u0120it", "\u0120a", "\u0120cat"]] * groups,
        ),
    )


def one_of(image: VisualTokens, place: int) -> VisualTokens:
    """One of the images alone."""
    part = slice(place, place + 1)
    return replace(
        image,
        features=image.features[part],
        candidates=image.candidates[part],
        source=image.source[part],
        signals=Signals({signal: values[part] for signal, values in image.signals.items()}),
        words=replace(
            image.text,
            embeddings=image.text.embeddings[part],
            mask=image.text.mask[part],
            ids=image.text.ids[part],
            strings=image.text.strings and image.text.strings[part],
        ),
    )


def test_the_catalogue() -> None:
    assert list(METHODS) == sorted(METHODS)
    assert {"adafv", "downsample", "random", "saliency", "text", "uniform"} <= METHODS.keys()
    assert {"evs", "hired", "prumerge", "prumerge-plus", "thumbnail", "tome", "trim"} <= METHODS.keys()
    assert {"visionzip", "vispruner"} <= METHODS.keys()
    assert {"cdpruner", "cenprune", "divprune", "eadp", "mmtok", "scope"} <= METHODS.keys()
    assert {"fastv", "pyramiddrop", "sparsevlm"} <= METHODS.keys()
    for name, method in METHODS.items():
        assert is_dataclass(method)
        assert method.name == name
        assert method.summary
        assert method.__doc__
    with pytest.raises(OptionError, match="no method"):
        method_named("oracle")


@pytest.mark.parametrize("name", METHODS)
def test_what_chooses_where_no_word_counts(name: str) -> None:
    method = method_named(name)
    other = method.without_text()
    assert not other.needs_words
    if not method.needs_words:
        assert other is method
        return
    if LAYERS in method.stages:
        assert other.stages == method.stages  # it goes on at the same place
        return
    image = replace(tokens(), words=None)
    expected = method_named("saliency").select(image, 7)
    assert other.select(image, 7).indices.equal(expected.indices)


@pytest.mark.parametrize("newlines", [False, True])
@pytest.mark.parametrize("keep", [1, 7, 20, 47])
@pytest.mark.parametrize("name", SELECTING)
def test_exactly_k_distinct_patches_in_order(name: str, keep: int, newlines: bool) -> None:
    image = tokens(newlines=newlines)
    kept = method_named(name).select(image, keep)
    assert kept.indices.shape == (2, keep)
    assert (kept.indices.diff(dim=-1) > 0).all()
    assert image.candidates.gather(1, kept.indices).all()  # there are more patches than K


@pytest.mark.parametrize("name", SELECTING)
def test_newlines_come_last(name: str) -> None:
    image = tokens(newlines=True)
    kept = method_named(name).select(image, 50)  # 48 patches, 6 newlines
    assert all(len(set(row.tolist())) == 50 for row in kept.indices)
    assert image.candidates.gather(1, kept.indices).sum(1).tolist() == [48, 48]


@pytest.mark.parametrize("name", SELECTING)
def test_groups_do_not_mix(name: str) -> None:
    image = tokens(groups=3)
    together = method_named(name).select(image, 9)
    for place in range(3):
        alone = method_named(name).select(one_of(image, place), 9)
        assert torch.equal(alone.indices[0], together.indices[place])


def test_saliency_and_text_are_the_top_of_their_score() -> None:
    image = tokens()
    assert torch.equal(method_named("saliency").select(image, 9).indices, top_tokens(image.saliency, 9))
    attention = text_to_image_attention(image.text.embeddings, image.features, image.text.mask)
    assert torch.equal(method_named("text").select(image, 9).indices, top_tokens(attention, 9))


def test_adafv_is_above_either_score_alone() -> None:
    image = tokens()
    attention = text_to_image_attention(image.text.embeddings, image.features, image.text.mask)

    def objective(indices: torch.Tensor) -> torch.Tensor:
        return (attention.gather(1, indices).sum(1) * image.saliency.gather(1, indices).sum(1)).sqrt()

    best = method_named("adafv").select(image, 9)
    torch.testing.assert_close(best.objective, objective(best.indices))
    for name in ("saliency", "text", "random", "uniform"):
        assert (objective(method_named(name).select(image, 9).indices) <= best.objective + 1e-6).all()


def test_random_depends_on_its_seed_alone() -> None:
    one, two = tokens(seed=1), tokens(seed=2)
    assert torch.equal(method_named("random").select(one, 9).indices, method_named("random").select(two, 9).indices)
    assert not torch.equal(
        method_named("random").select(one, 9).indices, method_named("random", seed=1).select(one, 9).indices
    )


@pytest.mark.parametrize(("keep", "expected"), [(1, [24]), (2, [12, 36]), (48, list(range(48))), (3, [8, 24, 40])])
def test_uniform_is_even(keep: int, expected: list[int]) -> None:
    assert method_named("uniform").select(tokens(), keep).indices.tolist() == [expected] * 2


@pytest.mark.parametrize("family", DEEP, ids=lambda row: row.name)
def test_downsampling_is_the_stock_tower_on_a_smaller_image(family: FamilyRow) -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    model = family.build()
    inputs = make_inputs(family, model, [1, 1])
    with torch.no_grad(), Pruner("downsample", keep=11)(model) as pruner:
        pruned = model(**inputs).logits[:, -1]
    assert pruner.last.tokens_after == [9, 9]  # 3 x 3 is the largest grid of 4 x 4 within 11
    assert pruner.last.kept[0].tolist() == [0, 2, 3, 8, 10, 11, 12, 14, 15]
    pixels = inputs["pixel_values"] if family.name == "llava" else inputs["pixel_values"][:, 0]
    small = torch.nn.functional.interpolate(pixels, size=(42, 42), mode="bicubic", antialias=True)
    with torch.no_grad():
        tower = model.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
        features = model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])
        short = compress(model, inputs, 11, method="downsample")
        short["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=list(features))}
        torch.testing.assert_close(pruned, model(**short).logits[:, -1])


@pytest.mark.parametrize("name", [name for name in METHODS if name != "evs"])  # of videos
@pytest.mark.parametrize("family", DEEP, ids=lambda row: row.name)
def test_gradients_reach_the_projector_through_every_method(family: FamilyRow, name: str) -> None:
    model = family.build()
    inputs = make_inputs(family, model, [1])
    with Pruner(name, keep=9)(model) as pruner:
        model(**inputs).logits.sum().backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
    for scores in (pruner.last.text_attention[0], pruner.last.saliency[0]):
        assert scores is None or not scores.requires_grad


def test_downsampling_shows_one_crop() -> None:
    row = DEEP[1]
    model = row.build()
    inputs = make_inputs(row, model, [1])
    with Pruner("downsample", keep=17)(model), pytest.raises(BudgetError, match="one crop"):
        model(**inputs)
    with torch.no_grad():
        stock = model(**inputs).logits
        with Pruner("downsample", keep=1.0)(model):
            assert torch.equal(model(**inputs).logits, stock)


def test_a_method_of_ones_own_is_one_class() -> None:
    """What the documentation promises a researcher: selection and merging, without touching the library."""

    class Corner(Method):
        name: ClassVar[str] = "corner"
        summary: ClassVar[str] = "the first K tokens, each the mean of all"

        def select(self, tokens: VisualTokens, keep: int) -> Kept:
            images, available = tokens.source.shape
            indices = torch.arange(keep).expand(images, keep)
            return Kept(indices, weights=torch.full((images, keep, available), 1 / available))

    row = DEEP[0]
    model = row.build()
    inputs = make_inputs(row, model, [1])
    short = compress(model, inputs, 3, method=Corner())
    with torch.no_grad():
        mean = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0].mean(0)
    assert short.record.kept[0].tolist() == [0, 1, 2]
    torch.testing.assert_close(short["mm_encoder_outputs"]["image"].pooler_output[0], mean.expand(3, -1))
    with torch.no_grad(), Pruner(Corner(), keep=3)(model):
        torch.testing.assert_close(model(**inputs).logits[:, -1], model(**short).logits[:, -1])


def test_same_tokens_whatever_the_batch() -> None:
    """vLLM will send one image at a time: what is kept must not depend on the company."""
    for row in DEEP:
        model = row.build()
        inputs = make_inputs(row, model, [1, 1])
        with torch.no_grad(), AdaFV(keep=0.3)(model) as adafv:
            model(**inputs)
            together = adafv.last.kept
            for number in range(2):
                alone = {name: value[number : number + 1] for name, value in inputs.items()}
                model(**alone)
                assert torch.equal(adafv.last.kept[0], together[number])


def test_class_attention_matches_a_sum_over_heads() -> None:
    """Tensor parallel engines hold some of the heads each: means of equal parts average to the whole."""
    query, key = torch.randn(8, 10, 4), torch.randn(8, 10, 4)
    halves = (class_attention(query[:4], key[:4], 0.5) + class_attention(query[4:], key[4:], 0.5)) / 2
    torch.testing.assert_close(class_attention(query, key, 0.5), halves)


def test_no_option_has_the_name_of_one_of_pruners_own() -> None:
    assert inspect.signature(Pruner).parameters.keys() - {"parameters"} == TAKEN
