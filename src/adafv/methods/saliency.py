"""Visual saliency alone: the question is not looked at."""

from dataclasses import dataclass

from adafv.core import top_tokens
from adafv.core.tokens import SALIENCY, Kept, VisualTokens
from adafv.methods.base import Method


@dataclass(frozen=True)
class Saliency(Method):
    """Keep the tokens that [CLS] attends to most; the selection of FasterVLM (arXiv 2412.01818)."""

    name = "saliency"
    summary = "the tokens that [CLS] attends to most"
    paper = "FasterVLM, arXiv 2412.01818"
    cost = "sort"
    needs = frozenset({SALIENCY})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        return Kept(top_tokens(tokens.saliency, keep, tokens.candidates))
