"""Diversity alone: tokens that are far from each other."""

from dataclasses import dataclass

from adafv.core.greedy import max_min_search
from adafv.core.likeness import unit_vectors
from adafv.core.tokens import Kept, VisualTokens
from adafv.methods.base import Method


@dataclass(frozen=True)
class DivPrune(Method):
    """Keep tokens whose smallest distance to each other is large, greedily; distance = 1 - cosine of projected tokens.

    The first is the token whose nearest neighbour is farthest, each further one that whose nearest kept token is.

    Paper: DivPrune, arXiv 2503.02175. Public code: vbdi/divprune, known here by copies of its selection in other
    repositories (SJTU-DeepVisionLab/EADP, 46a6fdb). Departures: cosines in float32; newline tokens are no candidates; a
    token is never chosen twice; indices ascend. Of an image in crops, the tokens of all crops are chosen from together.
    """

    name = "divprune"
    summary = "far from each other: greedy largest smallest distance"
    paper = "DivPrune, arXiv 2503.02175"
    cost = "N x N, K steps"

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        return Kept(max_min_search(unit_vectors(tokens.features.detach()), keep, candidates=tokens.candidates).indices)
