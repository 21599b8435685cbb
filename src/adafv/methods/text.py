"""Text-to-image attention alone: what is striking is not looked at."""

from dataclasses import dataclass

from adafv.core import text_to_image_attention, top_tokens
from adafv.core.tokens import WORDS, Kept, VisualTokens
from adafv.methods.base import Method


@dataclass(frozen=True)
class Text(Method):
    """Keep the tokens that some word of the text is most similar to (ablation of arXiv 2501.09532)."""

    name = "text"
    summary = "the tokens that some word is most similar to"
    paper = "ablation of AdaFV, arXiv 2501.09532"
    cost = "sort"
    needs = frozenset({WORDS})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        words, features = tokens.text, tokens.features.detach()
        attention = text_to_image_attention(words.embeddings, features, words.mask, tokens.candidates)
        return Kept(top_tokens(attention, keep, tokens.candidates), text_attention=attention)
