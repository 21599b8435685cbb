"""Methods that merge tokens or drop duplicates, against plain loops over one image at a time, written from the formulas; and
mixes in front of the projector, against the stock model's own tower and projector."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from contract import Merging, OneImage, plain_merging
from models import FAMILIES, IMAGE, make_inputs
from sharing import shared_model
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

import adafv
from adafv import Pruner, compress
from adafv.core import ImageLayout
from adafv.core.merging import evenly, in_turn, outliers
from adafv.core.select import Wanted, check_kept, plan_of, select_tokens
from adafv.core.tokens import HIDDEN, KEYS, SALIENCY, Kept, VisualTokens, Words
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.releases import cannot_be_repeated
from adafv.errors import BudgetError, MethodError, OptionError, StaleImagesError, UnsupportedModelError
from adafv.methods import Method
from adafv.methods.evs import EVS
from adafv.methods.hired import EARLY, HiRED, apportioned
from adafv.methods.prumerge import PruMerge, PruMergePlus
from adafv.methods.thumbnail import Thumbnail
from adafv.methods.tome import ToMe
from adafv.methods.trim import Trim
from adafv.methods.visionzip import VisionZip
from adafv.methods.vispruner import VisPruner

ROWS = {row.name: row for row in FAMILIES}

# -------------------------------------------------------------------------------------------------- images by hand


def images(
    sources: list[list[int]],
    crops: int,
    rows: int,
    columns: int,
    tiling: tuple[int, int] | None = None,
    seed: int = 0,
    ties: bool = False,
    dtype: torch.dtype = torch.float32,
) -> VisualTokens:
    """Random images; with `ties` of few different values, whose cosines are exact."""
    generator = torch.Generator().manual_seed(seed)
    groups, count = len(sources), len(sources[0])

    def values(*size: int) -> Tensor:
        if not ties:
            return torch.randn(*size, generator=generator).to(dtype)
        return torch.nn.functional.one_hot(torch.randint(3, size[:-1], generator=generator), size[-1]).to(dtype)

    def attention() -> Tensor:
        if ties:
            return torch.randint(1, 5, (groups, count), generator=generator) / 64
        drawn = torch.randn(groups, count, generator=generator).mul(1.5).exp()
        return drawn / drawn.sum(-1, keepdim=True)

    source = torch.tensor(sources)
    shown = source >= 0
    return VisualTokens(
        features=values(groups, count, 6),
        candidates=shown,
        source=source,
        crops=crops,
        rows=rows,
        columns=columns,
        signals={
            SALIENCY: attention() * shown,
            EARLY: attention() * shown,
            KEYS: values(groups, count, 2, 4) * shown.view(groups, count, 1, 1),
            HIDDEN: values(groups, count, 5) * shown.unsqueeze(-1),
        },
        words=Words(
            values(groups, 4, 6), torch.tensor([[True, True, True, False]] * groups), torch.ones(groups, 4).long()
        ),
        tiling=tiling,
    )


def with_newlines(count: int, every: int) -> list[int]:
    """Patches in a row, a newline behind so many."""
    listed: list[int] = []
    for patch in range(count):
        listed += [patch] + ([-1] if patch % every == every - 1 else [])
    return listed


# Images of one size that show different numbers of patches: with newlines in different places.
UNEVEN = [with_newlines(24, 4), [*range(28), -1, -1], [-1, *range(25), -1, -1, -1, -1]]
CROPPED = [
    [*range(16), *(16 + crop * 16 + patch for patch in range(16) for crop in range(4)), *[-1] * 6],
    [*range(16), -1, *range(18, 80), *[-1] * 7],
]
STRIP = [[*range(16), *range(16, 40), -1, -1, *range(44, 64)], [*range(2, 16), -1, -1, *range(16, 62)]]
"""A thumbnail of 4 x 4 and three crops in a row, of which parts are cut off."""

SHOWN: dict[str, Callable[..., VisualTokens]] = {
    "one": lambda **more: images([[*range(30)]], 1, 5, 6, **more),
    "several": lambda **more: images([[*range(30)]] * 3, 1, 5, 6, **more),
    "newlines": lambda **more: images(UNEVEN, 1, 5, 6, **more),
    "crops": lambda **more: images(CROPPED, 5, 4, 4, (2, 2), **more),
    "strip": lambda **more: images(STRIP, 4, 4, 4, (1, 3), **more),
    "frames": lambda **more: images([[*range(48)], [*range(20), -1, *range(21, 48)]], 4, 3, 4, **more),
}

# ----------------------------------------------------------------------------------------------------- plain loops

Mixes = list[dict[int, float]]
Choice = tuple[list[int], Mixes | None]


@dataclass
class Plain:
    """One image, as numbers."""

    tokens: VisualTokens
    place: int

    def rows(self, values: Tensor) -> list[list[float]]:
        return [row.double().flatten().tolist() for row in values[self.place]]

    @cached_property
    def source(self) -> list[int]:
        return [int(number) for number in self.tokens.source[self.place]]

    @cached_property
    def shown(self) -> list[int]:
        return [token for token, candidate in enumerate(self.tokens.candidates[self.place].tolist()) if candidate]

    @cached_property
    def hidden_from_view(self) -> list[int]:
        return [token for token in range(len(self.source)) if token not in self.shown]

    @cached_property
    def saliency(self) -> list[float]:
        return [float(score) for score in self.tokens.saliency[self.place]]

    @cached_property
    def mean_keys(self) -> list[list[float]]:
        return [row.double().mean(0).tolist() for row in self.tokens.signals[KEYS][self.place]]

    def crop(self, token: int) -> int:
        return self.source[token] // (self.tokens.rows * self.tokens.columns)


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def falling(tokens: list[int], scores: list[float]) -> list[int]:
    return sorted(tokens, key=lambda token: (-scores[token], token))


def filled(image: Plain, chosen: list[int], keep: int) -> list[int]:
    """With tokens that show nothing, where there are too few."""
    return sorted((chosen + [token for token in image.hidden_from_view if token not in chosen])[:keep])


def top(image: Plain, scores: list[float], keep: int) -> list[int]:
    return filled(image, falling(image.shown, scores)[:keep], keep)


def plain_vispruner(image: Plain, keep: int, method: Any) -> Choice:
    hidden = image.rows(image.tokens.signals[HIDDEN])
    important = int(method.important * keep)
    order = falling(image.shown, image.saliency)
    listed = order[important:]
    while len(listed) > keep - important:
        if keep == important:
            listed = []
            break
        first, second = listed[::2], listed[1::2]
        alike = {token: max(cosine(hidden[token], hidden[other]) for other in second) for token in first}
        drops = min(method.step, len(listed) - (keep - important), len(first))
        listed = sorted(first, key=lambda token: -alike[token])[drops:] + second
    return filled(image, order[:important] + listed, keep), None


def plain_visionzip(image: Plain, keep: int, method: Any) -> Choice:
    merged = int(method.contextual * keep + 0.5)
    dominant = top(image, image.saliency, keep - merged)
    if not merged:
        return dominant, None
    rest = [token for token in image.shown if token not in dominant]
    step = max(1, len(rest) // merged)
    targets = [rest[place * step] for place in range(min(merged, len(rest)))]
    kept = filled(image, dominant + targets, keep)
    groups = {token: [token] for token in kept}
    keys = image.mean_keys
    for token in rest:
        if token not in targets:
            alike = [cosine(keys[token], keys[target]) for target in targets]
            groups[targets[alike.index(max(alike))]].append(token)
    return kept, [{token: 1 / len(groups[own]) for token in groups[own]} for own in kept]


def plain_outliers(image: Plain, scores: list[float]) -> list[int]:
    among = np.array([scores[token] for token in image.shown])
    low, high = np.percentile(among, 25), np.percentile(among, 75)
    return [token for token in image.shown if scores[token] > high + 1.5 * (high - low)]


def plain_prumerge(image: Plain, keep: int, method: Any) -> Choice:
    saliency, most = image.saliency, max(1, keep - 1)
    kept = top(image, saliency, most)
    if isinstance(method, PruMergePlus):
        first = falling(image.shown, saliency)[: min(most, max(1, len(plain_outliers(image, saliency))))]
        rest = [token for token in image.shown if token not in first]
        wanted = most - len(first)
        if len(rest) >= wanted:
            rest = [rest[(2 * part + 1) * len(rest) // (2 * wanted)] for part in range(wanted)]
        kept = filled(image, first + rest, most)
    keys = image.rows(image.tokens.signals[KEYS])
    mixes: dict[int, dict[int, float]] = {}
    for token in kept:
        mixes[token] = {token: 1.0}
        if token in image.shown:
            others = [other for other in image.shown if other != token]
            others.sort(key=lambda other: (-cosine(keys[token], keys[other]), other))
            mixes[token] |= {other: saliency[other] for other in others[: method.neighbours]}
    if keep > 1:
        left = [token for token in image.shown if token not in kept]
        if left:
            mixes[left[-1]] = {token: saliency[token] for token in left}
        else:
            [last] = [token for token in filled(image, kept, keep) if token not in kept]
            mixes[last] = {last: 1.0}
    return sorted(mixes), [mixes[token] for token in sorted(mixes)]


def plain_likeness(image: Plain, method: Any) -> list[float]:
    words = [row for row, real in zip(image.rows(image.tokens.text.embeddings), [True] * 3, strict=False) if real]
    text = [sum(column) / len(words) for column in zip(*words, strict=True)]
    sign = -1 if method.negated else 1
    features = image.rows(image.tokens.features)
    powers = {token: math.exp(sign * method.temperature * cosine(features[token], text)) for token in image.shown}
    return [powers.get(token, 0.0) / sum(powers.values()) for token in range(len(features))]


def plain_trim(image: Plain, keep: int, method: Any) -> Choice:
    kept = top(image, plain_likeness(image, method), keep - 1)
    mixes = {token: {token: 1.0} for token in kept}
    left = [token for token in image.shown if token not in kept]
    if left:
        mixes[left[-1]] = {token: 1 / len(left) for token in left}
    else:
        [last] = [token for token in filled(image, kept, keep) if token not in kept]
        mixes[last] = {last: 1.0}
    return sorted(mixes), [mixes[token] for token in sorted(mixes)]


def plain_shares(shares: list[int], sizes: list[int], total: int) -> list[int]:
    """By largest remainder; what does not fit goes to the others."""
    given, waiting = list(sizes), [place for place, size in enumerate(sizes) if size]
    left = total
    while waiting:
        if not any(shares[place] for place in waiting):
            shares = [1] * len(shares)
        whole = sum(shares[place] for place in waiting)
        over = [place for place in waiting if shares[place] and left * shares[place] >= sizes[place] * whole]
        if not over:
            for place in waiting:
                given[place] = left * shares[place] // whole
            waiting.sort(key=lambda place: (-(left * shares[place] % whole), place))
            for place in waiting[: total - sum(given)]:
                given[place] += 1
            break
        left -= sum(sizes[place] for place in over)
        waiting = [place for place in waiting if place not in over]
    return given


def plain_hired(image: Plain, keep: int, method: Any) -> Choice:
    tokens, saliency = image.tokens, image.saliency
    if tokens.crops == 1:
        return top(image, saliency, keep), None
    members = [[token for token in image.shown if image.crop(token) == crop] for crop in range(tokens.crops)]
    sizes = [len(each) for each in members]
    if tokens.tiling is None:
        budgets = plain_shares(sizes, sizes, min(keep, sum(sizes)))
    else:
        vertical, horizontal = tokens.tiling
        early = [float(score) for score in tokens.signals[EARLY][image.place]]
        content = falling(members[0], early)[: int((1 - method.alpha) * sizes[0] + 1e-6)]
        shares = [0] * (tokens.crops - 1)
        for token in content:
            row, column = divmod(image.source[token], tokens.columns)
            down = int((row + 0.5) / tokens.rows * vertical)
            across = int((column + 0.5) / tokens.columns * horizontal)
            shares[down * horizontal + across] += 1
        others = min(keep - min(int(method.alpha * keep), sizes[0]), sum(sizes[1:]))
        budgets = [min(keep - others, sizes[0]), *plain_shares(shares, sizes[1:], others)]
    chosen = [
        token for each, budget in zip(members, budgets, strict=True) for token in falling(each, saliency)[:budget]
    ]
    return filled(image, chosen, keep), None


def plain_tome(image: Plain, keep: int, method: Any) -> Choice:
    listed = [
        ([token], image.mean_keys[token]) for token in image.shown
    ]  # whom it stands for, its own number first; key
    while len(listed) > keep:
        first, second = listed[::2], listed[1::2]
        matches = []
        for place, (_, key) in enumerate(first):
            alike = [cosine(key, other) for _, other in second]
            matches.append((-max(alike), place, alike.index(max(alike))))
        going = sorted(matches)[: min(len(listed) - keep, len(listed) // 2)]
        joined = list(second)
        for other, (own, key) in enumerate(second):
            parts = [(own, key)] + [first[place] for _, place, match in going if match == other]
            size = sum(len(tokens) for tokens, _ in parts)
            mean = [sum(len(tokens) * value[i] for tokens, value in parts) / size for i in range(len(key))]
            joined[other] = ([token for tokens, _ in parts for token in tokens], mean)
        gone = {place for _, place, _ in going}
        whole: list[Any] = [None] * len(listed)
        whole[::2] = [None if place in gone else entry for place, entry in enumerate(first)]
        whole[1::2] = joined
        listed = [entry for entry in whole if entry is not None]
    groups = {tokens[0]: tokens for tokens, _ in listed}
    kept = filled(image, list(groups), keep)
    groups |= {token: [token] for token in kept if token not in groups}
    return kept, [{token: 1 / len(groups[own]) for token in groups[own]} for own in kept]


def plain_evs(image: Plain, keep: int, method: Any) -> Choice:
    size, features = image.tokens.rows * image.tokens.columns, image.rows(image.tokens.features)
    at = {image.source[token]: token for token in image.shown}
    scores = [0.0] * len(features)
    for token in image.shown:
        before = at.get(image.source[token] - size)
        scores[token] = math.inf if before is None else 1 - cosine(features[token], features[before])
    return top(image, scores, keep), None


PLAIN: list[tuple[Method, Callable[..., Choice]]] = [
    (VisPruner(), plain_vispruner),
    (VisPruner(important=0.0, step=3), plain_vispruner),
    (VisPruner(important=0.9, step=1), plain_vispruner),
    (VisPruner(important=1.0), plain_vispruner),
    (VisionZip(), plain_visionzip),
    (VisionZip(contextual=0.5), plain_visionzip),
    (VisionZip(contextual=1.0), plain_visionzip),
    (PruMerge(), plain_prumerge),
    (PruMerge(neighbours=3), plain_prumerge),
    (PruMerge(neighbours=0), plain_prumerge),
    (PruMergePlus(neighbours=5), plain_prumerge),
    (Trim(temperature=4.0), plain_trim),
    (Trim(temperature=1.0, negated=True), plain_trim),
    (HiRED(), plain_hired),
    (HiRED(alpha=0.2), plain_hired),
    (HiRED(alpha=0.0), plain_hired),
    (HiRED(alpha=1.0), plain_hired),
    (ToMe(), plain_tome),
    (EVS(), plain_evs),
]


def named(case: Any) -> str:
    return repr(case) if isinstance(case, Method) else ""


def is_chosen(tokens: VisualTokens, method: Method, plain: Callable[..., Choice], keep: int) -> None:
    """All images together, and each by itself, as the loops choose."""
    kept = method.select(tokens, keep)
    check_kept(method, tokens, keep, kept)
    for place in range(len(tokens.source)):
        indices, mixes = plain(Plain(tokens, place), keep, method)
        assert kept.indices[place].tolist() == indices
        alone = method.select(part_of(tokens, place), keep)
        assert torch.equal(alone.indices[0], kept.indices[place])
        if mixes is None:
            assert kept.weights is None
            continue
        expected = torch.zeros(keep, tokens.source.shape[1])
        for row, mix in enumerate(mixes):
            for token, weight in mix.items():
                expected[row, token] = weight
        assert kept.weights is not None
        torch.testing.assert_close(kept.weights[place], expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(kept.weights[place] == 1, expected == 1)
        torch.testing.assert_close(alone.weights[0], kept.weights[place], atol=1e-6, rtol=1e-5)


def part_of(tokens: VisualTokens, place: int) -> VisualTokens:
    part = slice(place, place + 1)
    return replace(
        tokens,
        features=tokens.features[part],
        candidates=tokens.candidates[part],
        source=tokens.source[part],
        signals={signal: values[part] for signal, values in tokens.signals.items()},
        words=Words(tokens.text.embeddings[part], tokens.text.mask[part], tokens.text.ids[part]),
    )


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize(("method", "plain"), PLAIN, ids=named)
def test_as_plain_loops_choose(method: Method, plain: Callable[..., Choice], shown: str) -> None:
    tokens = SHOWN[shown](seed=3)
    count = tokens.source.shape[1]
    patches = tokens.candidates.sum(1).tolist()
    for keep in sorted({1, 2, 7, count // 2, *patches, *(number + 1 for number in patches), count - 1}):
        if keep < count:
            is_chosen(tokens, method, plain, keep)


@pytest.mark.each
@pytest.mark.parametrize("shown", ["several", "newlines", "crops"])
@pytest.mark.parametrize(("method", "plain"), PLAIN, ids=named)
def test_equal_values(method: Method, plain: Callable[..., Choice], shown: str) -> None:
    for seed in range(3):
        tokens = SHOWN[shown](seed=seed, ties=True)
        count = tokens.source.shape[1]
        # The means of ToMe are no longer exact after a round.
        for keep in (count - 1, count * 2 // 3) if isinstance(method, ToMe) else (1, 5, count // 2, count - 1):
            is_chosen(tokens, method, plain, keep)


@pytest.mark.parametrize(("method", "plain"), PLAIN, ids=named)
def test_half_precision(method: Method, plain: Callable[..., Choice]) -> None:
    is_chosen(SHOWN["strip"](seed=5, dtype=torch.bfloat16), method, plain, 9)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.release) for seed in (2, 3))])
def test_crops_that_the_plan_leaves_out(seed: int) -> None:
    """They are tokens as newlines are: never mixed, and last."""
    tokens = SHOWN["crops"](seed=seed)
    tokens = replace(tokens, candidates=tokens.candidates & (tokens.source < 48) & (tokens.source != 5))
    for method, plain in PLAIN:
        for keep in (4, 50):
            is_chosen(tokens, method, plain, keep)


# ------------------------------------------------------------------------------------------------- how many tokens


@pytest.mark.parametrize("shown", SHOWN)
def test_outliers(shown: str) -> None:
    found = set()
    for seed in range(8):
        tokens = SHOWN[shown](seed=seed)
        counted = outliers(tokens.saliency, tokens.candidates).tolist()
        expected = [len(plain_outliers(Plain(tokens, i), Plain(tokens, i).saliency)) for i in range(len(counted))]
        assert counted == expected
        found |= set(counted)
    assert len(found) > 1


def test_no_outlier() -> None:
    tokens = SHOWN["newlines"]()
    assert outliers(torch.ones(3, 30), tokens.candidates).tolist() == [0, 0, 0]
    even = replace(tokens, signals={**tokens.signals, SALIENCY: torch.ones(3, 30) / 30})
    assert PruMerge().count(even, 20).tolist() == [2, 2, 2]  # one, and one for the rest
    same = replace(tokens, features=torch.ones(3, 30, 6))
    assert Trim().count(same, 20).tolist() == [1, 1, 1]  # the mean of all
    weights = Trim().select(same, 1).weights
    assert weights is not None
    torch.testing.assert_close(weights[0, 0], tokens.candidates[0] / 24)


@pytest.mark.parametrize("shown", SHOWN)
def test_counts(shown: str) -> None:
    for seed in range(4):
        tokens = SHOWN[shown](seed=seed)
        for place in range(len(tokens.source)):
            image, alone = Plain(tokens, place), part_of(tokens, place)
            first = len(plain_outliers(image, image.saliency)) or 1
            assert PruMerge().count(alone, 1000).tolist() == [first + 1]
            chosen = falling(image.shown, image.saliency)[:first]
            step = max(1, len(image.shown) // first // 3)
            spread = set(image.shown[::step]) - set(chosen)
            assert PruMergePlus().count(alone, 1000).tolist() == [first + len(spread) + 1]
            similar = plain_outliers(image, plain_likeness(image, Trim(temperature=4.0)))
            assert Trim(temperature=4.0).count(alone, 1000).tolist() == [len(similar) + 1]
            for method in (PruMerge(), PruMergePlus(), Trim()):
                assert method.count(alone, 1).tolist() == [1]
    layout = ImageLayout(torch.arange(30), 1, 5, 6)
    for cls in (PruMerge, PruMergePlus, Trim):
        assert plan_of(cls(), layout, 9).keep is None
        assert plan_of(cls(fill=True), layout, 9).keep == 9


def test_shares() -> None:
    drawn = np.random.default_rng(0)
    for _ in range(200):
        crops = int(drawn.integers(1, 6))
        shares, sizes = drawn.integers(0, 6, crops).tolist(), drawn.integers(0, 9, crops).tolist()
        total = int(drawn.integers(0, sum(sizes) + 1))
        found = apportioned(torch.tensor([shares]), torch.tensor([sizes]), torch.tensor([total]))[0].tolist()
        assert found == plain_shares(shares, sizes, total)
        assert sum(found) == total


def test_an_even_spread() -> None:
    marks = torch.tensor([[True] * 10, [True, False] * 5])
    order, count = in_turn(marks), marks.sum(-1, keepdim=True)
    assert evenly(order, count, torch.tensor([[5], [0]]), 5).nonzero().tolist() == [[0, x] for x in (1, 3, 5, 7, 9)]
    found = evenly(order, count, torch.tensor([[1], [7]]), 7)
    assert found[0].nonzero().flatten().tolist() == [5]
    assert found[1].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 6, 8]  # and two that are not marked


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (VisPruner, {"important": 1.1}),
        (VisPruner, {"step": 0}),
        (VisionZip, {"contextual": -0.1}),
        (PruMerge, {"neighbours": -1}),
        (PruMergePlus, {"neighbours": -1}),
        (HiRED, {"alpha": 2.0}),
    ],
)
def test_options_out_of_range(cls: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        cls(**wrong)


# ------------------------------------------------------------------------------------------ thumbnails and videos


def test_the_thumbnail_alone() -> None:
    row = ROWS["llava-next"]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [2])
        short = compress(model, inputs, 5, method="thumbnail")
        saliency = compress(model, inputs, 5, method="saliency").record.images
        for image, other in zip(short.record.images, saliency, strict=True):
            first = (image.layout.source >= 0) & (image.layout.source < image.layout.rows * image.layout.columns)
            scores = other.saliency.masked_fill(~first, -1.0)
            assert image.kept.tolist() == sorted(scores.argsort(descending=True, stable=True)[:5].tolist())
        with pytest.raises(BudgetError, match=r"thumbnail looks at 1 of . crops, which have 16 tokens; give at most"):
            compress(model, inputs, 17, method="thumbnail")
    with shared_model(ROWS["llava"]) as model:
        inputs = make_inputs(ROWS["llava"], model, [1])
        kept = [compress(model, inputs, 5, method=name).record.kept[0].tolist() for name in ("thumbnail", "saliency")]
        assert kept[0] == kept[1]
    with pytest.raises(MethodError, match="needs an image with a thumbnail"):
        Thumbnail().plan(ImageLayout(torch.arange(32), 2, 4, 4), 5)


@pytest.mark.parametrize("name", [name for name in ("video-llava", "llava-next-video", "qwen2.5-vl") if name in ROWS])
def test_frames_of_a_video(name: str) -> None:
    """They reach a method together, and the layout says that they are frames."""
    row = ROWS[name]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [0], videos_per_prompt=[1], seed=2)
        [whole] = compress(model, inputs, 1.0, method="evs").record.images
        size, frames = whole.layout.rows * whole.layout.columns, whole.layout.crops
        assert frames > 1
        keep = int(whole.layout.shows_patch.sum()) - 2
        family = family_of(model)
        visuals = {part: inputs[part] for part in family.inputs("video") if part in inputs}
        with torch.no_grad():
            [features] = family.encode(model, "video", visuals, [whole.layout], frozenset()).features
        seen = images([whole.layout.source.tolist()], frames, whole.layout.rows, whole.layout.columns)
        seen = replace(seen, features=features.unsqueeze(0))
        for budget in (size, (size + keep) // 2, keep):
            [image] = compress(model, inputs, budget, method="evs").record.images
            assert image.kept.tolist() == plain_evs(Plain(seen, 0), budget, EVS())[0]
        with pytest.raises(BudgetError, match=f"keeps the first frame whole, which has {size} tokens"):
            compress(model, inputs, size - 1, method="evs")
        with pytest.raises(MethodError, match="compares the frames of a video"):
            compress(model, inputs, 2, method="evs", video="frame")
        with pytest.raises(MethodError, match="compares the frames of a video"):
            compress(model, make_inputs(row, model, [1]), 2, method="evs")


# ------------------------------------------------------------------------------------- in front of the projector


@dataclass(frozen=True)
class Before(Merging):
    """`Merging` of what the projector reads."""

    name = "before"
    mixes = "tower"


def tower_rows(model: Any, inputs: dict[str, Any], layouts: list[ImageLayout]) -> list[Tensor]:
    """Per image [N, E], what the stock tower hands to the projector; 0 at newlines."""
    setting = getattr(model.config, "vision_feature_layer", None) or model.config.vision_feature_layers
    pixels = inputs["pixel_values"]
    if pixels.dim() == 5:
        pixels = torch.cat([crops[: layout.crops] for crops, layout in zip(pixels, layouts, strict=True)])
    states = getattr(model.model, "vision_tower", None) or model.model.image_tower
    states = states(pixels, output_hidden_states=True).hidden_states
    read = [states[layer][:, 1:] for layer in ([setting] if isinstance(setting, int) else setting)]
    found, first = [], 0
    for layout in layouts:
        rows = torch.cat(read, dim=-1)[first : first + layout.crops].flatten(0, 1)
        first += layout.crops
        found.append(rows[layout.source.clamp_min(0)] * layout.shows_patch.unsqueeze(-1))
    return found


def layouts_of(model: Any, inputs: dict[str, Any]) -> list[ImageLayout]:
    return [image.layout for image in compress(model, inputs, 1.0).record.images]


def handed(short: Any, modality: str = "image") -> Tensor:
    made = short["mm_encoder_outputs"][modality].pooler_output
    if cannot_be_repeated(made):  # before transformers 5.23
        return made.squeeze(-1)
    return torch.cat([part.flatten(0, -2) for part in made])


PROJECTING = [name for name in ("llava", "llava-next", "vipllava", "video-llava") if name in ROWS]


def test_families_that_project() -> None:
    assert PROJECTING == ["llava", "llava-next", "vipllava", "video-llava"]


@pytest.mark.parametrize("name", PROJECTING)
def test_the_projector_reads_the_mixes(name: str) -> None:
    row = ROWS[name]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [2, 1], seed=3)
        pixels = {family_of(model).named(part): value for part, value in inputs.items()}
        with torch.no_grad():
            layouts = layouts_of(model, inputs)
            whole = handed(compress(model, inputs, 1.0)).split([layout.tokens for layout in layouts])
            short = compress(model, inputs, 0.4, method=Before())
            parts = handed(short).split([len(kept) for kept in short.record.kept])
            for image, features, rows, part in zip(
                short.record.images, whole, tower_rows(model, pixels, layouts), parts, strict=True
            ):
                kept, members = plain_merging(OneImage(features, image.layout, len(image.kept)))
                assert image.kept.tolist() == kept
                means = torch.stack([rows[tokens].mean(0) for tokens in members])
                expected = model.model.multi_modal_projector(means)
                torch.testing.assert_close(part, expected, atol=2e-6, rtol=2e-5)
                behind = torch.stack([features[tokens].mean(0) for tokens in members])
                assert any(len(tokens) > 1 for tokens in members)
                assert not torch.allclose(part, behind, atol=1e-4)  # the projector is not linear
                single = [place for place, tokens in enumerate(members) if len(tokens) == 1]
                assert torch.equal(part[single], features[[members[place][0] for place in single]])


@pytest.mark.parametrize("name", [name for name in ("video-llava", "llava-next-video") if name in ROWS])
def test_the_projector_reads_mixes_of_frames(name: str) -> None:
    row = ROWS[name]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [0], videos_per_prompt=[1], seed=6)
        base, layer = model.model, model.config.vision_feature_layer
        frames = inputs["pixel_values_videos"].flatten(0, 1)
        with torch.no_grad():
            if name == "video-llava":  # whose frames keep their [CLS]
                rows = base.video_tower(frames, output_hidden_states=True).hidden_states[layer]
            else:
                rows = base.vision_tower(frames, output_hidden_states=True).hidden_states[layer][:, 1:]
                rows = base.vision_resampler(rows)
            short = compress(model, inputs, 0.4, method=Before())
            [image] = short.record.images
            assert image.merged
            expected = base.multi_modal_projector(image.weights @ rows.flatten(0, 1))
            torch.testing.assert_close(handed(short, "video"), expected, atol=2e-6, rtol=2e-5)


def test_frames_that_are_not_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS["llava-next-video"]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [0], videos_per_prompt=[1])
        monkeypatch.setattr(model.config, "spatial_pool_mode", "max")
        with pytest.raises(UnsupportedModelError, match="cannot be mixed in LLaVA-NeXT-Video"):
            compress(model, inputs, 0.4, method=Before())


@pytest.mark.parametrize("name", ["llava", "llava-next"])
@pytest.mark.parametrize(
    "method",
    [VisionZip(contextual=0.4), PruMerge(neighbours=3), PruMergePlus(fill=True), Trim(temperature=20.0), ToMe()],
    ids=named,
)
def test_methods_that_mix(name: str, method: Any) -> None:
    """The recorded weights, by hand through the stock tower and projector; beside it, behind the projector."""
    row = ROWS[name]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [1, 1], seed=1)
        with torch.no_grad():
            layouts = layouts_of(model, inputs)
            whole = handed(compress(model, inputs, 1.0)).split([layout.tokens for layout in layouts])
            for budget in (6, 0.9):
                short = compress(model, inputs, budget, method=method)
                after = compress(model, inputs, budget, method=replace(method, before_projector=False))
                counts = [len(kept) for kept in short.record.kept]
                mixed = zip(
                    short.record.images,
                    after.record.images,
                    whole,
                    tower_rows(model, inputs, layouts),
                    handed(short).split(counts),
                    handed(after).split(counts),
                    strict=True,
                )
                for image, other, features, rows, part, behind in mixed:
                    assert image.kept.tolist() == other.kept.tolist()
                    assert torch.equal(image.weights, other.weights)
                    expected = model.model.multi_modal_projector(image.weights @ rows)
                    for place, token in enumerate(image.kept.tolist()):
                        if not image.layout.shows_patch[token]:
                            expected[place] = features[token]
                    torch.testing.assert_close(part, expected, atol=2e-6, rtol=2e-5)
                    torch.testing.assert_close(behind, image.weights @ features, atol=2e-6, rtol=2e-5)


@dataclass(frozen=True)
class OneByOne(Method):
    """The first tokens, said as weights."""

    mixes: str = "tower"
    as_weights: bool = True

    name = "one-by-one"
    summary = "the first tokens"

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        indices = torch.arange(keep).expand(len(tokens.source), keep) * 2
        weights = torch.nn.functional.one_hot(indices, tokens.source.shape[1]).float()
        return Kept(indices, weights if self.as_weights else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llava", "llava-next"])
def test_weights_of_one_token_change_no_bit(name: str, dtype: torch.dtype) -> None:
    """Newlines among them."""
    row = ROWS[name]
    with shared_model(row, dtype) as model:
        inputs = make_inputs(row, model, [1])
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        same = [
            handed(compress(model, inputs, 0.5, method=method))
            for method in (OneByOne(), OneByOne("tokens"), OneByOne(as_weights=False))
        ]
        [image] = compress(model, inputs, 0.5, method=OneByOne()).record.images
        assert bool((image.layout.source[image.kept] < 0).any()) == (name == "llava-next")
    assert torch.equal(same[0], same[2])
    assert torch.equal(same[1], same[2])


@dataclass(frozen=True)
class Newlines(OneByOne):
    """Mixes all tokens, newlines among them."""

    name = "newlines"

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        kept = super().select(tokens, keep)
        return Kept(kept.indices, torch.full((*kept.indices.shape, tokens.source.shape[1]), 0.01))


def test_newlines_are_not_projected() -> None:
    row = ROWS["llava-next"]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [1])
        with pytest.raises(MethodError, match="weights mix tokens that show no patch"):
            compress(model, inputs, 3, method=Newlines())
        assert len(compress(model, inputs, 3, method=Newlines("tokens")).record.kept[0]) == 3


def test_gradients_go_through_tower_and_projector() -> None:
    row = ROWS["llava-next"]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [1, 1], seed=2)
        aside = (inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0)
        labels = inputs["input_ids"].masked_fill(aside | aside.roll(1, 1), -100)
        with torch.no_grad():
            layouts = layouts_of(model, inputs)
        model.zero_grad()
        with Pruner(Before(), keep=0.4)(model) as pruner:
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        found = {part: weight.grad.clone() for part, weight in model.named_parameters() if weight.grad is not None}
        model.zero_grad()
        made = []
        for image, rows in zip(pruner.last.images, tower_rows(model, inputs, layouts), strict=True):
            mixed = model.model.multi_modal_projector(image.weights @ rows)
            shown = image.layout.shows_patch[image.kept].unsqueeze(-1)
            made.append(torch.where(shown, mixed, model.model.image_newline))
        with torch.no_grad():
            short = compress(model, {**inputs, "labels": labels}, 0.4, method=Before())
        output = BaseModelOutputWithPooling(pooler_output=made)
        wanted = model(**{**short, "mm_encoder_outputs": {"image": output}}).loss
        wanted.backward()
        torch.testing.assert_close(loss, wanted, atol=2e-5, rtol=2e-5)
        theirs = {part: weight.grad for part, weight in model.named_parameters() if weight.grad is not None}
        assert any("vision_tower" in part and gradient.abs().sum() > 0 for part, gradient in found.items())
        for part, gradient in found.items():
            if part in theirs:
                torch.testing.assert_close(gradient, theirs[part], atol=1e-4, rtol=1e-3, msg=part)
        model.zero_grad()


@pytest.mark.parametrize("name", ["llava", "llava-next"])
def test_encoded_images(name: str) -> None:
    row = ROWS[name]
    model = row.build()
    inputs = make_inputs(row, model, [1, 1], seed=4)
    text = {part: value for part, value in inputs.items() if part not in ("pixel_values", "image_sizes")}
    encoded = adafv.encode(model, inputs, method=["visionzip", "trim"])
    for method in ("visionzip", Trim(fill=True), VisionZip(before_projector=False)):
        for budget in (5, 0.5):
            found = compress(model, {**text, "images": encoded}, budget, method=method)
            assert torch.equal(handed(found), handed(compress(model, inputs, budget, method=method)))
    without = adafv.encode(model, inputs, method=VisionZip(before_projector=False))
    with pytest.raises(StaleImagesError, match="encoded without read, which the method visionzip needs"):
        compress(model, {**text, "images": without}, 5, method="visionzip")


@pytest.mark.parametrize("name", [name for name in ("qwen2.5-vl", "llava-onevision", "idefics3") if name in ROWS])
def test_families_whose_projector_is_not_known(name: str) -> None:
    row = ROWS[name]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [1])
        with pytest.raises(UnsupportedModelError, match=r"visionzip does not fit.*give it before_projector=false"):
            compress(model, inputs, 3, method="visionzip")
        with pytest.raises(UnsupportedModelError, match="before_projector=false"):
            adafv.encode(model, inputs, method="tome")
        short = compress(model, inputs, 0.5, method=VisionZip(contextual=0.5, before_projector=False))
        assert short.record.images[0].merged


def test_what_is_mixed_must_be_known() -> None:
    with shared_model(ROWS["llava"]) as model:
        inputs = make_inputs(ROWS["llava"], model, [1])
        with pytest.raises(MethodError, match="mixes 'pixels'; known are: tokens, tower"):
            compress(model, inputs, 3, method=OneByOne("pixels"))


def test_images_with_other_tilings_are_apart() -> None:
    """Of one size otherwise: the thumbnail's places mean other crops."""
    generator = torch.Generator().manual_seed(0)
    wanted = []
    for tiling in ((1, 4), (4, 1), (1, 4)):
        layout = ImageLayout(torch.arange(80), 5, 4, 4, tiling)
        signals = {signal: torch.rand(80, generator=generator) for signal in (SALIENCY, EARLY)}
        image = adafv.core.encoded.EncodedImage(torch.randn(80, 4, generator=generator), signals, layout)
        wanted.append(Wanted(image, HiRED(), plan_of(HiRED(), layout, 12), 12))
    one = Wanted(wanted[2].encoded, wanted[0].method, wanted[2].plan, 12)
    two = Wanted(wanted[1].encoded, wanted[0].method, wanted[1].plan, 12)
    found = select_tokens([wanted[0], two, one])
    assert sorted(group.members for group in found) == [(0, 2), (1,)]
