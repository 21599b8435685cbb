"""Text-to-image attention alone: what is striking is not looked at."""

from dataclasses import dataclass

from adafv.core import text_to_image_attention, top_tokens
from adafv.methods.base import Kept, Method, VisualTokens


@dataclass(frozen=True)
class Text(Method):
    """Keep the tokens that some word of the text is most similar to (ablation of arXiv 2501.09532)."""

    name = "text"
    summary = "text-to-image attention alone (ablation of AdaFV, arXiv 2501.09532)"
    needs_text = True

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        assert tokens.text is not None
        features = tokens.features.detach()
        attention = text_to_image_attention(tokens.text, features, tokens.text_mask, tokens.shows_patch)
        return Kept(top_tokens(attention, keep, tokens.shows_patch), text_attention=attention)
