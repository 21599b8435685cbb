"""Methods of every kind that the contract knows, and the same written as plain loops over one image at a time.

The methods are written as a third party would write them: batched, on the device. The loops share nothing with them but
the definition of what is chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from adafv.core import ImageLayout, top_tokens
from adafv.core.tokens import KEYS, WORDS, Kept, Plan, Signal, VisualTokens, hidden_of
from adafv.methods import Method

FIRST_HIDDEN = hidden_of(1)


def far(tokens: VisualTokens) -> Tensor:
    """[G, N], the distance from the mean token."""
    features = tokens.features.detach().float()
    return (features - features.mean(1, keepdim=True)).norm(dim=-1)


@dataclass(frozen=True)
class Far(Method):
    """Selects: the tokens that are farthest from the mean."""

    name = "far"
    summary = "distance from the mean token"

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        return Kept(top_tokens(far(tokens), keep, tokens.candidates))


@dataclass(frozen=True)
class Merging(Method):
    """Merges: every token that is dropped goes to the kept one that it resembles most, which becomes the mean."""

    name = "merging"
    summary = "means of what is alike"

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        kept = top_tokens(far(tokens), keep, tokens.candidates)
        features = normalize(tokens.features.detach().float(), dim=-1)
        stay = features.gather(1, kept.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
        nearest = (features @ stay.transpose(1, 2)).argmax(-1)
        own = one_hot(kept, features.shape[1]).float()
        dropped = tokens.candidates & (own.sum(1) == 0)
        belongs = one_hot(nearest, keep).transpose(1, 2) * dropped.unsqueeze(1) + own
        return Kept(kept, belongs / belongs.sum(-1, keepdim=True))


@dataclass(frozen=True)
class Rounding(Method):
    """Rounds: as many tokens of every crop as the budget leaves, so that fewer than K may stay."""

    name = "rounding"
    summary = "as many tokens of every crop"

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        return Plan(keep // layout.crops * layout.crops or keep)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        score, crop = far(tokens), tokens.source.div(tokens.rows * tokens.columns, rounding_mode="floor")
        better = (score.unsqueeze(1) > score.unsqueeze(2)) & (crop.unsqueeze(1) == crop.unsqueeze(2))
        ahead = (better & tokens.candidates.unsqueeze(1)).sum(-1)
        first = ahead < keep // tokens.crops
        return Kept(top_tokens(score.where(~first, score + 1e4), keep, tokens.candidates))


@dataclass(frozen=True)
class Counting(Method):
    """Counts after the scores: what is farther from the mean than the mean distance stays."""

    name = "counting"
    summary = "what is farther than most"

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        return Plan(None)

    def count(self, tokens: VisualTokens, keep: int) -> Tensor:
        score = far(tokens)
        return (score > 1.1 * score.mean(1, keepdim=True)).sum(1).clamp(1, keep)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        return Kept(top_tokens(far(tokens), keep, tokens.candidates))


@dataclass(frozen=True)
class FirstCrop(Method):
    """Looks at some crops alone: the first, which is the thumbnail of an image in crops, or the first frame."""

    name = "first-crop"
    summary = "the first crop alone"

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        return Plan(min(keep, int(layout.of_crops((0,)).sum())), crops=(0,))

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        return Kept(top_tokens(far(tokens), keep, tokens.candidates))


@dataclass(frozen=True)
class Looking(Method):
    """Needs keys, hidden states of another layer, and words."""

    name = "looking"
    summary = "keys, hidden states and words"
    needs = frozenset({KEYS, FIRST_HIDDEN, WORDS})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        keys = tokens.signals[KEYS].float().mean(2).norm(dim=-1)
        hidden = tokens.signals[FIRST_HIDDEN].float().norm(dim=-1)
        mask = tokens.text.mask.unsqueeze(-1)
        words = (tokens.text.embeddings.float() * mask).sum(1) / mask.sum(1)
        likeness = (normalize(tokens.features.detach().float(), dim=-1) * normalize(words, dim=-1).unsqueeze(1)).sum(-1)
        return Kept(top_tokens(keys * hidden * (2 + likeness), keep, tokens.candidates))


METHODS: dict[str, Method] = {
    method.name: method for method in (Far(), Merging(), Rounding(), Counting(), FirstCrop(), Looking())
}


@dataclass
class OneImage:
    """What a plain loop sees of an image."""

    features: Tensor
    """[N, D]."""
    layout: ImageLayout
    budget: int
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    words: Tensor | None = None
    """[T, D]."""

    @property
    def distances(self) -> list[float]:
        mean = self.features.float().mean(0)
        return [float((row.float() - mean).norm()) for row in self.features]

    @property
    def shown(self) -> list[int]:
        """The tokens that show a patch."""
        return [token for token, source in enumerate(self.layout.source.tolist()) if source >= 0]

    def crop(self, token: int) -> int:
        return int(self.layout.source[token]) // (self.layout.rows * self.layout.columns)


def best(scores: list[float], among: list[int], keep: int) -> list[int]:
    """The tokens with the largest scores; those outside `among` once these are used up."""
    first = sorted(among, key=lambda token: -scores[token])
    rest = sorted(set(range(len(scores))) - set(among), key=lambda token: -scores[token])
    return sorted((first + rest)[:keep])


Choice = tuple[list[int], list[list[int]]]
"""Kept tokens, and for each the tokens that it is the mean of."""


def as_they_are(tokens: list[int]) -> Choice:
    return tokens, [[token] for token in tokens]


def plain_far(image: OneImage) -> Choice:
    return as_they_are(best(image.distances, image.shown, image.budget))


def plain_merging(image: OneImage) -> Choice:
    kept = best(image.distances, image.shown, image.budget)
    members = [[token] for token in kept]
    for token in image.shown:
        if token not in kept:
            likeness = [
                float(torch.cosine_similarity(image.features[token].float(), image.features[other].float(), dim=0))
                for other in kept
            ]
            members[likeness.index(max(likeness))].append(token)
    return kept, members


def plain_rounding(image: OneImage) -> Choice:
    each = image.budget // image.layout.crops
    keep, chosen = each * image.layout.crops or image.budget, []
    for crop in range(image.layout.crops):
        own = [token for token in image.shown if image.crop(token) == crop]
        chosen += sorted(own, key=lambda token: -image.distances[token])[:each]
    rest = [token for token in image.shown if token not in chosen]
    missing = best(image.distances, rest, keep - len(chosen)) if keep > len(chosen) else []
    return as_they_are(sorted(chosen + missing))


def plain_counting(image: OneImage) -> Choice:
    limit = 1.1 * sum(image.distances) / len(image.distances)
    count = max(1, min(image.budget, sum(distance > limit for distance in image.distances)))
    return as_they_are(best(image.distances, image.shown, count))


def plain_first_crop(image: OneImage) -> Choice:
    own = [token for token in image.shown if image.crop(token) == 0]
    return as_they_are(best(image.distances, own, min(image.budget, len(own))))


def plain_looking(image: OneImage) -> Choice:
    assert image.words is not None
    word = image.words.float().mean(0)
    scores = []
    for token in range(len(image.features)):
        key, hidden = image.signals[KEYS][token].float().mean(0), image.signals[FIRST_HIDDEN][token].float()
        likeness = torch.cosine_similarity(image.features[token].float(), word, dim=0)
        scores.append(float(key.norm() * hidden.norm() * (2 + likeness)))
    return as_they_are(best(scores, image.shown, image.budget))


PLAIN: dict[str, Callable[[OneImage], Choice]] = {
    "far": plain_far,
    "merging": plain_merging,
    "rounding": plain_rounding,
    "counting": plain_counting,
    "first-crop": plain_first_crop,
    "looking": plain_looking,
}


def mixed(values: Tensor, members: list[list[int]]) -> Tensor:
    """[K, ...]: the means of these tokens of [N, ...]."""
    return torch.stack([values[tokens].float().mean(0).to(values.dtype) for tokens in members])
