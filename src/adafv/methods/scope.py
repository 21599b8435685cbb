"""Saliency times coverage: what is striking, as long as it is unlike what is kept."""

from dataclasses import dataclass

from torch import Tensor

from adafv.core.greedy import Parts, coverage_in_blocks, coverage_search, few_at_a_time
from adafv.core.likeness import self_cosines, unit_vectors
from adafv.core.tokens import HIDDEN, SALIENCY, Kept, VisualTokens
from adafv.errors import OptionError
from adafv.methods.base import Method
from adafv.methods.cdpruner import VIEW_CHOICES, parts_of
from adafv.methods.checks import check_choice


@dataclass(frozen=True)
class Scope(Method):
    """Keep, one after the other, the token u with the largest saliency^alpha * sum_j max(0, cos(j, u) - best_j).

    best_j is the largest cosine of token j to a kept one, at first 0; cosines of the tower's output. The question is not
    looked at.

    Paper: SCOPE, arXiv 2510.24214. Public code: kinredon/SCOPE, a01b98f (scope/clip_encoder.py). Departures: float32;
    saliency is the mean over heads, not the sum, which changes nothing; for towers without [CLS] it is that of
    `adafv.core.received`; tokens made of several patches have their mean. The crops of an image share K exactly.

    Args:
        alpha: power of the saliency; 0: coverage alone.
        views: "each": the crops of an image share K alike and do not see each other, as published; "together": one search
            over all.
    """

    alpha: float = 1.0
    views: str = "each"

    name = "scope"
    summary = "saliency times what a token adds to the coverage of all others"
    paper = "SCOPE, arXiv 2510.24214"
    cost = "N x N, K steps of up to N x N"
    needs = frozenset({SALIENCY, HIDDEN})

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise OptionError(f"alpha={self.alpha!r}; give 0 or more")
        check_choice("views", self.views, VIEW_CHOICES)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        quality = tokens.saliency.detach().float() ** self.alpha
        return Kept(covering(tokens, keep, quality, parts_of(tokens, self.views)).sort(dim=-1).values)


def covering(
    tokens: VisualTokens,
    keep: int,
    quality: Tensor,
    parts: Parts | None = None,
    demand: Tensor | None = None,
    blocks: int = 0,
) -> Tensor:
    """[G, K] long, as they are chosen: the token u with the largest quality_u * sum_j demand_j * max(0, cos(j, u) - best_j).

    One after the other. Cosines are those of the tower's output.

    Args:
        quality: [G, N], not negative.
        parts: they do not see each other; None: one search over all.
        demand: [G, N], not negative; None: 1 for every candidate.
        blocks: steps that take several tokens each, see `coverage_in_blocks`, not with parts; 0: one token a step.
    """
    shown = tokens.candidates
    demand = shown.float() if demand is None else demand

    def search(some: slice) -> Tensor:
        unit = unit_vectors(tokens.signals[HIDDEN][some].detach())
        given = (quality[some], demand[some], shown[some])
        if blocks:
            return coverage_in_blocks(unit, keep, blocks, *given)
        alike = self_cosines(unit)
        part = None
        if parts is not None:
            part = Parts(parts.of[some], parts.number)
            alike.masked_fill_(part.of.unsqueeze(1) != part.of.unsqueeze(2), 0.0)
        return coverage_search(alike, keep, *given, part).order

    return few_at_a_time(len(shown), shown.shape[1] ** 2, search)
