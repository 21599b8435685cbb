"""EVS: what has not changed since the frame before is dropped. For videos."""

from dataclasses import dataclass

import torch

from adafv.core import ImageLayout, top_tokens
from adafv.core.merging import rows_at
from adafv.core.tokens import Kept, Plan, VisualTokens
from adafv.errors import BudgetError, MethodError
from adafv.methods.base import Method

_SLICE = 512
"""Tokens that are compared at a time, so that their float32 copies stay small."""


@dataclass(frozen=True)
class EVS(Method):
    """Keep the first frame of a video, and of the others the tokens that differ most from the same place a frame before.

    Paper: "Efficient Video Sampling", arXiv 2510.14624; public code: vLLM 0.32.0, vllm/multimodal/video_prune/evs.py
    (read). The difference is one minus the cosine of the visual tokens, as the language model reads them.

    Departures: a place that no token of the frame before shows counts as new, as the first frame does. Tokens that show
    no part of a frame are kept once all else is. An image, or a frame with a budget of its own, is refused: there is
    nothing before it. So is a budget below the first frame.
    """

    name = "evs"
    summary = "the first frame, and what changes from frame to frame (videos)"
    paper = "EVS, arXiv 2510.14624"
    cost = "sort"

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        if not layout.frames:
            raise MethodError(
                f"the method {self.name} compares the frames of a video, and this is a single image or frame; use another "
                "method, or video='clip' for one budget over all frames"
            )
        first = int(layout.of_crops((0,)).sum())
        if keep < first:
            raise BudgetError(
                f"keep={keep}: the method {self.name} keeps the first frame whole, which has {first} tokens; give at least "
                "that many"
            )
        return Plan(keep)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        frame, count = tokens.rows * tokens.columns, tokens.source.shape[1]
        # Which token shows a place of a frame; `count`: none does.
        place = tokens.source.masked_fill(~tokens.candidates, tokens.crops * frame)
        own = torch.arange(count, device=place.device).expand_as(place)
        shown_by = torch.full((len(place), tokens.crops * frame + 1), count, device=place.device).scatter(
            -1, place, own
        )
        shown_by[:, -1] = count
        before = shown_by.gather(-1, (tokens.source - frame).clamp_min(0))
        features, alike = tokens.features.detach(), []
        for own, other in zip(features.split(_SLICE, 1), before.clamp(max=count - 1).split(_SLICE, 1), strict=True):
            alike.append(torch.cosine_similarity(own.float(), rows_at(features, other).float(), dim=-1))
        new = (tokens.source < frame) | (before == count)
        return Kept(top_tokens((1 - torch.cat(alike, dim=1)).masked_fill(new, float("inf")), keep, tokens.candidates))
