"""SparseVLM: words that look like the picture rate its tokens inside the language model (arXiv 2410.04417)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adafv.core import top_tokens
from adafv.core.cuts import BUDGETS, shrinking
from adafv.core.tokens import WORD_ATTENTION, WORDS, Cut, Kept, VisualTokens
from adafv.errors import MethodError, OptionError
from adafv.methods.base import LAYERS, Method
from adafv.methods.checks import check_choice
from adafv.methods.pyramiddrop import PyramidDrop

PUBLISHED_LAYERS, PUBLISHED_DEPTH = (3, 7, 16), 32
"""The first layers with fewer tokens in the published code (it drops behind layers 2, 6 and 15), of Vicuna-7B."""


@dataclass(frozen=True)
class SparseVLM(Method):
    """Keep the tokens that the raters attend to most: the words that resemble the picture more than the mean word does.

    Before the first layer each word gets r = mean over visual tokens v of softmax over words e of (v . e), of the
    embeddings that the language model reads; words with r above the mean are the raters. At each cut a visual token's
    rating is the attention that the raters pay it in the layer before, mean over heads and raters.

    Paper: SparseVLM, arXiv 2410.04417. Public code: Gumpest/SparseVLMs at 14cb5a9, of which nothing was copied. Where
    this departs:

    - No recycling: the paper merges some dropped tokens into a few that are added; here they are gone.
    - No rank: the paper takes the number that goes at a layer from the rank of the attention, the code from three lists
      (64, 128 and 192 of 576 tokens). Here K is free, and the same share goes at every cut.
    - The words are those that count (`text=` of `Pruner`), the question alone perhaps; the code takes all that stands
      behind the image: `text="after"`. Words in front of the image do not see it and rate nothing. Where none stands
      behind it, the last token rates at the same layers, as in PyramidDrop, and a warning says so.
    - Tokens keep the positions of the full prompt. Each image has a budget of its own. Newlines go first.

    Args:
        layers: the decoder layers from which on fewer tokens are seen, counted from 0, such as "3,7,16"; none: those of
            the published code, in proportion to the depth of the model.
        budget: what `keep` counts: "last", the tokens behind the last cut, or "mean", the tokens per layer in the mean
            over all layers, as papers quote it.
    """

    layers: str | None = None
    budget: str = "last"

    name = "sparsevlm"
    summary = "inside the language model: what words that resemble the picture look at"
    paper = "SparseVLM, arXiv 2410.04417"
    cost = "per cut: T rows of attention, keys of one layer, sort"
    needs = frozenset({WORDS, WORD_ATTENTION})
    stages = frozenset({LAYERS})

    def __post_init__(self) -> None:
        self._layers(None)
        check_choice("budget", self.budget, BUDGETS)

    def _layers(self, depth: int | None) -> list[int]:
        """Of the cuts, for a model of so many layers."""
        if self.layers is None:
            depth = PUBLISHED_DEPTH if depth is None else depth
            return sorted({max(1, round(layer * depth / PUBLISHED_DEPTH)) for layer in PUBLISHED_LAYERS})
        try:
            layers = [int(part) for part in self.layers.split(",")]
        except ValueError:
            layers = []
        if not layers or layers[0] < 1 or layers != sorted(set(layers)):
            raise OptionError(
                f"layers={self.layers!r}; give ascending numbers from 1 on, with commas, such as '3,7,16'"
            )
        return layers

    def cuts(self, depth: int, tokens: int, keep: int) -> Sequence[Cut]:
        layers = self._layers(depth)
        if layers[-1] >= depth:
            raise MethodError(
                f"the method sparsevlm drops tokens from layer {layers[-1]} on, but this language model has {depth} layers, "
                f"0 to {depth - 1}; give others with layers=, or another method"
            )
        counts = shrinking(depth, tokens, keep, layers, self.budget)
        return [Cut(layer, number, rated=layer - 1) for layer, number in zip(layers, counts, strict=True)]

    def without_text(self) -> Method:
        return _LastToken(of=self)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        assert tokens.read is not None
        rates = raters(tokens.read, tokens.text.embeddings, tokens.text.mask)
        attention = tokens.signals[WORD_ATTENTION]
        rating = (attention * rates.unsqueeze(1)).sum(-1) / rates.sum(-1, keepdim=True)
        return Kept(top_tokens(rating, keep, tokens.candidates))


@dataclass(frozen=True)
class _LastToken(PyramidDrop):
    """SparseVLM's cuts, rated by the last token of the prompt: what is left of it where no word counts."""

    of: SparseVLM = SparseVLM()

    def cuts(self, depth: int, tokens: int, keep: int) -> Sequence[Cut]:
        return self.of.cuts(depth, tokens, keep)


def raters(visual: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Which words rate.

    Args:
        visual: [G, N, D], what the language model reads of the picture.
        words: [G, T, D]; mask: [G, T] bool, False on padding.

    Returns:
        [G, T] bool, at least one per image: words whose share of the picture's similarity is above the mean, or all of them
        where none is (they are alike).
    """
    similarity = (visual.detach().float() @ words.detach().float().mT).masked_fill(~mask.unsqueeze(1), float("-inf"))
    share = similarity.softmax(-1).mean(1)
    above = (share > (share.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True))) & mask
    return torch.where(above.any(-1, keepdim=True), above, mask)
