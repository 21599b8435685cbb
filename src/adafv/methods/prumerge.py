"""PruMerge and PruMerge+: outliers of the attention of [CLS], each with what its key resembles."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adafv.core import ImageLayout, top_tokens
from adafv.core.likeness import cosines, unit_vectors
from adafv.core.merging import (
    evenly,
    in_turn,
    indices_of,
    marks_of,
    outliers,
    rows_at,
    with_the_rest,
)
from adafv.core.tokens import KEYS, SALIENCY, Kept, Plan, VisualTokens
from adafv.errors import OptionError
from adafv.methods.base import Mixing


@dataclass(frozen=True)
class PruMerge(Mixing):
    """Keep the outliers of the attention of [CLS], add to each what its key resembles, and one token for all the rest.

    Paper: arXiv 2403.15388; public code: 42Shawn/LLaVA-PruMerge, llava/model/multimodal_encoder/clip_encoder.py (read at
    1ca8b2b). How many tokens stay is counted per image: outliers are those above Q3 + 1.5 (Q3 - Q1). To each, its
    `neighbours` nearest tokens by the cosine of keys are added (kept ones among them), weighted by their attention. One
    more token is the sum of all that were not kept, weighted in the same way; it stands in the place of the last of them.

    Departures: the budget bounds the count, from which the token for the rest is taken where there is more than one;
    without an outlier the most attended token stays. Attention and keys are those of the layer that the projector reads,
    of all heads by themselves, where the public code reads the last layer with all heads as one: layers behind the one
    that is read are not run. Newlines are never mixed, and are kept once all else is. Towers without [CLS] give the
    attention received.

    Args:
        neighbours: how many tokens are added to each that is kept; 32 in the public code.
        fill: whether exactly the budget is kept, by falling attention, rather than as many as there are outliers.
        before_projector: whether they are mixed before the projector, as in the paper, or behind it.
    """

    neighbours: int = 32
    fill: bool = False
    before_projector: bool = True

    name = "prumerge"
    summary = "outliers of the attention of [CLS], with their neighbours"
    paper = "LLaVA-PruMerge, arXiv 2403.15388"
    cost = "sort, N x K sorted"
    needs = frozenset({SALIENCY, KEYS})

    def __post_init__(self) -> None:
        if self.neighbours < 0:
            raise OptionError(f"neighbours={self.neighbours}; give 0 or more")

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        return Plan(keep if self.fill else None)

    def count(self, tokens: VisualTokens, keep: int) -> Tensor:
        return (self.wanted(tokens) + 1).clamp(1, keep)

    def wanted(self, tokens: VisualTokens) -> Tensor:
        """[G] long, how many tokens stay besides the one for the rest."""
        return outliers(tokens.saliency, tokens.candidates).clamp_min(1)

    def kept(self, tokens: VisualTokens, keep: int) -> Tensor:
        """[G, N] bool, which tokens stay besides the one for the rest."""
        return marks_of(top_tokens(tokens.saliency, keep, tokens.candidates), tokens.source.shape[1])

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        saliency = tokens.saliency.float().masked_fill(~tokens.candidates, 0.0)
        kept = self.kept(tokens, max(1, keep - 1))
        indices = indices_of(kept, max(1, keep - 1))
        weights = self._with_neighbours(tokens, saliency, indices)
        if keep > 1:
            indices, weights = with_the_rest(indices, weights, kept, tokens.candidates, saliency)
        return Kept(indices, weights)

    def _with_neighbours(self, tokens: VisualTokens, saliency: Tensor, indices: Tensor) -> Tensor:
        """[G, K, N]: 1 at the token itself, its attention at each of its neighbours."""
        count = saliency.shape[-1]
        own = torch.nn.functional.one_hot(indices, count).float()
        neighbours = min(self.neighbours, count - 1)
        if not neighbours:
            return own
        keys = unit_vectors(tokens.signals[KEYS].detach().flatten(2))
        likeness = cosines(rows_at(keys, indices), keys)
        aside = (own > 0) | ~tokens.candidates.unsqueeze(-2) | ~tokens.candidates.gather(-1, indices).unsqueeze(-1)
        likeness = likeness.masked_fill(aside, float("-inf"))
        nearest = likeness.argsort(dim=-1, descending=True, stable=True)[..., :neighbours]
        near = torch.zeros_like(own).scatter(-1, nearest, 1.0).masked_fill(aside, 0.0)
        return own + near * saliency.unsqueeze(-2)


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """`PruMerge` with tokens from an even spread over the image besides the outliers.

    Paper and public code as for PruMerge. In the public code, of N tokens with n outliers every (N / n / 3)-th one
    (rounded down) is kept, too: about three for each outlier.

    Departures: as PruMerge. So many tokens are kept, but spaced evenly over what is no outlier, so that any number can be
    asked for: outliers have the first claim on the budget.

    Args:
        neighbours: how many tokens are added to each that is kept; 32 in the public code.
        fill: whether exactly the budget is kept rather than as many as the outliers ask for.
        before_projector: whether they are mixed before the projector, as in the paper, or behind it.
    """

    name = "prumerge-plus"
    summary = "outliers of the attention of [CLS] and an even spread, with their neighbours"

    def wanted(self, tokens: VisualTokens) -> Tensor:
        found = super().wanted(tokens)
        shown = tokens.candidates.sum(-1)
        step = (shown // found.clamp_min(1) // 3).clamp_min(1)
        place = tokens.candidates.cumsum(-1) - 1
        spread = tokens.candidates & (place % step.unsqueeze(-1) == 0)
        return found + (spread & ~self._outliers(tokens, found)).sum(-1)

    def kept(self, tokens: VisualTokens, keep: int) -> Tensor:
        found = super().wanted(tokens).clamp(max=keep)
        first = self._outliers(tokens, found)
        rest = tokens.candidates & ~first
        wanted = (keep - first.sum(-1, keepdim=True)).clamp_min(0)
        return first | evenly(in_turn(rest, ~first), rest.sum(-1, keepdim=True), wanted, keep)

    def _outliers(self, tokens: VisualTokens, found: Tensor) -> Tensor:
        """[G, N] bool, so many ([G]) tokens with the most attention."""
        scores = tokens.saliency.masked_fill(~tokens.candidates, float("-inf"))
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return tokens.candidates & (rank < found.unsqueeze(-1))
