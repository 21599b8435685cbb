"""AdaFV itself: the geometric mean of text attention and saliency (arXiv 2501.09532)."""

from dataclasses import dataclass

import torch

from adafv.core import (
    ImageLayout,
    frank_wolfe_search,
    joint_search,
    published_search,
    published_tokens,
    split_search,
    text_to_image_attention,
)
from adafv.errors import BudgetError, OptionError
from adafv.methods.base import Kept, Method, VisualTokens

SEARCHES = {"joint": joint_search, "split": split_search, "frank-wolfe": frank_wolfe_search}
VARIANTS = ("corrected", "published")


@dataclass(frozen=True)
class GeometricMean(Method):
    """Keep the tokens that maximise sqrt(sum of t * sum of s); see `adafv.core.selection`.

    Args:
        objective: "joint" (the best set that can be found, with certificate), "split" (the paper's search), or
            "frank-wolfe" (what "joint" was before, for comparison).
        variant: "corrected", or "published" for the published code to the letter, bugs included; `objective` does not
            apply to the latter.
    """

    objective: str = "joint"
    variant: str = "corrected"

    name = "adafv"
    summary = "geometric mean of text attention and saliency (AdaFV, arXiv 2501.09532)"
    needs_text = True
    needs_saliency = True

    def __post_init__(self) -> None:
        if self.objective not in SEARCHES:
            raise OptionError(f"objective={self.objective!r}; known are: {', '.join(SEARCHES)}")
        if self.variant not in VARIANTS:
            raise OptionError(f"variant={self.variant!r}; known are: {', '.join(VARIANTS)}")

    @property
    def published_layout(self) -> bool:  # type: ignore[override]
        return self.variant == "published"

    def budget(self, keep: int, layout: ImageLayout) -> int:
        crops = layout.crops
        if self.variant == "corrected":
            return keep
        if keep < 2 * crops:
            raise BudgetError(
                f"keep={keep} leaves nothing in the published variant, which rounds down to a multiple of two tokens "
                f"per crop; this image has {crops} crop(s): give keep={2 * crops} or more"
            )
        return published_tokens(keep, crops)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        assert tokens.text is not None
        assert tokens.saliency is not None
        features = tokens.features.detach()
        text_attention = text_to_image_attention(tokens.text, features, tokens.text_mask, tokens.shows_patch)
        if self.variant == "published":
            crop_by_crop = tokens.source.argsort(dim=-1)
            saliency = tokens.saliency.gather(-1, crop_by_crop).unflatten(-1, (tokens.crops, -1))
            indices = published_search(text_attention, saliency, keep)
            once = torch.zeros_like(text_attention).scatter(-1, indices, 1.0)
            objective = ((once * text_attention).sum(-1) * (once * tokens.saliency).sum(-1)).sqrt()
            return Kept(indices, text_attention=text_attention, objective=objective)
        found = SEARCHES[self.objective](text_attention, tokens.saliency, keep, tokens.shows_patch)
        return Kept(
            found.indices,
            text_attention=text_attention,
            objective=found.objective,
            certificate=found.certificate,
        )
