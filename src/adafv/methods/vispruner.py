"""VisPruner: what the tower looks at, and of the rest what is least like the rest."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adafv.core import top_tokens
from adafv.core.merging import cosines, in_turn, marks_of
from adafv.core.tokens import HIDDEN, SALIENCY, Kept, VisualTokens
from adafv.errors import OptionError
from adafv.methods.base import Method


@dataclass(frozen=True)
class VisPruner(Method):
    """Keep important tokens, and diverse ones among the others: duplicates go, until the number is reached.

    Paper: arXiv 2412.01818v2; public code: Theia-4869/VisPruner, llava/model/llava_arch.py. The important tokens are those
    that [CLS] attends to most. The others stand in a list by falling attention. In each round every other member of it is
    compared with those between them; the `step` with the largest cosine similarity to any of these go, and what stays of
    them moves to the front, the most similar first.

    Departures: equal values are resolved by the order of the list. Newlines take no part, and are kept once all else is.
    Towers without [CLS] give the attention received. Images in crops have one budget over all crops.

    Args:
        important: share of the budget for important tokens, rounded down.
        step: duplicates that go in one round.
    """

    important: float = 0.5
    step: int = 8

    name = "vispruner"
    summary = "attention of [CLS], and what is not a duplicate"
    paper = "VisPruner, arXiv 2412.01818"
    cost = "N x N, (N - K) / 8 rounds"
    needs = frozenset({SALIENCY, HIDDEN})

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise OptionError(f"important={self.important}; give a share of the budget, 0 to 1")
        if self.step < 1:
            raise OptionError(f"step={self.step}; give 1 or more duplicates to drop in a round")

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        important = math.floor(self.important * keep)
        if important == keep:
            return Kept(top_tokens(tokens.saliency, keep, tokens.candidates))
        scores = tokens.saliency.masked_fill(~tokens.candidates, float("-inf"))
        order = scores.argsort(dim=-1, descending=True, stable=True)
        left = (tokens.candidates.sum(-1, keepdim=True) - important).clamp_min(0)  # [G, 1], candidates in the list
        diverse = self._without_duplicates(
            cosines(tokens.signals[HIDDEN]), order[:, important:], left, keep - important
        )
        kept = marks_of(torch.cat((order[:, :important], diverse), dim=-1), scores.shape[-1])
        return Kept(top_tokens(kept.float(), keep, tokens.candidates))

    def _without_duplicates(self, likeness: Tensor, listed: Tensor, left: Tensor, keep: int) -> Tensor:
        """[G, keep] of the list [G, R], of which the first `left` ([G, 1]) are candidates."""
        everything = likeness.flatten()
        tokens = likeness.shape[-1]
        image = torch.arange(len(likeness), device=likeness.device).view(-1, 1, 1) * tokens
        while listed.shape[-1] > keep:  # as often for every image: with fewer candidates there is nothing left to drop
            place = torch.arange(listed.shape[-1], device=listed.device)
            valid = place < left
            first, second = listed[:, ::2], listed[:, 1::2]
            cells = (image + first.unsqueeze(-1)) * tokens + second.unsqueeze(-2)
            alike = everything[cells].masked_fill(~valid[:, 1::2].unsqueeze(-2), -2.0).amax(-1)
            alike = alike.masked_fill(~valid[:, ::2], -3.0)
            drops = torch.minimum((left - keep).clamp(0, self.step), valid[:, ::2].sum(-1, keepdim=True))
            by_likeness = alike.argsort(dim=-1, descending=True, stable=True)
            stays = valid[:, ::2].gather(-1, by_likeness) & (place[: first.shape[-1]] >= drops)
            moved = torch.cat((first.gather(-1, by_likeness), second), dim=-1)
            dropped = torch.cat((place[: first.shape[-1]] < drops, torch.zeros_like(valid[:, 1::2])), dim=-1)
            stays = torch.cat((stays, valid[:, 1::2]), dim=-1)
            length = max(listed.shape[-1] - self.step, keep, listed.shape[-1] // 2)
            listed = moved.gather(-1, in_turn(stays, ~dropped)[:, :length])
            left = left - drops
        return listed
