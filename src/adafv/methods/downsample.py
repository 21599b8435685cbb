"""Image down-sampling: no pruning at all, the tower just sees a smaller image. Often hard to beat."""

import math
from dataclasses import dataclass

import torch

from adafv.core import ImageLayout
from adafv.core.tokens import Kept, Plan, VisualTokens
from adafv.errors import BudgetError
from adafv.methods.base import IMAGE, Method


@dataclass(frozen=True)
class Downsample(Method):
    """Scale the image down until it has at most K patches, in one crop; the tower's positions are interpolated.

    The largest grid of the image's own proportions that fits the budget is used, so fewer than K tokens may be kept
    (K = 58 of 24 x 24 gives 7 x 7 = 49). An image in several crops is seen through its thumbnail alone, so there the
    budget ends at one crop. Unlike all other methods this one saves the tower's time too.
    """

    name = "downsample"
    summary = "the image at lower resolution, in one crop"
    cost = "none; it saves the tower's time, too"
    stages = frozenset({IMAGE})

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        patches = layout.rows * layout.columns
        if keep > patches:
            raise BudgetError(
                f"keep={keep}: down-sampling shows the image in one crop, which has {patches} tokens; give at most that"
            )
        scale = math.sqrt(keep / patches)
        grid = max(1, math.floor(layout.rows * scale + 1e-9)), max(1, math.floor(layout.columns * scale + 1e-9))
        return Plan(math.prod(grid), grid=grid)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        assert tokens.grid is not None
        # Each token stands for the patches around the middle of its cell, in the first crop.
        rows, columns = (
            (torch.arange(count, device=tokens.source.device) * 2 + 1) * full // (2 * count)
            for count, full in zip(tokens.grid, (tokens.rows, tokens.columns), strict=True)
        )
        patches = (rows.unsqueeze(-1) * tokens.columns + columns).flatten()
        return Kept((tokens.source.unsqueeze(-2) == patches.unsqueeze(-1)).to(torch.int8).argmax(dim=-1))
