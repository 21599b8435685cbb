"""Worth times novelty: what the question asks for and the tower finds striking, each thing once."""

from dataclasses import dataclass

from adafv.core.facets import facet_rounds, facet_steps, of_views, worth
from adafv.core.likeness import unit_vectors
from adafv.core.tokens import HIDDEN, SALIENCY, WORDS, Kept, VisualTokens
from adafv.errors import OptionError
from adafv.methods.base import Method
from adafv.methods.checks import check_choice
from adafv.methods.scope import covering

CROP_CHOICES = ("weighed", "alike")
MOST_ROUNDS = 100
"""A slip of the finger is not to run for hours; a few rounds are enough."""


@dataclass(frozen=True)
class Facet(Method):
    """Keep the tokens with the largest worth * (1 - largest cosine to a kept token of more worth).

    Worth is the geometric mean of a token's likeness to its best word and the square root of its saliency: AdaFV's two scores
    and its mean, taken token by token. See `adafv.core.facets` for the formulas and docs/facet.md for how it was chosen.

    Ours; no paper. It was chosen among the candidates of `benchmarks.candidates` on one half of the data and confirmed on the
    other: docs/evidence.md has both. Thumbnail and crops of an image are searched together.

    Args:
        rounds: how often all tokens are judged anew, see `facet_rounds`; 0: one token after the other, K serial steps.
        cover: keep, one after the other, the token with the largest worth^2 * sum_j max(0, cos(j, i) - best_j) instead, where
            best_j is the largest cosine of j to a kept token, at first 0, of the tower's output. That is SCOPE's search with
            both scores in place of saliency alone. Thumbnail and crops count as much as each other, see
            `adafv.core.facets.of_views`. `rounds` does not apply.
        blocks: with `cover`, steps of N x N, each of which takes several tokens; 0: K steps, one token each.
        crops: with `cover`, "weighed", or "alike": every token counts as much, wherever it is from.
    """

    rounds: int = 3
    cover: bool = False
    blocks: int = 0
    crops: str = "weighed"

    name = "facet"
    summary = "relevant to the text and striking, times how unlike what is kept"
    paper = "adafv, docs/facet.md"
    cost = "N x K, a few rounds"
    needs = frozenset({WORDS, SALIENCY})

    def __post_init__(self) -> None:
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or not 0 <= self.rounds <= MOST_ROUNDS:
            raise OptionError(f"rounds={self.rounds!r}; give a whole number, 0 to {MOST_ROUNDS}")
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int) or self.blocks < 0:
            raise OptionError(f"blocks={self.blocks!r}; give a whole number, 0 or more")
        check_choice("crops", self.crops, CROP_CHOICES)
        if not isinstance(self.cover, bool):
            raise OptionError(f"cover={self.cover!r}; give true or false")
        if self.cover:
            object.__setattr__(self, "needs", frozenset({WORDS, SALIENCY, HIDDEN}))

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        unit = unit_vectors(tokens.features.detach())
        if self.cover:
            demand = None
            if self.crops == "weighed":
                tokens, demand = of_views(tokens)
            return covering(tokens, keep, worth(tokens, unit).square(), demand=demand, blocks=self.blocks)
        value = worth(tokens, unit)
        if self.rounds:
            return Kept(facet_rounds(unit, value, keep, tokens.candidates, self.rounds))
        return Kept(facet_steps(unit, value, keep, tokens.candidates))
