"""The methods that choose greedily, against plain loops written from their formulas, and the searches that they share.

The loops see one image at a time, in double precision, and share nothing with the library.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st
from test_operations import MOST_OPERATIONS, Watched
from torch import Tensor

from adafv.core import facets, greedy
from adafv.core.facets import facet_rounds, facet_steps, with_the_farthest
from adafv.core.greedy import Greedy, Parts, block_sizes, coverage_search, determinantal_search, max_min_search
from adafv.core.likeness import self_cosines, unit_vectors
from adafv.core.select import check_kept
from adafv.core.tokens import HIDDEN, SALIENCY, STRINGS, WORDS, VisualTokens, Words
from adafv.errors import BudgetError, MethodError, OptionError
from adafv.methods import method_named
from adafv.methods.facet import Facet
from adafv.methods.mmtok import content_of

ROWS, COLUMNS = 3, 4
QUESTION = ("the", "red", "box", "is", "on", "top")


def images(
    groups: int = 2,
    crops: int = 1,
    newlines: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    size: int = 10,
    tiling: tuple[int, int] | None = None,
) -> VisualTokens:
    """Images of 3 x 4 patches in each crop, four to seven words each; some tokens alike, as those of a wall are."""
    generator = torch.Generator().manual_seed(seed)
    crops = crops if tiling is None else 1 + tiling[0] * tiling[1]
    source = torch.arange(crops * ROWS * COLUMNS)
    if newlines:
        source = torch.cat([torch.cat((line, torch.tensor([-1]))) for line in source.view(-1, COLUMNS)])
    count = len(source)

    def alike(width: int) -> Tensor:
        kinds = torch.randn(groups, 5, width, generator=generator)
        which = torch.randint(0, 5, (groups, count), generator=generator)
        own = torch.randn(groups, count, width, generator=generator)
        return (kinds[torch.arange(groups).unsqueeze(1), which] + 0.7 * own + 0.5).to(dtype)

    shown = source >= 0
    lengths = torch.tensor([4 + number % 4 for number in range(groups)])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    hidden = alike(size + 3) * shown.unsqueeze(-1).to(dtype)
    return VisualTokens(
        features=alike(size),
        candidates=shown.expand(groups, count).clone(),
        source=source.expand(groups, count).clone(),
        crops=crops,
        rows=ROWS,
        columns=COLUMNS,
        tiling=tiling,
        signals={SALIENCY: torch.randn(groups, count, generator=generator).exp() * shown, HIDDEN: hidden},
        words=Words(
            torch.randn(groups, mask.shape[1], size, generator=generator).to(dtype),  # padding is noise
            mask,
            torch.zeros(mask.shape, dtype=torch.long),
            [["\u2581" + word for word in QUESTION[: n - 1]] + ["?"] for n in lengths],
        ),
    )


# ---------------------------------------------------------------------------------------------------- plain loops


class Plain:
    """One image as lists of numbers."""

    def __init__(self, tokens: VisualTokens, place: int) -> None:
        words = tokens.text
        self.shown = [j for j, shown in enumerate(tokens.candidates[place].tolist()) if shown]
        self.count = tokens.source.shape[1]
        self.features = tokens.features[place].double().tolist()
        self.hidden = tokens.signals[HIDDEN][place].double().tolist()
        self.saliency = tokens.saliency[place].double().tolist()
        texts = words.embeddings[place].double().tolist()
        self.words = [word for word, counts in zip(texts, words.mask[place].tolist(), strict=True) if counts]
        patches = tokens.rows * tokens.columns
        self.source = tokens.source[place].tolist()
        self.crop = [source // patches for source in self.source]
        self.crops, self.rows, self.columns, self.tiling = tokens.crops, tokens.rows, tokens.columns, tokens.tiling


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def softmax(values: list[float]) -> list[float]:
    most = max(values)
    powers = [math.exp(value - most) for value in values]
    return [power / sum(powers) for power in powers]


def scaled(values: dict[int, float]) -> dict[int, float]:
    """From the least, to the most: 0 to 1."""
    least, most = min(values.values()), max(values.values())
    return {j: (value - least + 1e-6) / (most - least + 1e-6) for j, value in values.items()}


def chosen_by(gain: Callable[[list[int], int], float], image: Plain, keep: int, turns: bool = False) -> list[int]:
    """Greedily the largest gain(kept so far, token); then what shows no patch."""
    kept = in_order(gain, image, keep, turns)
    rest = [j for j in range(image.count) if j not in image.shown]
    return sorted(kept + rest[: keep - len(kept)])


def in_order(gain: Callable[[list[int], int], float], image: Plain, keep: int, turns: bool = False) -> list[int]:
    kept: list[int] = []
    for step in range(min(keep, len(image.shown))):
        left = [j for j in image.shown if j not in kept]
        if turns:
            left = [j for j in left if image.crop[j] == step % image.crops] or left
        kept.append(max(left, key=lambda j: (gain(kept, j), -j)))
    return kept


def plain_divprune(image: Plain, keep: int, **options: Any) -> list[int]:
    def gain(kept: list[int], token: int) -> float:
        others = kept or [j for j in image.shown if j != token]
        return min(1 - cosine(image.features[token], image.features[j]) for j in others)

    return chosen_by(gain, image, keep)


def plain_relevance(image: Plain, words: str = "best", sign: int = 1) -> dict[int, float]:
    found = {}
    for j in image.shown:
        alike = [sign * cosine(word, image.features[j]) for word in image.words]
        found[j] = max(alike) if words == "best" else sum(alike) / len(alike)
    return scaled(found)


def determinant(kernel: list[list[float]]) -> float:
    return float(torch.linalg.det(torch.tensor(kernel, dtype=torch.float64))) if kernel else 1.0


def plain_determinantal(
    vectors: list[list[float]], quality: dict[int, float], image: Plain, keep: int, each: bool = False
) -> list[int]:
    """Every step by the determinants themselves."""

    def kernel(tokens: list[int]) -> list[list[float]]:
        return [[quality[i] * cosine(vectors[i], vectors[j]) * quality[j] for j in tokens] for i in tokens]

    def gain(kept: list[int], token: int) -> float:
        own = [j for j in kept if not each or image.crop[j] == image.crop[token]]
        return determinant(kernel([*own, token])) / determinant(kernel(own))

    return chosen_by(gain, image, keep, turns=each)


def plain_cdpruner(
    image: Plain, keep: int, words: str = "best", sign: int = 1, views: str = "each", **options: Any
) -> list[int]:
    quality = plain_relevance(image, words, sign)
    return plain_determinantal(image.features, quality, image, keep, each=views == "each")


def plain_scope(image: Plain, keep: int, alpha: float = 1.0, views: str = "each") -> list[int]:
    def gain(kept: list[int], token: int) -> float:
        total = 0.0
        for j in image.shown:
            if views == "each" and image.crop[j] != image.crop[token]:
                continue
            own = [i for i in kept if views == "together" or image.crop[i] == image.crop[j]]
            best = max([0.0] + [cosine(image.hidden[i], image.hidden[j]) for i in own])
            total += max(0.0, cosine(image.hidden[token], image.hidden[j]) - best)
        return image.saliency[token] ** alpha * total

    return chosen_by(gain, image, keep, turns=views == "each")


def plain_mmtok(image: Plain, keep: int, image_weight: float = 0.5, counting: list[int] | None = None) -> list[int]:
    words = image.words if counting is None else [image.words[place] for place in counting]
    asked = [softmax([cosine(word, image.features[j]) / 0.01 for j in image.shown]) for word in words]
    seen = [softmax([cosine(image.hidden[i], image.hidden[j]) / 0.2 for j in image.shown]) for i in image.shown]
    place = {j: number for number, j in enumerate(image.shown)}

    def value(kept: list[int]) -> float:
        if not kept:
            return 0.0
        text = sum(max(row[place[j]] for j in kept) for row in asked) / len(words)
        return text + image_weight * sum(max(row[place[j]] for j in kept) for row in seen) / len(image.shown)

    return chosen_by(lambda kept, token: value([*kept, token]) - value(kept), image, keep)


def mirrored(place: int, size: int) -> int:
    return abs(place) if place < size else 2 * size - 2 - place


def plain_smoothed(scores: dict[int, float], image: Plain) -> dict[int, float]:
    at = {image.source[j]: score for j, score in scores.items()}
    found = {}
    for j in scores:
        crop, inside = divmod(image.source[j], image.rows * image.columns)
        row, column = divmod(inside, image.columns)
        total = weights = 0.0
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                near = mirrored(row + down, image.rows), mirrored(column + across, image.columns)
                cell = (crop * image.rows + near[0]) * image.columns + near[1]
                if cell in at:
                    weight = math.exp(-(down**2 + across**2) / 2)
                    total, weights = total + weight * at[cell], weights + weight
        found[j] = total / weights
    return found


def plain_eadp(
    image: Plain, keep: int, sharpest: float = 0.5, mix: float = 0.5, beta: float = 1.0, sign: int = 1
) -> list[int]:
    mean = [sum(column) / len(image.words) for column in zip(*image.words, strict=True)]
    entropies, alike = [], []
    for word in image.words:
        row = [sign * cosine(word, image.features[j]) for j in image.shown]
        entropies.append(-sum(p * math.log(p) for p in softmax([100 * value for value in row]) if p > 0))
        alike.append(row)
    order = sorted(range(len(alike)), key=lambda word: entropies[word])
    order = order[: max(1, int(len(alike) * sharpest))]
    weights = softmax([-entropies[word] / 0.01 for word in order])
    scores = {}
    for place, j in enumerate(image.shown):
        dense = sum(weight * alike[word][place] for weight, word in zip(weights, order, strict=True))
        scores[j] = mix * sign * cosine(mean, image.features[j]) + (1 - mix) * dense
    demand = plain_smoothed(scaled(scores), image)

    def value(kept: list[int]) -> float:
        total = 0.0
        for j in image.shown:
            total += demand[j] ** beta * max(
                [(1 + cosine(image.features[i], image.features[j])) / 2 for i in kept] + [0]
            )
        return total

    return chosen_by(lambda kept, token: value([*kept, token]) - value(kept), image, keep)


def plain_cenprune(
    image: Plain, keep: int, on: str = "divprune", scale: str = "min-max", words: str = "best", sign: int = 1
) -> list[int]:
    shown = image.shown
    mean = [sum(image.features[j][d] for j in shown) / len(shown) for d in range(len(image.features[0]))]
    centred = [[x - y for x, y in zip(row, mean, strict=True)] for row in image.features]
    unlike = {
        i: -sum(cosine(image.features[i], image.features[j]) for j in shown if j != i) / (len(shown) - 1) for i in shown
    }
    if scale == "min-max":
        distinct = scaled(unlike)
    else:
        middle = sum(unlike.values()) / len(shown)
        spread = math.sqrt(sum((value - middle) ** 2 for value in unlike.values()) / len(shown))
        distinct = {j: 1 / (1 + math.exp(-(value - middle) / spread)) for j, value in unlike.items()}
    if on == "cdpruner":
        relevant = plain_relevance(image, words, sign)
        return plain_determinantal(centred, {j: distinct[j] * relevant[j] for j in shown}, image, keep)

    def gain(kept: list[int], token: int) -> float:
        others = kept or [j for j in shown if j != token]
        return distinct[token] * min(1 - cosine(centred[token], centred[j]) for j in others)

    return chosen_by(gain, image, keep)


def plain_blocks(gain: Callable[[list[int], int], float], image: Plain, keep: int, blocks: int) -> list[int]:
    kept: list[int] = []
    for size in block_sizes(keep, blocks):
        gains = {j: gain(kept, j) for j in image.shown if j not in kept}
        some = sorted(gains, key=lambda j: (-gains[j], j))[: 3 * size]
        score = {}
        for place, token in enumerate(some):
            near = [cosine(image.hidden[token], image.hidden[j]) for j in some[:place]]
            score[token] = gains[token] * (1 - max([0.0, *near]))
        kept += sorted(some, key=lambda j: -score[j])[:size]
    return kept


def plain_views(image: Plain, views: str) -> tuple[dict[int, float], dict[int, float]]:
    """Saliency and demand of each token."""
    saliency, demand = {j: image.saliency[j] for j in image.shown}, dict.fromkeys(image.shown, 1.0)
    if image.tiling is None or views == "alike":
        return saliency, demand
    thumbnail = [j for j in image.shown if image.crop[j] == 0]
    lies = dict.fromkeys(range(image.crops), 0.0)
    for j in thumbnail:
        row, column = divmod(image.source[j], image.columns)
        down = int((row + 0.5) / image.rows * image.tiling[0])
        lies[1 + down * image.tiling[1] + int((column + 0.5) / image.columns * image.tiling[1])] += saliency[j]
    whole = sum(saliency[j] for j in thumbnail)
    for j in image.shown:
        if image.crop[j]:
            saliency[j] *= lies[image.crop[j]] / whole if whole else 0.0
        demand[j] = 1 / sum((image.crop[i] == 0) == (image.crop[j] == 0) for i in image.shown)
    return saliency, demand


def plain_facet(image: Plain, keep: int, worthy: float = 0.4, far: float = 0.15, **options: Any) -> list[int]:
    worth = plain_worth(image, options.get("views", "weighed") if options.get("cover", True) else "alike")
    kept = plain_worthy(image, worth, max(1, keep - round(far * keep)), **options)
    if worthy < 1:
        held = sorted((value**2 for value in worth.values()), reverse=True)
        kept = kept[: 1 + sum(sum(held[:n]) < worthy * sum(held) - 1e-9 for n in range(1, len(held) + 1))]
    missing = keep - (1 if worthy < 1 else len(kept))
    for size in block_sizes(missing, -(-options.get("blocks", 6) // 2) or missing) if missing else []:
        left = [j for j in image.shown if j not in kept]
        near = {j: max(cosine(image.features[i], image.features[j]) for i in kept) for j in left}
        some = sorted(left, key=lambda j: (near[j], j))[: 3 * size if size > 1 else 1]
        between = {
            token: max(
                [near[token]]
                + [0.0] * (size > 1)
                + [cosine(image.features[token], image.features[j]) for j in some[:place]]
            )
            for place, token in enumerate(some)
        }
        kept = kept + sorted(some, key=lambda j: between[j])[:size]
    kept = kept[:keep]
    rest = [j for j in range(image.count) if j not in image.shown and j not in kept]
    return sorted(kept + rest[: keep - len(kept)])


def plain_worth(image: Plain, views: str) -> dict[int, float]:
    saliency, _ = plain_views(image, views)
    text, salient = plain_relevance(image), scaled({j: math.sqrt(saliency[j]) for j in image.shown})
    return {j: math.sqrt((text[j] + 0.05) * (salient[j] + 0.05)) for j in image.shown}


def plain_worthy(
    image: Plain,
    worth: dict[int, float],
    keep: int,
    rounds: int = 3,
    cover: bool = True,
    blocks: int = 6,
    views: str = "weighed",
) -> list[int]:
    """As they are chosen, of what shows a patch."""
    _, demand = plain_views(image, views)

    def score(token: int, kept: list[int]) -> float:
        return worth[token] * (1 - max([0.0] + [cosine(image.features[token], image.features[j]) for j in kept]))

    def covers(kept: list[int], token: int) -> float:
        total = 0.0
        for j in image.shown:
            best = max([0.0] + [cosine(image.hidden[i], image.hidden[j]) for i in kept])
            total += demand[j] * max(0.0, cosine(image.hidden[token], image.hidden[j]) - best)
        return worth[token] ** 2 * total

    if cover and blocks:
        return plain_blocks(covers, image, keep, blocks)
    if cover:
        return in_order(covers, image, keep)
    if not rounds:
        return in_order(lambda kept, token: score(token, kept), image, keep)
    order = sorted(image.shown, key=lambda j: -worth[j])
    kept = order[:keep]
    for _ in range(rounds):
        scores = {j: score(j, [i for i in kept if order.index(i) < order.index(j)]) for j in order}
        kept = sorted(order, key=lambda j: -scores[j])[:keep]
    return kept


PLAIN: dict[str, Callable[..., list[int]]] = {
    "facet": plain_facet,
    "divprune": plain_divprune,
    "cdpruner": plain_cdpruner,
    "scope": plain_scope,
    "mmtok": plain_mmtok,
    "eadp": plain_eadp,
    "cenprune": plain_cenprune,
}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("facet", {}),
    ("facet", {"blocks": 1}),
    ("facet", {"blocks": 3, "views": "alike"}),
    ("facet", {"blocks": 0}),
    ("facet", {"cover": False}),
    ("facet", {"cover": False, "rounds": 1}),
    ("facet", {"cover": False, "rounds": 0}),
    ("facet", {"worthy": 1.0, "far": 0.0}),
    ("facet", {"worthy": 1.0, "far": 0.6}),
    ("facet", {"worthy": 0.2, "far": 0.0, "blocks": 0}),
    ("facet", {"worthy": 0.7, "far": 0.3, "blocks": 2, "views": "alike"}),
    ("facet", {"worthy": 1.0, "far": 0.0, "cover": False}),
    ("divprune", {}),
    ("cdpruner", {}),
    ("cdpruner", {"words": "mean", "sign": -1, "views": "together"}),
    ("scope", {}),
    ("scope", {"alpha": 0.5, "views": "together"}),
    ("mmtok", {}),
    ("mmtok", {"image_weight": 2.0}),
    ("eadp", {}),
    ("eadp", {"sharpest": 0.3, "mix": 0.2, "beta": 2.0, "sign": -1}),
    ("cenprune", {}),
    ("cenprune", {"scale": "sigmoid"}),
    ("cenprune", {"on": "cdpruner"}),
    ("cenprune", {"on": "cdpruner", "scale": "sigmoid", "words": "mean", "sign": -1}),
]
NAMED = pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda value: str(value))


def agree(name: str, options: dict[str, Any], tokens: VisualTokens, keep: int) -> None:
    kept = method_named(name, **options).select(tokens, keep)
    assert kept.weights is None
    for place, found in enumerate(kept.indices.tolist()):
        assert found == PLAIN[name](Plain(tokens, place), keep, **options), place


@NAMED
@pytest.mark.parametrize("keep", [1, 2, 5, 8])
def test_as_plain_loops(name: str, options: dict[str, Any], keep: int) -> None:
    agree(name, options, images(3, seed=keep), keep)


@NAMED
@pytest.mark.parametrize("crops", [1, 3])
def test_with_newlines_and_crops(name: str, options: dict[str, Any], crops: int) -> None:
    agree(name, options, images(2, crops, newlines=True, seed=crops), 6)


@pytest.mark.each
@pytest.mark.parametrize("options", [options for name, options in OPTIONS if name == "facet"], ids=str)
@pytest.mark.parametrize(("tiling", "newlines"), [((2, 2), True), ((1, 2), False), ((3, 1), False)])
def test_facet_with_a_thumbnail(options: dict[str, Any], tiling: tuple[int, int], newlines: bool) -> None:
    tokens = images(2, newlines=newlines, seed=3, tiling=tiling)
    for keep in (1, 9):
        agree("facet", options, tokens, keep)
    # Without some crops, and without the thumbnail.
    for shown in (tokens.source < 2 * ROWS * COLUMNS, tokens.source < ROWS * COLUMNS, tokens.source >= ROWS * COLUMNS):
        agree("facet", options, replace(tokens, candidates=tokens.candidates & shown), 5)


@NAMED
def test_once_the_patches_are_used_up(name: str, options: dict[str, Any]) -> None:
    """12 patches and 3 newlines; in more dimensions than there are tokens, so that no determinant is rounding alone."""
    tokens = images(2, newlines=True, size=20)
    for keep in (11, 12, 14):
        agree(name, options, tokens, keep)


@NAMED
def test_of_some_crops_alone(name: str, options: dict[str, Any]) -> None:
    """What the plan leaves out is like a newline."""
    tokens = images(2, 3, seed=9, size=30)
    tokens = replace(tokens, candidates=tokens.source < 2 * ROWS * COLUMNS)
    agree(name, options, tokens, 7)
    assert (method_named(name, **options).select(tokens, 7).indices < 2 * ROWS * COLUMNS).all()


@NAMED
def test_half_precision(name: str, options: dict[str, Any]) -> None:
    """Of rounded features, the choice of double precision."""
    agree(name, options, images(2, dtype=torch.bfloat16, seed=5), 5)


@NAMED
def test_batches_do_not_matter(name: str, options: dict[str, Any]) -> None:
    tokens = images(4, 2, newlines=True)
    method = method_named(name, **options)
    whole = method.select(tokens, 7).indices
    for order in ([3, 1, 0, 2], [2]):
        words = tokens.text
        some = replace(
            tokens,
            features=tokens.features[order],
            candidates=tokens.candidates[order],
            source=tokens.source[order],
            signals={signal: values[order] for signal, values in tokens.signals.items()},
            words=Words(words.embeddings[order], words.mask[order], words.ids[order]),
        )
        assert torch.equal(method.select(some, 7).indices, whole[order])


@NAMED
def test_no_gradient_comes_back(name: str, options: dict[str, Any]) -> None:
    tokens = images()
    tokens.features.requires_grad_()
    for values in tokens.signals.values():
        values.requires_grad_()
    kept = method_named(name, **options).select(tokens, 5)
    assert not kept.indices.is_floating_point()
    for told in (kept.text_attention, kept.objective, kept.certificate):
        assert told is None or not told.requires_grad


@NAMED
def test_tokens_that_are_all_the_same(name: str, options: dict[str, Any]) -> None:
    """Nothing tells them apart but their index, and nothing is NaN."""
    tokens = images(1)
    same = replace(
        tokens,
        features=torch.zeros(1, 12, 10).index_fill_(2, torch.tensor([3]), 2.0),
        signals={SALIENCY: torch.ones(1, 12), HIDDEN: torch.zeros(1, 12, 13).index_fill_(2, torch.tensor([3]), 1.0)},
    )
    kept = method_named(name, **options).select(same, 5).indices
    assert (kept.diff(dim=-1) > 0).all()
    if name != "eadp":  # its Gaussian is rounded differently over the grid
        assert kept.tolist() == [[0, 1, 2, 3, 4]]


@NAMED
def test_blank_tokens(name: str, options: dict[str, Any]) -> None:
    """All zeros, such as of padding."""
    tokens = images(1)
    blank = replace(tokens, features=tokens.features * 0, signals={s: v * 0 for s, v in tokens.signals.items()})
    kept = method_named(name, **options).select(blank, 5).indices
    assert (kept.diff(dim=-1) > 0).all()
    assert kept.min() >= 0


@NAMED
def test_what_a_device_runs(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait for it, few launches in a step, and no more than a few N x N numbers."""
    monkeypatch.setattr(greedy, "_lazily", greedy._eagerly)  # the shortcut of a CPU
    tokens = images(2, 20, newlines=True)
    made = []
    # A block of one token takes less than others do.
    for keep in (80, 84) if name == "facet" else (4, 8):
        with Watched() as watched:
            method_named(name, **options).select(tokens, keep)
        made.append(len(watched.made))
    each = options.get("views", "each") == "each" and name in ("scope", "cdpruner")
    serial = name != "facet" or 0 in (options.get("rounds"), options.get("blocks"))
    assert (made[1] - made[0]) / 4 <= STEP[options.get("on", name)] * serial + 10 * each
    pairs = 2 * tokens.source.shape[1] ** 2 * 4
    assert watched.living.peak <= 4.2 * pairs


def test_facet_in_rounds_takes_as_few_operations_as_adafv() -> None:
    """Scores and search, whatever K is."""
    tokens = images(2, 20, newlines=True)
    for keep in (4, 200):
        with Watched() as watched:
            method_named("facet", cover=False, worthy=1.0, far=0.0).select(tokens, keep)
        assert len(watched.made) <= MOST_OPERATIONS


@pytest.mark.parametrize("tiling", [None, (4, 5)])
def test_facet_takes_few_operations(tiling: tuple[int, int] | None) -> None:
    """Scores, what thumbnail and crops weigh, and both searches, whatever K is."""
    tokens = images(2, 21, newlines=True, tiling=tiling)
    for keep in (40, 200):
        for options, most in (({}, 190), ({"worthy": 1.0, "far": 0.0}, 128)):
            with Watched() as watched:
                method_named("facet", **options).select(tokens, keep)
            assert len(watched.made) <= most + (0 if tiling is None else 36)


def test_facet_keeps_little_at_a_time_of_a_long_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all cosines at once, and the same choice."""
    tokens = images(1, 80)
    monkeypatch.setattr(greedy, "_CELLS", 2**15)
    with Watched() as watched:
        few = method_named("facet").select(tokens, 100).indices
    assert watched.living.peak < 960**2 * 4 / 2
    monkeypatch.undo()
    assert torch.equal(few, method_named("facet").select(tokens, 100).indices)


@given(st.integers(1, 500), st.integers(1, 20))
def test_blocks_take_what_is_kept(keep: int, blocks: int) -> None:
    sizes = block_sizes(keep, blocks)
    assert (sum(sizes), len(sizes)) == (keep, min(keep, blocks))
    assert all(0 < size <= later for size, later in pairwise(sizes))


def test_facet_in_rounds_keeps_little_at_a_time() -> None:
    """Of a long video, 16,384 tokens, a quarter kept: 16 MiB of cosines, twice, beside a few copies of the tokens."""
    generator = torch.Generator().manual_seed(0)
    unit, worth = (
        unit_vectors(torch.randn(1, 16_384, 16, generator=generator)),
        torch.rand(1, 16_384, generator=generator),
    )
    shown = torch.ones_like(worth, dtype=torch.bool)
    with Watched() as watched:
        kept = facet_rounds(unit, worth, 4096, shown, 2)
    assert watched.living.peak < 64 * 2**20
    with Watched() as watched:
        with_the_farthest(unit, kept[:, :3500], torch.tensor([1000]), 1, 4096, shown, 3)
    assert watched.living.peak < 64 * 2**20


@pytest.mark.parametrize("worthy", [0.4, 1.0])
@pytest.mark.parametrize("what", ["features", SALIENCY, HIDDEN])
def test_facet_is_refused_where_numbers_are_nan(what: Any, worthy: float) -> None:
    """As from a tower that overflows. Nothing is chosen by what is left, without a word."""
    tokens = images(2, 4)
    values = (tokens.features if what == "features" else tokens.signals[what]).clone()
    values[0, 3] = float("nan")
    if what == "features":
        tokens = replace(tokens, features=values)
    else:
        tokens = replace(tokens, signals={**tokens.signals, what: values})
    method = method_named("facet", worthy=worthy)
    with pytest.raises(MethodError, match="distinct"):
        check_kept(method, tokens, 20, method.select(tokens, 20))


@pytest.mark.parametrize("worthy", [0.1, 0.4, 1.0])
def test_facet_keeps_the_same_beside_other_images(worthy: float) -> None:
    """However many tokens their worth lies in."""
    tokens = images(6, 4, newlines=True, tiling=None)
    method = method_named("facet", worthy=worthy)
    for keep in (5, 20, 50):
        together = method.select(tokens, keep).indices
        for image in range(6):
            alone = replace(
                tokens,
                **{name: getattr(tokens, name)[image : image + 1] for name in ("features", "candidates", "source")},
                signals={name: signal[image : image + 1] for name, signal in tokens.signals.items()},
                words=Words(
                    *(part[image : image + 1] for part in (tokens.text.embeddings, tokens.text.mask, tokens.text.ids))
                ),
            )
            assert torch.equal(method.select(alone, keep).indices[0], together[image])


def test_facet_chooses_for_worth_no_more_than_is_enough() -> None:
    """The smaller the share of the worth, the more is left to what is far; with all of it, and no share, nothing is."""
    tokens = images(4, 4)
    plain = method_named("facet", worthy=1.0, far=0.0).select(tokens, 30).indices
    shared = [
        len(
            set(plain[0].tolist())
            & set(method_named("facet", worthy=worthy, far=0.0).select(tokens, 30).indices[0].tolist())
        )
        for worthy in (0.05, 0.5, 0.999)
    ]
    assert shared[0] < shared[1] <= shared[2] == 30


@given(st.integers(0, 10**6), st.integers(1, 23), st.sampled_from([0, 1, 3]))
@examples(20)
def test_facet_does_not_depend_on_the_order_of_the_tokens(seed: int, keep: int, rounds: int) -> None:
    tokens = images(1, 2, seed=seed)
    unit = unit_vectors(tokens.features)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))

    def kept(unit: Tensor, worth: Tensor) -> Tensor:
        shown = torch.ones_like(worth, dtype=torch.bool)
        found = facet_rounds(unit, worth, keep, shown, rounds) if rounds else facet_steps(unit, worth, keep, shown)
        return found.sort(dim=-1).values

    worth = facets.worth(facets.two_scores(tokens, unit), tokens.candidates)
    moved = order[kept(unit[:, order], worth[:, order])].sort(dim=-1).values
    assert torch.equal(moved, kept(unit, worth))


STEP = {"facet": 12, "divprune": 5, "cenprune": 6, "cdpruner": 16, "scope": 7, "eadp": 6, "mmtok": 6}
"""Operations in a step that make something new."""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("facet", {"rounds": -1}),
        ("facet", {"rounds": True}),
        ("facet", {"cover": 1}),
        ("facet", {"blocks": -1}),
        ("facet", {"blocks": True}),
        ("facet", {"views": "each"}),
        ("facet", {"worthy": 0.0}),
        ("facet", {"worthy": 1.1}),
        ("facet", {"worthy": True}),
        ("facet", {"share": 0.0}),
        ("facet", {"far": 1.0}),
        ("facet", {"far": -0.1}),
        ("facet", {"far": True}),
        ("facet", {"far": float("nan")}),
        ("cdpruner", {"words": "worst"}),
        ("cdpruner", {"sign": 0}),
        ("cdpruner", {"views": "some"}),
        ("scope", {"alpha": -1.0}),
        ("scope", {"views": ""}),
        ("mmtok", {"words": "best"}),
        ("mmtok", {"image_weight": -0.1}),
        ("eadp", {"sharpest": 1.1}),
        ("eadp", {"mix": -0.1}),
        ("eadp", {"beta": float("nan")}),
        ("eadp", {"sign": 2}),
        ("cenprune", {"on": "scope"}),
        ("cenprune", {"scale": "rank"}),
    ],
)
def test_options_that_are_refused(name: str, options: dict[str, Any]) -> None:
    [(option, value)] = options.items()
    with pytest.raises(OptionError, match=f"{option}={value!r}"):
        method_named(name, **options)


def test_what_is_read() -> None:
    """By option, so that nothing is computed that is not looked at."""
    assert method_named("cenprune").needs == frozenset()
    assert method_named("cenprune", on="cdpruner").needs == {WORDS}
    assert method_named("mmtok").needs == {WORDS, HIDDEN}
    assert method_named("mmtok", words="content").needs == {WORDS, HIDDEN, STRINGS}


# ---------------------------------------------------------------------------------------------- words with content


def test_content_words() -> None:
    tokens = images(2)  # the first: "the red box ?", the second "the red box is ?"
    found = method_named("mmtok", words="content").select(tokens, 4).indices.tolist()
    assert found == [plain_mmtok(Plain(tokens, place), 4, counting=[1, 2]) for place in range(2)]
    assert found != [plain_mmtok(Plain(tokens, place), 4) for place in range(2)]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["\u2581What", "\u2581col", "or", "\u2581is", "\u2581the", "\u2581ban", "ana", "?"], [1, 2, 5, 6]),
        (["What", "\u0120bas", "is", "\u0120", "?"], [1, 2]),  # "is" ends a word here
        (["\u2581an", "ana", "s"], [0, 1, 2]),  # and "an" begins one
        (["\u2581is", "\u2581it", "?"], [0, 1, 2]),  # nothing else is asked
        ([], []),
    ],
)
def test_stop_words(pieces: list[str], expected: list[int]) -> None:
    mask = torch.arange(9).unsqueeze(0) < len(pieces)
    assert content_of([pieces], mask).nonzero()[:, 1].tolist() == expected


# ----------------------------------------------------------------------------------------------------- the searches


def drawn(seed: int, groups: int, count: int, width: int) -> Tensor:
    return unit_vectors(torch.randn(groups, count, width, generator=torch.Generator().manual_seed(seed)))


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


SEARCHES: dict[str, Callable[[Tensor, int, Tensor, Tensor | None], Greedy]] = {
    "distance": max_min_search,
    "determinant": determinantal_search,
    "coverage": lambda unit, keep, worth, candidates: coverage_search(
        self_cosines(unit), keep, worth, worth + 0.1, candidates
    ),
}


@examples(40)
@given(
    search=st.sampled_from(sorted(SEARCHES)),
    groups=st.integers(1, 3),
    count=st.integers(1, 30),
    width=st.integers(1, 12),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**20),
    masked=st.booleans(),
)
def test_what_every_search_returns(
    search: str, groups: int, count: int, width: int, share: float, seed: int, masked: bool
) -> None:
    """K above the rank included."""
    unit, worth = drawn(seed, groups, count, width), uniform(seed, groups, count)
    keep = max(1, round(share * count))
    candidates = uniform(seed + 1, groups, count) < 0.6 if masked else None
    found = SEARCHES[search](unit, keep, worth, candidates)
    assert found.indices.dtype == torch.long
    assert found.indices.shape == found.order.shape == found.gains.shape == (groups, keep)
    assert (found.indices.diff(dim=-1) > 0).all()
    assert ((found.indices >= 0) & (found.indices < count)).all()
    assert torch.equal(found.order.sort(-1).values, found.indices)
    assert found.gains.isfinite().all()
    assert (found.gains >= 0).all()
    if candidates is not None:
        taken = candidates.gather(1, found.order)
        assert torch.equal(taken.sum(1), candidates.sum(1).clamp_max(keep))
        assert (taken.int().diff(dim=-1) <= 0).all()  # candidates first
        for row, own in zip(found.order, taken, strict=True):
            rest = row[~own]
            assert (rest.diff() > 0).all()
    again = SEARCHES[search](unit.flip(0), keep, worth.flip(0), None if candidates is None else candidates.flip(0))
    assert torch.equal(again.order.flip(0), found.order)


@examples(30)
@given(count=st.integers(2, 20), width=st.integers(2, 8), seed=st.integers(0, 2**20))
def test_gains_are_what_is_gained(count: int, width: int, seed: int) -> None:
    unit, worth = drawn(seed, 1, count, width), uniform(seed, 1, count) + 0.1
    alike = (unit[0].double() @ unit[0].double().T).fill_diagonal_(1)
    keep = min(count, width)
    found = coverage_search(self_cosines(unit), keep, None, worth)
    covered = [(worth[0] * alike[found.order[0, : n + 1]].clamp_min(0).amax(0)).sum() for n in range(keep)]
    torch.testing.assert_close(found.gains[0].double().cumsum(0), torch.stack(covered).double(), atol=1e-4, rtol=1e-4)
    assert (found.gains.diff(dim=-1) <= 1e-6).all()  # submodular: gains fall
    distances = max_min_search(unit, keep)
    for step, token in enumerate(distances.order[0].tolist()):
        others = distances.order[0, :step].tolist() or [j for j in range(count) if j != token]
        assert float(distances.gains[0, step]) == pytest.approx(float(1 - alike[token, others].max()), abs=1e-5)
    assert (distances.gains[0, 1:].diff() <= 1e-6).all()
    points = determinantal_search(unit, keep, worth)
    kernel = worth[0].double() * alike * worth[0].double().unsqueeze(1) / float(worth.max()) ** 2
    own = points.order[0]
    sizes = [torch.linalg.det(kernel[own[:n]][:, own[:n]]) for n in range(1, keep + 1)]
    torch.testing.assert_close(points.gains[0].double().cumprod(0), torch.stack(sizes), atol=1e-5, rtol=1e-2)


@examples(30)
@given(
    groups=st.integers(1, 3),
    count=st.integers(1, 60),
    covered=st.integers(1, 40),
    parts=st.integers(1, 3),
    seed=st.integers(0, 2**20),
    whole=st.booleans(),
)
def test_lazy_is_greedy(groups: int, count: int, covered: int, parts: int, seed: int, whole: bool) -> None:
    """On a CPU few gains are computed: to the bit what computing all would choose, ties included."""
    likeness, quality = uniform(seed, groups, count, covered) - 0.2, uniform(seed + 1, groups, count)
    if whole:  # many ties
        likeness, quality = (likeness * 3).round(), (quality * 2).round()
    candidates = uniform(seed + 2, groups, count) < 0.8
    split = Parts((uniform(seed + 3, groups, count) * parts).long(), parts) if parts > 1 else None
    keep = max(1, count // 2)
    lazy = coverage_search(likeness, keep, quality, None, candidates, split)
    every = greedy._eagerly(likeness, keep, quality, greedy._Picks(quality, keep, candidates, split))
    assert torch.equal(lazy.order, every.order)
    assert torch.equal(lazy.gains, every.gains)


@pytest.mark.parametrize("search", SEARCHES)
def test_equal_gains_go_to_the_lower_index(search: str) -> None:
    """Unit vectors of integers, where no rounding decides: each direction four times, and one twice as worthy."""
    unit = torch.eye(4).repeat(4, 1).unsqueeze(0)
    worth = torch.ones(1, 16)
    worth[0, 14] = 2.0
    order = SEARCHES[search](unit, 6, worth, None).order[0].tolist()
    if search == "distance":  # a copy of each: all distances are 0 at first
        assert order == [0, 14, 1, 3, 2, 4]
    elif search == "determinant":
        assert order == [14, 0, 1, 3, 2, 4]
    else:
        assert order[:4] == [14, 0, 1, 3]


def test_behind_the_rank_quality_decides() -> None:
    unit = unit_vectors(torch.randn(1, 9, 2, generator=torch.Generator().manual_seed(0)))
    quality = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5]])
    found = determinantal_search(unit, 9, quality)
    rest = found.order[0, 2:].tolist()
    assert rest == sorted(rest, key=lambda token: -float(quality[0, token]))
    assert (found.gains[0, :2] > 0).all()
    assert (found.gains[0, 2:] == 0).all()


@pytest.mark.parametrize("search", ["distance", "determinant"])
def test_a_row_at_a_time(search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all cosines at once would take too much memory."""
    unit, worth = drawn(3, 2, 50, 30), uniform(3, 2, 50)
    candidates = uniform(4, 2, 50) < 0.8
    whole = SEARCHES[search](unit, 20, worth, candidates)
    monkeypatch.setattr(greedy, "_CELLS", 100)
    monkeypatch.setattr(greedy, "_BLOCK", 100)
    monkeypatch.setattr(greedy, "self_cosines", None)  # not called
    rows = SEARCHES[search](unit, 20, worth, candidates)
    assert torch.equal(rows.order, whole.order)


@pytest.mark.parametrize("name", ["scope", "eadp", "mmtok"])
def test_few_images_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = images(5, 2, newlines=True)
    whole = method_named(name).select(tokens, 7).indices
    seen = []
    count = greedy._Picks.__init__
    monkeypatch.setattr(greedy._Picks, "__init__", lambda *given: (seen.append(len(given[1])), count(*given))[1])
    monkeypatch.setattr(greedy, "_CELLS", 2 * tokens.source.shape[1] * (tokens.source.shape[1] + 8))
    assert torch.equal(method_named(name).select(tokens, 7).indices, whole)
    assert seen == [2, 2, 1]


def test_half_of_the_cosines() -> None:
    unit = drawn(0, 2, 1100, 20)
    found = self_cosines(unit)
    torch.testing.assert_close(found, unit @ unit.mT)
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("keep", [0, 5])
@pytest.mark.parametrize("search", SEARCHES)
def test_budgets_that_are_refused(search: str, keep: int) -> None:
    with pytest.raises(BudgetError, match=f"keep={keep}, but there are 4"):
        SEARCHES[search](drawn(0, 1, 4, 3), keep, uniform(0, 1, 4), None)


def test_rounds_of_facet_have_a_bound() -> None:
    with pytest.raises(OptionError, match="0 to 100"):
        Facet(rounds=101)
    assert Facet(rounds=100).rounds == 100
