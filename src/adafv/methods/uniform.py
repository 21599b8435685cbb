"""An even spread over the image: the baseline that knows nothing but geometry."""

from dataclasses import dataclass

import torch

from adafv.core.tokens import Kept, VisualTokens
from adafv.methods.base import Method


@dataclass(frozen=True)
class Uniform(Method):
    """Keep every (N / K)-th token of the raster scan, the first half a step in.

    K equal intervals of the scan, one token from the middle of each. Exact for every K; where K tokens form a grid, as
    even as a grid along the rows.
    """

    name = "uniform"
    summary = "an even spread over the raster scan"
    cost = "none"

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        patches_first = (~tokens.candidates).to(torch.int8).argsort(dim=-1, stable=True)
        patches = tokens.candidates.sum(dim=-1, keepdim=True).clamp_min(1)
        step = torch.arange(keep, device=patches.device)
        # Every K-th interval of the patches; tokens without a patch only once the patches are used up.
        place = torch.where(patches >= keep, (step * 2 + 1) * patches // (2 * keep), step)
        return Kept(patches_first.gather(-1, place).sort(dim=-1).values)
