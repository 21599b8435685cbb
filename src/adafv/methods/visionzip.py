"""VisionZip: the tokens that the tower looks at, and means of what is left."""

import math
from dataclasses import dataclass

import torch

from adafv.core import top_tokens
from adafv.core.likeness import cosines, unit_vectors
from adafv.core.merging import first_largest, in_turn, indices_of, marks_of, means, rows_at
from adafv.core.tokens import KEYS, SALIENCY, Kept, VisualTokens
from adafv.methods.base import Mixing
from adafv.methods.checks import check_budget_share


@dataclass(frozen=True)
class VisionZip(Mixing):
    """Keep dominant tokens as they are, and merge all others into contextual ones.

    Paper: arXiv 2412.04467 (CVPR 2025); public code: dvlab-research/VisionZip (known by the paper, and by what others
    quote of it). Dominant are the tokens that [CLS] attends to most in the layer that the projector reads (-2). Of the
    others, evenly spaced ones are the targets; each that is left goes to the target whose key (mean over the heads) is
    most similar to its own, by cosine, and they become one token.

    Departures: a merged token is the mean of its target and of what goes to it, as the paper has it; the public code adds
    the mean of what goes to it to the target. [CLS] itself is not kept. Images in crops have one budget over all crops.
    Newlines are never mixed, and are kept once all else is. Towers without [CLS] give the attention received.

    Args:
        contextual: share of the budget for merged tokens, 10 of 64 in the paper.
        before_projector: whether they are mixed before the projector, as in the paper, or behind it.
    """

    contextual: float = 10 / 64
    before_projector: bool = True

    name = "visionzip"
    summary = "attention of [CLS], and means of what is left"
    paper = "VisionZip, arXiv 2412.04467"
    cost = "sort, N x K"
    needs = frozenset({SALIENCY, KEYS})

    def __post_init__(self) -> None:
        check_budget_share("contextual", self.contextual)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        merged, count = min(math.floor(self.contextual * keep + 0.5), keep), tokens.source.shape[1]
        kept = torch.zeros_like(tokens.candidates)
        if merged < keep:
            kept = marks_of(top_tokens(tokens.saliency, keep - merged, tokens.candidates), count)
        if not merged:
            return Kept(indices_of(kept, keep))
        rest = tokens.candidates & ~kept
        step = (rest.sum(-1, keepdim=True) // merged).clamp_min(1)
        targets = in_turn(rest, ~kept).gather(-1, torch.arange(merged, device=step.device) * step)
        keys = unit_vectors(tokens.signals[KEYS].detach().float().mean(-2))
        likeness = cosines(keys, rows_at(keys, targets))  # [G, N, merged]
        likeness = likeness.masked_fill(~tokens.candidates.gather(-1, targets).unsqueeze(-2), -2.0)
        nearest = targets.gather(-1, first_largest(likeness))  # [G, N]
        kept = kept | marks_of(targets, count)
        own = torch.arange(count, device=step.device)
        belongs = torch.where(kept, own, torch.where(rest, nearest, -1))
        indices = indices_of(kept, keep)
        return Kept(indices, means(indices, belongs))
