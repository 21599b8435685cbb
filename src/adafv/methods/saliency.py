"""Visual saliency alone: the question is not looked at."""

from dataclasses import dataclass

from adafv.core import top_tokens
from adafv.methods.base import Kept, Method, VisualTokens


@dataclass(frozen=True)
class Saliency(Method):
    """Keep the tokens that [CLS] attends to most; the selection of FasterVLM (arXiv 2412.01818)."""

    name = "saliency"
    summary = "attention of [CLS] alone (as FasterVLM, arXiv 2412.01818)"
    needs_saliency = True

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        assert tokens.saliency is not None
        return Kept(top_tokens(tokens.saliency, keep, tokens.shows_patch))
