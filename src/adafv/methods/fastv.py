"""FastV: what the last token of the prompt looks at after two layers (arXiv 2403.06764)."""

from collections.abc import Sequence
from dataclasses import dataclass

from adafv.core import top_tokens
from adafv.core.cuts import BUDGETS, shrinking
from adafv.core.tokens import LAST_ATTENTION, Cut, Kept, VisualTokens
from adafv.errors import MethodError, OptionError
from adafv.methods.base import LAYERS, Method
from adafv.methods.checks import check_choice


@dataclass(frozen=True)
class FastV(Method):
    """Keep, from one decoder layer on, the tokens that the prompt's last token attends to most in the layer before.

    Paper: FastV, arXiv 2403.06764. Public code: pkunlp-icler/FastV at 717a293, of which nothing was copied. Where this
    departs:

    - The paper's formula is the mean attention from all tokens, its code that from the last one. This is the code's.
    - The paper says what share of the tokens goes; `keep` says how many stay, as for all methods. Half of them and
      `layer=2` is the paper's main setting.
    - Each image has a budget of its own; the code knows one image.
    - Newlines between rows of a picture, which show none of it, go first; in the code they compete.

    Args:
        layer: the first decoder layer, counted from 0, that sees fewer tokens; the attention is that of the one before.
        budget: what `keep` counts: "last", the tokens from that layer on, or "mean", the tokens per layer in the mean
            over all layers, as papers quote it.
    """

    layer: int = 2
    budget: str = "last"

    name = "fastv"
    summary = "inside the language model: what the last token looks at after two layers"
    paper = "FastV, arXiv 2403.06764"
    cost = "one row of attention, sort"
    needs = frozenset({LAST_ATTENTION})
    stages = frozenset({LAYERS})

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise OptionError(f"layer={self.layer}; give 1 or more: the attention is that of the layer before")
        check_choice("budget", self.budget, BUDGETS)

    def cuts(self, depth: int, tokens: int, keep: int) -> Sequence[Cut]:
        if self.layer >= depth:
            raise MethodError(
                f"the method fastv drops tokens from layer {self.layer} on, but this language model has {depth} layers, 0 to "
                f"{depth - 1}; give layer=1" + (f" to {depth - 1}" if depth > 2 else "")
            )
        [count] = shrinking(depth, tokens, keep, [self.layer], self.budget)
        return [Cut(self.layer, count, rated=self.layer - 1)]

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        return Kept(top_tokens(tokens.signals[LAST_ATTENTION], keep, tokens.candidates))
