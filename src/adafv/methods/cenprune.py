"""Distances between tokens once what all share is taken off, weighted by how unlike the others each is."""

from dataclasses import dataclass

from torch import Tensor

from adafv.core.greedy import determinantal_search, max_min_search
from adafv.core.likeness import masked_mean, min_max, unit_vectors
from adafv.core.tokens import WORDS, Kept, VisualTokens
from adafv.methods.base import Method
from adafv.methods.cdpruner import WORD_CHOICES, relevance
from adafv.methods.checks import check_choice, check_sign

BASES = ("divprune", "cdpruner")
SCALES = ("min-max", "sigmoid")


@dataclass(frozen=True)
class CenPrune(Method):
    """DivPrune or CDPruner with two changes: cosines of tokens less the image's mean token, and distinctiveness g.

    g_i is minus the mean cosine of token i to the others as they are, brought to 0 to 1. On "divprune" the token with the
    largest g_i * distance follows; on "cdpruner" the quality is r_i * g_i.

    Paper: Cen-Prune, arXiv 2608.30263; no public code was found. Our reading: tokens are the projected ones, the first
    token of "divprune" is chosen by g_i * distance, too, and the mean token and the search are those of all crops of an
    image together. r is that of `cdpruner` with its departures. Newline tokens are no candidates and not in the mean.

    Args:
        on: "divprune" (reads no question) or "cdpruner".
        scale: how g comes to 0 to 1: "min-max", or "sigmoid" of its standard score, as published for Qwen.
        words: of "cdpruner": "best" or "mean".
        sign: of "cdpruner": 1 or -1.
    """

    on: str = "divprune"
    scale: str = "min-max"
    words: str = "best"
    sign: int = 1

    name = "cenprune"
    summary = "DivPrune or CDPruner on centred tokens, times how unlike the others a token is"
    paper = "Cen-Prune, arXiv 2608.30263"
    cost = "N x N, K steps"

    def __post_init__(self) -> None:
        check_choice("on", self.on, BASES)
        check_choice("scale", self.scale, SCALES)
        check_choice("words", self.words, WORD_CHOICES)
        check_sign(self.sign)
        if self.on == "cdpruner":
            object.__setattr__(self, "needs", frozenset({WORDS}))

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        features, shown = tokens.features.detach().float(), tokens.candidates
        unit = unit_vectors(features)
        centred = unit_vectors(features - masked_mean(features, shown).unsqueeze(1))
        distinct = distinctiveness(unit, shown, self.scale)
        if self.on == "divprune":
            return Kept(max_min_search(centred, keep, distinct, shown).indices)
        quality = distinct * relevance(tokens, unit, self.words, self.sign)
        return Kept(determinantal_search(centred, keep, quality, shown).indices)


def distinctiveness(unit: Tensor, candidates: Tensor, scale: str) -> Tensor:
    """[G, N], 0 to 1: how small the mean cosine of a token ([G, N, D] of length one) to the other candidates is."""
    others = candidates.sum(-1, keepdim=True)
    mean = masked_mean(unit, candidates).unsqueeze(-1) * others.unsqueeze(-1)
    own = unit.square().sum(-1)
    unlike = (own - (unit @ mean).squeeze(-1)) / (others - 1).clamp_min(1)
    if scale == "min-max":
        return min_max(unlike, candidates)
    middle = masked_mean(unlike.unsqueeze(-1), candidates)
    spread = masked_mean((unlike - middle).square().unsqueeze(-1), candidates).sqrt().clamp_min(1e-12)
    return ((unlike - middle) / spread).sigmoid().masked_fill(~candidates, 0.0)
