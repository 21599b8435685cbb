"""What the question asks for and the tower finds striking, each thing once, until that is enough; then what is unlike it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.facets import facet_rounds, facet_steps, fewest, of_views, two_scores, with_the_farthest, worth
from adafv.core.greedy import few_at_a_time
from adafv.core.likeness import unit_vectors
from adafv.core.tokens import HIDDEN, SALIENCY, WORDS, Kept, Plan, VisualTokens
from adafv.errors import OptionError
from adafv.methods.base import Method
from adafv.methods.checks import check_choice
from adafv.methods.scope import covering

VIEW_CHOICES = ("weighed", "alike")
MOST_ROUNDS = 100
"""A slip of the finger is not to run for hours; a few rounds are enough."""
LEAST = 1 / 36
"""Share of an image's tokens that stay at least where they are counted."""


@dataclass(frozen=True)
class Facet(Method):
    """Keep, several at a time, the tokens with the largest worth^2 * sum_j demand_j * max(0, cos(j, i) - best_j).

    Worth is the geometric mean of a token's likeness to its best word and the square root of its saliency: AdaFV's two scores
    and its mean, taken token by token. best_j is the largest cosine of token j to a kept one, at first 0, of the tower's
    output: what adds to the coverage of all others counts, as in SCOPE. A token's demand is 1; thumbnail and crops of an
    image weigh as much as each other, see `adafv.core.facets.of_views`. docs/facet.md says how it was chosen.

    That is enough once the tokens of most worth hold two fifths of the image's worth squared. What is left of the budget goes
    to what is least like any token that is kept, see `adafv.core.facets.with_the_farthest`.

    Ours; no paper. It was chosen among the candidates of `benchmarks.candidates` on one half of the data and confirmed on the
    other: docs/evidence.md has both.

    Args:
        cover: false: keep the tokens with the largest worth * (1 - largest cosine to a kept token of more worth) instead,
            of the projected tokens, without N x N cosines. See `adafv.core.facets`.
        blocks: with `cover`, steps of N x N, each of which takes several tokens; with and without it half as many steps for
            those that are least like any that is kept. 0: one token each.
        views: with `cover`, "weighed", or "alike": every token counts as much, wherever it is from.
        rounds: without `cover`, how often all tokens are judged anew, see `facet_rounds`; 0: one token after the other, K
            serial steps.
        share: below 1: as few tokens as hold this share of the image's worth squared, at least 1 of 36, and no more than the
            budget says. How many that are in the mean depends on the model and on the pictures.
        worthy: no more tokens are chosen for their worth than hold this share of the image's worth squared; the rest of the
            budget goes to those that are least like any that is kept, as DivPrune chooses, of the projected tokens. In an
            image whose worth lies in few tokens, these show what was asked about, and whatever else counts is elsewhere. 1:
            all are chosen for their worth.
        far: share of the budget, below 1, that goes to those at least: for what neither words nor [CLS] point at and that
            looks like nothing else, as letters do.
    """

    rounds: int = 3
    cover: bool = True
    blocks: int = 6
    views: str = "weighed"
    share: float = 1.0
    worthy: float = 0.4
    far: float = 0.15

    name = "facet"
    summary = "relevant to the text and striking, each thing once, until that is enough; then what is unlike it"
    paper = "adafv, docs/facet.md"
    cost = "N x N, a few times"
    needs = frozenset({WORDS, SALIENCY, HIDDEN})

    def __post_init__(self) -> None:
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or not 0 <= self.rounds <= MOST_ROUNDS:
            raise OptionError(f"rounds={self.rounds!r}; give a whole number, 0 to {MOST_ROUNDS}")
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int) or self.blocks < 0:
            raise OptionError(f"blocks={self.blocks!r}; give a whole number, 0 or more")
        check_choice("views", self.views, VIEW_CHOICES)
        if not isinstance(self.cover, bool):
            raise OptionError(f"cover={self.cover!r}; give true or false")
        for option, enough in (("share", "keeps as many as the budget says"), ("worthy", "is for worth alone")):
            given = getattr(self, option)
            if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given <= 1:
                raise OptionError(f"{option}={given!r}; give a number above 0, up to 1, which {enough}")
        if isinstance(self.far, bool) or not isinstance(self.far, (int, float)) or not 0 <= self.far < 1:
            raise OptionError(f"far={self.far!r}; give a number from 0, below 1: 0.25 for a quarter of the budget")
        if not self.cover:
            object.__setattr__(self, "needs", frozenset({WORDS, SALIENCY}))

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        return Plan(keep if self.share == 1 else None)

    def count(self, tokens: VisualTokens, keep: int) -> Tensor:
        unit = unit_vectors(tokens.features.detach())
        if self.cover and self.views == "weighed":
            tokens, _ = of_views(tokens)
        value = worth(two_scores(tokens, unit), tokens.candidates)
        least = min(keep, max(1, round(LEAST * value.shape[-1])))
        return fewest(value, self.share, tokens.candidates).clamp(least, keep)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        unit, shown, demand = unit_vectors(tokens.features.detach()), tokens.candidates, None
        if self.cover and self.views == "weighed":
            tokens, demand = of_views(tokens)
        scores = two_scores(tokens, unit).detach()
        value = worth(scores, shown)
        most = max(1, keep - round(self.far * keep))
        if self.cover:
            chosen = covering(tokens, most, value.square(), demand=demand, blocks=self.blocks)
        elif self.rounds:
            chosen = facet_rounds(unit, value, most, shown, self.rounds)
        else:
            chosen = facet_steps(unit, value, most, shown)
        if most == keep and (self.worthy == 1 or keep == 1):
            return Kept(chosen.sort(dim=-1).values, text_attention=scores[0])
        if self.worthy == 1:
            enough, least = torch.full_like(chosen[:, 0], most), most
        else:
            enough, least = fewest(value, self.worthy, shown).clamp_max(most), 1
        steps = (self.blocks + 1) // 2

        def search(some: slice) -> Tensor:
            return with_the_farthest(unit[some], chosen[some], enough[some], least, keep, shown[some], steps)

        return Kept(few_at_a_time(len(shown), shown.shape[1] ** 2, search), text_attention=scores[0])
