"""VisPruner: what the tower looks at, and of the rest what is least like the rest."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adafv.core import top_tokens
from adafv.core.likeness import cosines, unit_vectors
from adafv.core.merging import in_turn, marks_of, rows_at
from adafv.core.tokens import HIDDEN, SALIENCY, Kept, VisualTokens
from adafv.errors import OptionError
from adafv.methods.base import Method
from adafv.methods.checks import check_budget_share

_SHRINKS = 0.75
"""Share of the cosines' rows below which they are copied without those that are not needed any more."""


@dataclass(frozen=True)
class VisPruner(Method):
    """Keep important tokens, and diverse ones among the others: duplicates go, until the number is reached.

    Paper: arXiv 2412.01818v2; public code: Theia-4869/VisPruner, llava/model/llava_arch.py (known by what others quote of
    it). The important tokens are those that [CLS] attends to most. The others stand in a list by falling attention. In
    each round every other member of it is compared with those between them; the `step` with the largest cosine similarity
    to any of these go, and what stays of them moves to the front, the most similar first.

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
        check_budget_share("important", self.important)
        if self.step < 1:
            raise OptionError(f"step={self.step}; give 1 or more duplicates to drop in a round")

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        important = math.floor(self.important * keep)
        if important == keep:
            return Kept(top_tokens(tokens.saliency, keep, tokens.candidates))
        scores = tokens.saliency.masked_fill(~tokens.candidates, float("-inf"))
        order = scores.argsort(dim=-1, descending=True, stable=True)
        left = (tokens.candidates.sum(-1, keepdim=True) - important).clamp_min(0)  # [G, 1], candidates in the list
        unit = unit_vectors(tokens.signals[HIDDEN].detach())
        likeness = cosines(unit, unit).masked_fill(~tokens.candidates.unsqueeze(-1), -2.0)
        diverse = self._without_duplicates(likeness, order[:, important:], left, keep - important)
        kept = marks_of(torch.cat((order[:, :important], diverse), dim=-1), scores.shape[-1])
        return Kept(top_tokens(kept.float(), keep, tokens.candidates))

    def _without_duplicates(self, likeness: Tensor, listed: Tensor, left: Tensor, keep: int) -> Tensor:
        """[G, keep] of the list [G, R], of which the first `left` ([G, 1]) are candidates."""
        slots = listed  # where the cosines of the tokens in the list are
        while listed.shape[-1] > keep:  # as often for every image: with fewer candidates there is nothing left to drop
            length = listed.shape[-1]
            if length < _SHRINKS * likeness.shape[-1]:
                rows = rows_at(likeness, slots)
                likeness = rows.gather(-1, slots.unsqueeze(-2).expand(-1, length, -1))
                slots = torch.arange(length, device=listed.device).expand_as(listed)
            place = torch.arange(length, device=listed.device)
            valid = place < left
            # Rows of the second half: whole rows are read faster than every other cell of the first's.
            alike = _rows(likeness, slots[:, 1::2]).amax(-2).gather(-1, slots[:, ::2])
            alike = alike.masked_fill(~valid[:, ::2], -3.0)
            drops = torch.minimum((left - keep).clamp(0, self.step), valid[:, ::2].sum(-1, keepdim=True))
            by_likeness = alike.argsort(dim=-1, descending=True, stable=True) * 2
            order = torch.cat((by_likeness, place[1::2].expand(len(listed), -1)), dim=-1)
            dropped = (order % 2 == 0) & (place < drops)
            stays = valid.gather(-1, order) & ~dropped
            order = order.gather(-1, in_turn(stays, ~dropped)[:, : max(length - self.step, keep, length // 2)])
            listed, slots = listed.gather(-1, order), slots.gather(-1, order)
            left = left - drops
        return listed


def _rows(matrices: Tensor, indices: Tensor) -> Tensor:
    """Whole rows of [G, R, R] at [G, K]: [G, K, R]."""
    start = torch.arange(len(matrices), device=indices.device).unsqueeze(-1) * matrices.shape[1]
    return matrices.flatten(0, 1).index_select(0, (start + indices).flatten()).unflatten(0, indices.shape)
