"""PyramidDrop: fewer tokens from stage to stage of the language model (arXiv 2410.17247)."""

from collections.abc import Sequence
from dataclasses import dataclass

from adafv.core import top_tokens
from adafv.core.cuts import BUDGETS, shrinking
from adafv.core.tokens import LAST_ATTENTION, Cut, Kept, VisualTokens
from adafv.errors import MethodError, OptionError
from adafv.methods.base import LAYERS, Method
from adafv.methods.checks import check_choice


@dataclass(frozen=True)
class PyramidDrop(Method):
    """Split the decoder layers into stages; between two of them drop what the prompt's last token attends to least.

    The rating between two stages is the attention that the first layer of the next one would pay: its own norm and
    projections, the query of the last token, the keys of all. The same share goes between any two stages.

    Paper: PyramidDrop, arXiv 2410.17247. Public code: Cooperx521/PyramidDrop at 3f89f94, of which nothing was copied.
    Where this departs:

    - The paper fixes the share that stays from stage to stage (a half); here `keep` fixes what is left, and the share
      follows. An eighth, `keep=0.125`, with four stages is the paper's setting. Numbers are rounded, there cut off.
    - Tokens keep the positions of the full prompt; the code counts positions anew after every stage.
    - Training with it is refused; the paper trains, too.
    - Each image has a budget of its own. Newlines, which show no part of the picture, go first.

    Args:
        parts: into how many stages the layers are split, as evenly as they can be, 2 or more. A model with fewer layers
            has as many stages as layers.
        budget: what `keep` counts: "last", the tokens of the last stage, or "mean", the tokens per layer in the mean
            over all layers, as papers quote it.
    """

    parts: int = 4
    budget: str = "last"

    name = "pyramiddrop"
    summary = "inside the language model: fewer from stage to stage, by what the last token looks at"
    paper = "PyramidDrop, arXiv 2410.17247"
    cost = "per stage: one row of attention, keys of one layer, sort"
    needs = frozenset({LAST_ATTENTION})
    stages = frozenset({LAYERS})

    def __post_init__(self) -> None:
        if self.parts < 2:
            raise OptionError(f"parts={self.parts}; give 2 or more: tokens are dropped between stages")
        check_choice("budget", self.budget, BUDGETS)

    def cuts(self, depth: int, tokens: int, keep: int) -> Sequence[Cut]:
        if depth < 2:
            raise MethodError("the method pyramiddrop needs a language model of two layers or more; use another method")
        count = min(self.parts, depth)
        layers = [max(1, (2 * stage * depth + count) // (2 * count)) for stage in range(1, count)]
        counts = shrinking(depth, tokens, keep, layers, self.budget)
        return [Cut(layer, number, rated=layer) for layer, number in zip(layers, counts, strict=True)]

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        return Kept(top_tokens(tokens.signals[LAST_ATTENTION], keep, tokens.candidates))
