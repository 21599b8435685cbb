"""AdaFV itself: the geometric mean of text attention and saliency (arXiv 2501.09532)."""

from dataclasses import dataclass

from adafv.core import ImageLayout, frank_wolfe_search, joint_search, split_search, text_to_image_attention
from adafv.core.stages import stage
from adafv.core.tokens import SALIENCY, WORDS, Kept, Plan, VisualTokens
from adafv.errors import OptionError
from adafv.methods import published
from adafv.methods.base import Method

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
    summary = "the largest geometric mean of text attention and saliency"
    paper = "AdaFV, arXiv 2501.09532"
    cost = "sort"
    needs = frozenset({WORDS, SALIENCY})

    def __post_init__(self) -> None:
        if self.objective not in SEARCHES:
            raise OptionError(f"objective={self.objective!r}; known are: {', '.join(SEARCHES)}")
        if self.variant not in VARIANTS:
            raise OptionError(f"variant={self.variant!r}; known are: {', '.join(VARIANTS)}")

    @property
    def may_repeat(self) -> bool:  # type: ignore[override]
        return self.variant == "published"

    @property
    def scope(self) -> str | None:  # type: ignore[override]
        return "after" if self.variant == "published" else None

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        return published.plan(layout, keep) if self.variant == "published" else Plan(keep)

    def without_text(self) -> Method:
        return self if self.variant == "published" else super().without_text()  # the published code has no other way

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        words = tokens.text
        with stage("scores"):
            text_attention = text_to_image_attention(
                words.embeddings, tokens.features.detach(), words.mask, tokens.candidates
            )
        if self.variant == "published":
            return published.select(tokens, text_attention, keep)
        found = SEARCHES[self.objective](text_attention, tokens.saliency, keep, tokens.candidates)
        return Kept(
            found.indices,
            text_attention=text_attention,
            objective=found.objective,
            certificate=found.certificate,
        )
