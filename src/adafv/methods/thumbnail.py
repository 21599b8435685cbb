"""The thumbnail alone: of an image in crops, what was seen of it at low resolution."""

from dataclasses import dataclass

from adafv.core import ImageLayout, top_tokens
from adafv.core.tokens import SALIENCY, Kept, Plan, VisualTokens
from adafv.errors import MethodError
from adafv.methods.base import Method


@dataclass(frozen=True)
class Thumbnail(Method):
    """Keep tokens of the thumbnail alone, those that [CLS] attends to most: what the other crops are worth is measured by it.

    A baseline. An image of one crop is its own thumbnail: there it is `saliency`. The budget ends at the tokens of the
    thumbnail. The tower still sees every crop; the option `crops="thumbnail"` spares it that, with any method.
    """

    name = "thumbnail"
    summary = "attention of [CLS], in the thumbnail alone"
    cost = "sort"
    needs = frozenset({SALIENCY})

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        if layout.tiling is None and layout.crops > 1:
            raise MethodError(
                f"the method {self.name} needs an image with a thumbnail, and nothing says that the first of these "
                f"{layout.crops} crops (or frames) is one; use another method"
            )
        return Plan(keep, crops=(0,))

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        return Kept(top_tokens(tokens.saliency, keep, tokens.candidates))
