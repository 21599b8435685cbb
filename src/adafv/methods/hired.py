"""HiRED: the thumbnail says how much each crop may keep."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adafv.core import top_tokens
from adafv.core.likeness import crop_of, crop_under
from adafv.core.tokens import SALIENCY, Kept, VisualTokens, saliency_of
from adafv.methods.base import Method
from adafv.methods.checks import check_budget_share

EARLY = saliency_of(1)
_ALMOST = 1e-6
"""What a product with a share may miss a whole number by, in rounding."""


@dataclass(frozen=True)
class HiRED(Method):
    """Share the budget among thumbnail and crops by the content of the image, and keep in each what [CLS] attends to most.

    Paper: arXiv 2408.10945 (AAAI 2025); public code: hasanar1f/HiRED, modeling_llava_next.py (read at 42be984). The
    thumbnail gets the share `alpha` of the budget. Of its patches, the share 1 - `alpha` that [CLS] attends to most in
    the first layer count as content; every other crop gets as much of the rest of the budget as there is content where it
    lies. Within a crop the tokens with the most attention in the layer that the projector reads (-2) are kept.

    Departures: where a crop lies is told from the tiling; the public code takes consecutive patches of the thumbnail for
    it. Exactly the budget is kept: quotas are rounded by largest remainder, and what a crop cannot use goes to the
    others. Padding that the model cuts off is no candidate. Newlines, which the public code always keeps, come last. An
    image of one crop is `saliency`; crops that are not those of a thumbnail, such as frames, share the budget by their
    tokens.

    Args:
        alpha: share of the budget for the thumbnail, rounded down.
    """

    alpha: float = 0.5

    name = "hired"
    summary = "attention of [CLS], in each crop as much as the thumbnail shows there"
    paper = "HiRED, arXiv 2408.10945"
    cost = "sort"
    needs = frozenset({SALIENCY, EARLY})

    def __post_init__(self) -> None:
        check_budget_share("alpha", self.alpha)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        if tokens.crops == 1:
            return Kept(top_tokens(tokens.saliency, keep, tokens.candidates))
        number = torch.arange(tokens.crops + 1, device=tokens.source.device)
        crop = crop_of(tokens.source, tokens.rows * tokens.columns)
        crop = crop.masked_fill(~tokens.candidates, tokens.crops)  # in none
        sizes = (crop.unsqueeze(-1) == number).sum(-2)  # [G, crops + 1]
        budgets = self._budgets(tokens, crop, sizes[:, :-1], keep)
        scores = tokens.saliency.masked_fill(~tokens.candidates, float("-inf"))
        order = scores.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, crop.gather(-1, order).argsort(dim=-1, stable=True))  # crop by crop
        place = order.argsort(dim=-1)
        first = sizes.cumsum(-1) - sizes
        kept = place - first.gather(-1, crop) < torch.nn.functional.pad(budgets, (0, 1)).gather(-1, crop)
        return Kept(top_tokens(kept.float(), keep, tokens.candidates))

    def _budgets(self, tokens: VisualTokens, crop: Tensor, sizes: Tensor, keep: int) -> Tensor:
        """[G, crops] long: how many tokens of each crop are kept; less than `keep` together where there are no more."""
        if tokens.tiling is None:
            return apportioned(sizes, sizes, sizes.sum(-1).clamp(max=keep))
        thumbnail = sizes[:, 0].clamp(max=math.floor(self.alpha * keep))
        others = torch.minimum(keep - thumbnail, sizes[:, 1:].sum(-1))
        content = apportioned(self._content(tokens, crop, sizes[:, :1]), sizes[:, 1:], others)
        return torch.cat((torch.minimum(keep - others, sizes[:, 0]).unsqueeze(-1), content), dim=-1)

    def _content(self, tokens: VisualTokens, crop: Tensor, shown: Tensor) -> Tensor:
        """[G, crops - 1] long: how many patches of the thumbnail are content, where each of the other crops lies."""
        assert tokens.tiling is not None
        early = tokens.signals[EARLY].masked_fill(crop != 0, float("-inf"))
        rank = early.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        content = (crop == 0) & (rank < ((1 - self.alpha) * shown + _ALMOST).floor())
        number = torch.arange(tokens.crops - 1, device=crop.device)
        inside = crop_under(tokens.source, tokens.rows, tokens.columns, tokens.tiling).unsqueeze(-1) == number
        return (inside & content.unsqueeze(-1)).sum(-2)


def apportioned(shares: Tensor, sizes: Tensor, total: Tensor) -> Tensor:
    """Whole numbers in proportion to shares, none above its size, by largest remainder; of equals the first.

    Args:
        shares: [G, C] long, not negative.
        sizes: [G, C] long.
        total: [G] long, at most the sum of the sizes.

    Returns:
        [G, C] long, which add up to `total`. Who has no share gets something only where the others are full, and then all
        alike.
    """
    total = total.unsqueeze(-1)
    full = sizes == 0
    for _ in range(sizes.shape[-1] + 1):  # at least one more is full each time, or it is done
        free = shares.masked_fill(full, 0)
        free = torch.where(free.sum(-1, keepdim=True) > 0, free, (~full).long())
        left = (total - sizes.masked_fill(~full, 0).sum(-1, keepdim=True)) * free
        whole = free.sum(-1, keepdim=True).clamp_min(1)
        full = full | ((left >= sizes * whole) & (free > 0))
    quotas = torch.where(full, sizes, left // whole)
    remainder = torch.where(full, -1, left % whole)
    rank = remainder.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return quotas + (rank < total - quotas.sum(-1, keepdim=True)).long()
