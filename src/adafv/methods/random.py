"""A random subset: the baseline that every method must beat, and that not every method does."""

from dataclasses import dataclass

import torch

from adafv.core import top_tokens
from adafv.core.tokens import Kept, VisualTokens
from adafv.methods.base import Method


@dataclass(frozen=True)
class Random(Method):
    """Keep tokens drawn without replacement.

    The draw depends on `seed` and on N alone, never on torch's global generator: the same image keeps the same tokens
    wherever it stands in a batch, and sampling in the language model is undisturbed.

    Args:
        seed: of the draw.
    """

    seed: int = 0

    name = "random"
    summary = "a random subset, the same for every image of one size"
    cost = "sort"

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(tokens.features.shape[1], generator=generator).to(tokens.features.device)
        return Kept(top_tokens(scores.expand(tokens.features.shape[:2]), keep, tokens.candidates))
