"""Coverage weighted by relevance: words by how sharply they look, smoothed over the image."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from adafv.core.greedy import coverage_search, few_at_a_time
from adafv.core.likeness import cosines, masked_mean, min_max, self_cosines, unit_vectors
from adafv.core.tokens import WORDS, Kept, VisualTokens
from adafv.errors import OptionError
from adafv.methods.base import Method
from adafv.methods.checks import check_sign

TEMPERATURE = 100.0
ENTROPY_TEMPERATURE = 0.01


@dataclass(frozen=True)
class EADP(Method):
    """Keep the tokens that cover the relevant ones: the largest sum_j s_j * max_i (1 + cos(v_i, v_j)) / 2, greedily.

    i are the kept tokens. s is half the cosine to the mean word, half the mean of the cosines to the words that look most
    sharply: those with the least entropy h of softmax(100 * cosine) over the tokens, weighted by softmax(-h / 0.01). It is
    brought to 0 to 1, smoothed by a Gaussian of 3 x 3 with deviation 1 in each crop, and raised to the power beta.

    Paper: EADP (2026). Public code: SJTU-DeepVisionLab/EADP, 46a6fdb (Qwen_vl/model/pruner.py). Departures: there all cosines
    to text are negated, with CLIP's text tower and with the language model's embeddings alike; here the sign is plus
    (`sign`), and the embeddings are always the language model's. At the border of an image whose crops are not
    full, the Gaussian is that of the tokens there are. Newline tokens neither cover nor are covered. The crops of an image
    are searched together; there each has its share of K by its share of s.

    Args:
        sharpest: share of the words that count beside the mean word, those of least entropy; one at least.
        mix: share of the cosine to the mean word in s.
        beta: power of s.
        sign: 1, or -1 as published: tokens that are unlike the text are relevant.
    """

    sharpest: float = 0.5
    mix: float = 0.5
    beta: float = 1.0
    sign: int = 1

    name = "eadp"
    summary = "coverage of what the sharpest words are like, smoothed"
    paper = "EADP, 2026"
    cost = "N x N, K steps of up to N x N"
    needs = frozenset({WORDS})

    def __post_init__(self) -> None:
        for name in ("sharpest", "mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name}={getattr(self, name)!r}; give a share, 0 to 1")
        if not self.beta >= 0:
            raise OptionError(f"beta={self.beta!r}; give 0 or more")
        check_sign(self.sign)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        unit = unit_vectors(tokens.features.detach())
        scores = min_max(self._relevance(tokens, unit), tokens.candidates)
        demand = (smoothed(scores, tokens) ** self.beta).masked_fill(~tokens.candidates, 0.0)

        def search(some: slice) -> Tensor:
            alike = self_cosines(unit[some]).clamp_(-1.0, 1.0).add_(1.0).div_(2.0)
            return coverage_search(alike, keep, None, demand[some], tokens.candidates[some]).indices

        return Kept(few_at_a_time(len(unit), unit.shape[1] ** 2, search))

    def _relevance(self, tokens: VisualTokens, unit: Tensor) -> Tensor:
        """[G, N]."""
        text, mask, shown = tokens.text.embeddings.float(), tokens.text.mask, tokens.candidates.unsqueeze(1)
        mean = unit_vectors(masked_mean(text, mask)).unsqueeze(1)
        overall = self.sign * cosines(mean, unit).squeeze(1)
        alike = self.sign * cosines(unit_vectors(text), unit)
        looks = (TEMPERATURE * alike).masked_fill(~shown, torch.finfo(torch.float32).min).softmax(-1)
        entropy = torch.special.entr(looks).sum(-1).masked_fill(~mask, float("inf"))
        rank = entropy.argsort(dim=-1, stable=True).argsort(dim=-1)
        count = (mask.sum(-1, keepdim=True) * self.sharpest).floor().clamp_min(1)
        weights = (-entropy / ENTROPY_TEMPERATURE).masked_fill(rank >= count, float("-inf")).softmax(-1)
        dense = (weights.unsqueeze(1) @ alike).squeeze(1)
        return self.mix * overall + (1 - self.mix) * dense


def smoothed(scores: Tensor, tokens: VisualTokens) -> Tensor:
    """[G, N]: the Gaussian mean over the 3 x 3 neighbours of each token in its crop, mirrored at the border.

    Places of the grid that no candidate shows do not count.
    """
    images, rows, columns = len(scores), tokens.rows, tokens.columns
    cells = tokens.crops * rows * columns
    place = tokens.source.where(tokens.candidates, cells)
    grids = []
    for values in (scores, tokens.candidates.float()):
        grid = values.new_zeros(images, cells + 1).scatter_add_(-1, place, values)[:, :cells]
        grid = grid.reshape(images * tokens.crops, 1, rows, columns)
        for axes, size in (((1, 1, 0, 0), columns), ((0, 0, 1, 1), rows)):
            grid = pad(grid, axes, mode="reflect" if size > 1 else "replicate")
        grids.append(conv2d(grid, _gaussian(grid)).reshape(images, cells))
    mean = grids[0] / grids[1].clamp_min(1e-12)
    return mean.gather(-1, tokens.source.clamp_min(0))


def _gaussian(like: Tensor) -> Tensor:
    """[1, 1, 3, 3], of deviation 1."""
    side, middle = math.exp(-0.5), 1.0
    line = torch.tensor([side, middle, side], device=like.device) / (2 * side + middle)
    return (line.unsqueeze(1) * line).view(1, 1, 3, 3)
