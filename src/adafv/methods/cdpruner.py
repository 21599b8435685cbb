"""Diversity under the question: a determinantal point process whose quality is the relevance to the text."""

from dataclasses import dataclass

from torch import Tensor

from adafv.core.greedy import Parts, determinantal_search
from adafv.core.likeness import best_word_cosines, cosines, crop_of, masked_mean, min_max, unit_vectors
from adafv.core.tokens import WORDS, Kept, VisualTokens
from adafv.methods.base import Method
from adafv.methods.checks import check_choice, check_sign

WORD_CHOICES = ("best", "mean")
VIEW_CHOICES = ("each", "together")


@dataclass(frozen=True)
class CDPruner(Method):
    """Keep the set with the largest determinant of r_i * cos(v_i, v_j) * r_j, greedily; r: relevance to the text, 0 to 1.

    Paper: CDPruner, arXiv 2506.10967. Public code: Theia-4869/CDPruner, ed9c12d. Departures: there r is minus the cosine
    to the text as CLIP's text tower embeds it, a tower that stock models do not have, and the mean over texts. Here it is
    the cosine of projected tokens to words as the language model embeds them, its sign is plus (`sign`), and the best word
    counts (`words`). The 1e-6 of min-max stands in its denominator, too. Newline tokens are no candidates, and once the
    kept tokens span all others, the most relevant follow. Each crop of an image has a search of its own, as there, but
    its share of K, where there it has the whole K.

    Args:
        words: "best": the largest cosine to any word; "mean": the mean over words.
        sign: 1, or -1 as published: tokens that are unlike the text are relevant.
        views: "each": the crops of an image share K alike and do not see each other; "together": one search over all.
    """

    words: str = "best"
    sign: int = 1
    views: str = "each"

    name = "cdpruner"
    summary = "relevant to the text and unlike each other: determinantal point process"
    paper = "CDPruner, arXiv 2506.10967"
    cost = "N x N, K steps, K^2 x N"
    needs = frozenset({WORDS})

    def __post_init__(self) -> None:
        check_choice("words", self.words, WORD_CHOICES)
        check_sign(self.sign)
        check_choice("views", self.views, VIEW_CHOICES)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        unit = unit_vectors(tokens.features.detach())
        quality = relevance(tokens, unit, self.words, self.sign)
        parts = parts_of(tokens, self.views)
        return Kept(determinantal_search(unit, keep, quality, tokens.candidates, parts).indices)


def relevance(tokens: VisualTokens, unit: Tensor, words: str, sign: int) -> Tensor:
    """[G, N] float32, 0 to 1: min-max over the candidates of the cosine to the best word, or of the mean over words.

    Args:
        unit: [G, N, D], the features at length one.
    """
    text, mask = tokens.text.embeddings, tokens.text.mask
    if words == "mean":
        return min_max(masked_mean(sign * cosines(unit_vectors(text), unit), mask), tokens.candidates)
    return min_max(best_word_cosines(sign * text, mask, unit), tokens.candidates)


def parts_of(tokens: VisualTokens, views: str) -> Parts | None:
    """The crops as parts of the image; None where all are searched together."""
    if views == "together" or tokens.crops == 1:
        return None
    return Parts(crop_of(tokens.source, tokens.rows * tokens.columns), tokens.crops)
