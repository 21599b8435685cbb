"""Worth times novelty: what the question asks for and the tower finds striking, each thing once."""

from dataclasses import dataclass

from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.facets import facet_rounds, facet_steps, fewest, worth
from adafv.core.likeness import unit_vectors
from adafv.core.tokens import HIDDEN, SALIENCY, WORDS, Kept, Plan, VisualTokens
from adafv.errors import OptionError
from adafv.methods.base import Method
from adafv.methods.scope import covering

MOST_ROUNDS = 100
"""A slip of the finger is not to run for hours; a few rounds are enough."""
LEAST = 1 / 36
"""Share of an image's tokens that stay at least where they are counted."""


@dataclass(frozen=True)
class Facet(Method):
    """Keep the tokens with the largest worth * (1 - largest cosine to a kept token of more worth).

    Worth is the geometric mean of a token's likeness to its best word and the square root of its saliency: AdaFV's two scores
    and its mean, taken token by token. See `adafv.core.facets` for the formulas and docs/facet.md for how it was chosen.

    Ours; no paper. It was chosen among the candidates of `benchmarks.candidates` on one half of the data and confirmed on the
    other: docs/evidence.md has both. All crops of an image are searched together, so an enlargement is kept beside the
    thumbnail's token only where it looks different.

    Args:
        rounds: how often all tokens are judged anew, see `facet_rounds`; 0: one token after the other, K serial steps.
        cover: keep, one after the other, the token with the largest worth^2 * sum_j max(0, cos(j, i) - best_j) instead, where
            best_j is the largest cosine of j to a kept token, at first 0, of the tower's output. That is SCOPE's search with
            both scores in place of saliency alone: K steps of N x N. `rounds` does not apply.
        share: below 1: as few tokens as hold this share of the image's worth squared, at least 1 of 36, and no more than the
            budget says. How many that are in the mean depends on the model and on the pictures.
    """

    rounds: int = 3
    cover: bool = False
    share: float = 1.0

    name = "facet"
    summary = "relevant to the text and striking, times how unlike what is kept"
    paper = "adafv, docs/facet.md"
    cost = "N x K, a few rounds"
    needs = frozenset({WORDS, SALIENCY})

    def __post_init__(self) -> None:
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or not 0 <= self.rounds <= MOST_ROUNDS:
            raise OptionError(f"rounds={self.rounds!r}; give a whole number, 0 to {MOST_ROUNDS}")
        if not isinstance(self.cover, bool):
            raise OptionError(f"cover={self.cover!r}; give true or false")
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise OptionError(
                f"share={self.share!r}; give a number above 0, up to 1, which keeps as many as the budget says"
            )
        if self.cover:
            object.__setattr__(self, "needs", frozenset({WORDS, SALIENCY, HIDDEN}))

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        return Plan(keep if self.share == 1 else None)

    def count(self, tokens: VisualTokens, keep: int) -> Tensor:
        value = worth(tokens, unit_vectors(tokens.features.detach()))
        least = min(keep, max(1, round(LEAST * value.shape[-1])))
        return fewest(value, self.share, tokens.candidates).clamp(least, keep)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        unit = unit_vectors(tokens.features.detach())
        value = worth(tokens, unit)
        if self.cover:
            return covering(tokens, keep, value.square())
        if self.rounds:
            return Kept(facet_rounds(unit, value, keep, tokens.candidates, self.rounds))
        return Kept(facet_steps(unit, value, keep, tokens.candidates))
