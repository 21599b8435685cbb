"""Greedy searches for sets that are diverse, or that cover: K steps, each of which adds the token that gains most.

`max_min_search`        the token that is farthest from all that are chosen (DivPrune)
`determinantal_search`  the token that adds most to the determinant of a kernel (CDPruner)
`coverage_search`       the token that adds most to what the chosen ones cover (SCOPE, MMTok, EADP)
`coverage_in_blocks`    nearly the same in a few steps, each of which adds several tokens (facet)

All are batched over G images, compute in float32 and keep K on the host. On an accelerator they never wait for the device.
Equal gains are resolved in favour of the lower index. Tokens outside `candidates` are taken only once the candidates are
used up, by their index.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adafv.core.likeness import cosines, self_cosines
from adafv.errors import BudgetError

_CELLS = 2**26
"""Cosines that exist at a time, over all images: 256 MiB. Above that they are computed row by row."""
_BLOCK = 2**18
"""Likenesses that a CPU compares at a time, so that they stay in its cache."""
_ROW_COSTS = 5
"""What a row of cosines costs on a CPU by itself, in rows of the product of all."""
_AT_FIRST = 16
"""Stale gains that a step on a CPU looks at first."""
AMONG = 3
"""Tokens that a block is chosen from, for each one in it; of those that cover and of the farthest."""
_GROWTH = 1.6
"""Of a block, beside the one before."""
_LAST = torch.finfo(torch.float32).min
"""Added to the score of what is no candidate."""
_SPANNED = 1e-5
"""Share of a token that the chosen ones leave over, in squared length; below it is rounding."""
_TINY = 1e-30


class Parts(NamedTuple):
    """Parts of an image that are searched for themselves, such as its crops."""

    of: Tensor
    """[G, N] long, the part of each token; -1: of none."""
    number: int
    """Of the parts."""


class Greedy(NamedTuple):
    """Outcome of a search."""

    indices: Tensor
    """[G, K] long, ascending."""
    order: Tensor
    """[G, K] long, as they were chosen."""
    gains: Tensor
    """[G, K] float32, the gain of each when it was chosen; 0 where nothing was left to gain."""


def max_min_search(
    unit: Tensor,
    keep: int,
    weights: Tensor | None = None,
    candidates: Tensor | None = None,
    start: str = "apart",
) -> Greedy:
    """Always the token with the largest weight * (1 - largest cosine to those that are chosen).

    N x N cosines exist at a time, 4 N^2 bytes for each image, while all images together have at most 256 MiB of them;
    above that a row is computed in each step, and what exists beside the vectors is [G, N].

    Args:
        unit: [G, N, D] float32 vectors of length one, see `adafv.core.likeness.unit_vectors`.
        keep: K, 1 <= K <= N.
        weights: [G, N], not negative; None: all alike.
        candidates: [G, N] bool; None: all.
        start: which is the first. "apart": the one with the largest weight * (1 - largest cosine to any other candidate).
            "weight": the one with the largest weight; and no token is farther from the chosen ones than 1, that is,
            cosines below 0 count as 0.
    """
    picks = _Picks(unit[..., 0], keep, candidates)
    likeness = _Cosines(unit)
    apart = start == "apart"
    distance = 1 - likeness.nearest(candidates) if apart else torch.ones_like(unit[..., 0])
    for step in range(keep):
        chosen = picks.pick(distance if weights is None else weights * distance)
        row = 1 - likeness.rows(chosen)
        distance = torch.minimum(distance, row) if step or not apart else row
    return picks.found()


def determinantal_search(
    unit: Tensor, keep: int, quality: Tensor, candidates: Tensor | None = None, parts: Parts | None = None
) -> Greedy:
    """Greedy MAP of a determinantal point process with the kernel q_i * cos(v_i, v_j) * q_j (Chen et al., 1709.05135).

    The gain of a token is q^2 times the squared length of what the chosen ones leave of its unit vector: the factor by
    which it raises the determinant. What they leave is known from a Cholesky factor that grows by a row in each step, so
    step k costs k x N. A token of which they leave less than 1e-5 gains nothing; once all are so (K above the rank), the
    rest is taken by falling quality.

    Memory: [G, K, N] for the factor, beside what `max_min_search` takes; on a CPU the rows are computed one by one, too,
    where K is small beside N.

    Args:
        unit: [G, N, D] float32 vectors of length one, see `adafv.core.likeness.unit_vectors`.
        keep: K, 1 <= K <= N.
        quality: [G, N], not negative. Its scale does not matter; `gains` are in units of the largest q^2.
        candidates: [G, N] bool; None: all.
        parts: they do not see each other and take turns, 0, 1, ...; so each has a search of its own, for an equal share of
            K. The turn of one that is used up goes to the largest gain in any.
    """
    picks = _Picks(unit[..., 0], keep, candidates, parts)
    likeness = _Cosines(unit, keep)
    worth = quality.float().square()
    most = worth if candidates is None else worth.masked_fill(~candidates, 0.0)
    worth = worth / most.amax(-1, keepdim=True).clamp_min(_TINY)
    late = worth - 2  # below any gain
    left = unit.square().sum(-1)
    factor = unit.new_zeros(len(unit), keep, unit.shape[1])
    for step in range(keep):
        chosen = picks.pick(torch.where(left > _SPANNED, worth * left, late))
        row = likeness.rows(chosen)
        if parts is not None:
            row = row.masked_fill(parts.of != parts.of.gather(-1, chosen.unsqueeze(-1)), 0.0)
        if step:
            before = factor[:, :step]
            row = row - (before[picks.images, :, chosen].unsqueeze(1) @ before).squeeze(1)
        pivot = left.gather(-1, chosen.unsqueeze(-1))
        row = row * pivot.masked_fill(pivot <= _SPANNED, float("inf")).rsqrt()
        factor[:, step] = row
        left = torch.addcmul(left, row, row, value=-1)
    return picks.found()


def coverage_search(
    likeness: Tensor,
    keep: int,
    quality: Tensor | None = None,
    demand: Tensor | None = None,
    candidates: Tensor | None = None,
    parts: Parts | None = None,
) -> Greedy:
    """Greedy weighted coverage, also called facility location: sum_m demand_m * max(0, largest likeness of m to the chosen).

    The gain of a token u is quality_u * sum_m demand_m * max(0, likeness_um - best_m), where best_m is what the chosen ones
    reach, at first 0. It never grows. So on a CPU, where reading a number waits for nothing, the gains of earlier steps are
    taken as bounds, and only the largest are computed anew, until the best new one is above the other bounds ("lazy
    greedy"): the same tokens, as sums of numbers that do not grow do not grow in float32 either. On an accelerator each
    step computes all gains, N x M.

    Memory: a copy of `likeness` where there is a demand, and one more of its size on an accelerator.

    Args:
        likeness: [G, N, M] float32 of the tokens to what is to be covered.
        keep: K, 1 <= K <= N.
        quality: [G, N], not negative; None: all alike.
        demand: [G, M], not negative; None: all alike.
        candidates: [G, N] bool; None: all.
        parts: they take turns, see `determinantal_search`. That they do not see each other is up to `likeness`.
    """
    if demand is not None:
        likeness = likeness * demand.unsqueeze(-2)  # d * max(0, l - b) = max(0, d * l - d * b)
    picks = _Picks(likeness[..., 0], keep, candidates, parts)
    return _lazily(likeness, keep, quality, picks) if likeness.is_cpu else _eagerly(likeness, keep, quality, picks)


def coverage_in_blocks(
    unit: Tensor,
    keep: int,
    blocks: int,
    quality: Tensor,
    demand: Tensor,
    candidates: Tensor,
) -> Tensor:
    """[G, K] long, as they are chosen: what `coverage_search` of cosines keeps, nearly, in `blocks` steps whatever K is.

    A step takes several tokens at once: of those that gain most, three times as many as it may take, the ones with the
    largest gain * (1 - largest cosine to one that gains more, at least 0). Each step takes more than the one before, as the
    first tokens say most about what the rest is worth.

    Memory: twice N x N cosines, while all images together have at most 256 MiB of them; above that they are computed anew in
    each step, a part at a time, and those between the tokens of a block and all others exist at once.

    Args:
        unit: [G, N, D] float32 vectors of length one, see `adafv.core.likeness.unit_vectors`.
        blocks: at least 1; with K of them or more each step takes one.
        quality, demand, candidates: see `coverage_search`.
    """
    images, tokens, _ = unit.shape
    if not 1 <= keep <= tokens:
        raise BudgetError(f"keep={keep}, but there are {tokens} visual tokens; give 1 to {tokens}")
    whole = self_cosines(unit) if images * tokens**2 <= _CELLS else None
    image = torch.arange(images, device=unit.device).unsqueeze(-1)
    demand = demand.unsqueeze(-1)
    best = None
    out = torch.zeros_like(quality).masked_fill_(~candidates, _LAST)
    found = []
    for size in block_sizes(keep, blocks):
        gain = _gains_for(unit, whole, best, demand)
        gain, order = torch.addcmul(out, quality, gain).sort(dim=-1, descending=True, stable=True)
        if size == 1:
            chosen = order[:, :1]
        else:
            some = order[:, : AMONG * size]
            if whole is None:
                alike = self_cosines(unit[image, some])
            else:
                alike = whole[image.unsqueeze(-1), some.unsqueeze(-1), some.unsqueeze(1)]
            near = alike.tril_(-1).amax(-1).clamp_(0, 1)
            score = gain[:, : AMONG * size]
            # What is no candidate has the lowest gain of all, and keeps it.
            score = torch.addcmul(score, score.clamp_min(0.0), near, value=-1)
            chosen = some.gather(-1, score.argsort(dim=-1, descending=True, stable=True)[:, :size])
        found.append(chosen)
        out = out.scatter(-1, chosen, float("-inf"))
        rows = cosines(unit[image, chosen], unit) if whole is None else whole[image, chosen]
        reached = rows.amax(1, keepdim=True)
        best = reached.clamp_min(0.0) if best is None else best.maximum(reached)
    return torch.cat(found, dim=-1)


def _gains_for(unit: Tensor, whole: Tensor | None, best: Tensor | None, demand: Tensor) -> Tensor:
    """[G, N], what each token adds to the coverage of all, [G, 1, N], each of which counts by its demand, [G, N, 1]."""
    if whole is not None:
        more = whole.clamp_min(0.0) if best is None else (whole - best).clamp_min_(0.0)
        return torch.bmm(more, demand).squeeze(-1)
    reached = 0.0 if best is None else best
    some = unit.split(max(1, _CELLS // (len(unit) * unit.shape[1])), dim=1)
    return torch.cat(
        [torch.bmm(cosines(part, unit).sub_(reached).clamp_min_(0.0), demand) for part in some], 1
    ).squeeze(-1)


def block_sizes(keep: int, blocks: int) -> list[int]:
    """How many tokens each step takes: K in all, each step about 1.6 times the one before, at least one."""
    blocks = min(keep, blocks)
    parts = [_GROWTH**block for block in range(blocks)]
    sizes, done = [], 0
    for block in range(blocks):
        # What is left, less one for each step to come.
        most = keep - done - (blocks - block - 1)
        sizes.append(min(most, max(1, round((keep - done) * parts[block] / sum(parts[block:])))))
        done += sizes[-1]
    return sizes


def few_at_a_time(images: int, cells: int, search: Callable[[slice], Tensor]) -> Tensor:
    """[G, K], what a search finds, over some images at a time.

    So at most 256 MiB of likenesses exist at a time, or those of one image.

    Args:
        images: G.
        cells: likenesses of one image.
        search: of the images of a slice.
    """
    size = max(1, _CELLS // cells)
    return torch.cat([search(slice(first, first + size)) for first in range(0, images, size)])


def _eagerly(likeness: Tensor, keep: int, quality: Tensor | None, picks: "_Picks") -> Greedy:
    best = torch.zeros_like(likeness[:, 0])
    for _ in range(keep):
        gain = _gains(likeness, best.unsqueeze(1))
        chosen = picks.pick(gain if quality is None else quality * gain)
        best = torch.maximum(best, likeness[picks.images, chosen])
    return picks.found()


def _lazily(likeness: Tensor, keep: int, quality: Tensor | None, picks: "_Picks") -> Greedy:
    best = torch.zeros_like(likeness[:, 0])
    size = max(1, _BLOCK // likeness[:, 0].numel())
    bound = torch.cat([_gains(block, best.unsqueeze(1)) for block in likeness.split(size, dim=1)], dim=-1)
    if quality is not None:
        bound = quality * bound
    others = ~picks.candidates
    for step in range(keep):
        fresh = others.clone() if step else torch.ones_like(others)
        size = _AT_FIRST
        while True:
            score = picks.open(bound)
            top = score.argmax(-1)
            stale = (~fresh.gather(-1, top.unsqueeze(-1)).squeeze(-1)).tolist()
            if not any(stale):
                break
            for image in (place for place, is_stale in enumerate(stale) if is_stale):
                again = score[image].masked_fill(fresh[image], float("-inf")).topk(min(size, len(score[image]))).indices
                gain = _gains(likeness[image, again], best[image])
                bound[image, again] = gain if quality is None else quality[image, again] * gain
                fresh[image, again] = True
            size *= 2
        chosen = picks.pick(bound)
        best = torch.maximum(best, likeness[picks.images, chosen])
    return picks.found()


def _gains(likeness: Tensor, best: Tensor) -> Tensor:
    """[..., B, M], what is reached [..., M] -> [..., B]."""
    return (likeness - best).clamp_min_(0.0).sum(-1)


class _Cosines:
    """Cosines of tokens with each other, all at once or a row at a time."""

    def __init__(self, unit: Tensor, wanted: int | None = None) -> None:
        """`wanted`: how many rows will be asked for; None: all."""
        images, tokens, _ = unit.shape
        at_once = images * tokens * tokens <= _CELLS
        if unit.is_cpu and wanted is not None:
            at_once = at_once and wanted * _ROW_COSTS >= tokens
        self._unit = unit
        self._images = torch.arange(images, device=unit.device)
        self._all = self_cosines(unit) if at_once else None

    def rows(self, chosen: Tensor) -> Tensor:
        """[G] -> [G, N]."""
        if self._all is not None:
            return self._all[self._images, chosen]
        return (self._unit @ self._unit[self._images, chosen].unsqueeze(-1)).squeeze(-1)

    def nearest(self, candidates: Tensor | None) -> Tensor:
        """[G, N], the largest cosine of each token to another candidate; -1 where there is none."""
        images, tokens, _ = self._unit.shape
        size = max(1, (_BLOCK if self._unit.is_cpu else _CELLS) // (images * tokens))
        index = torch.arange(tokens, device=self._unit.device)
        found = []
        for first in range(0, tokens, size):
            some = slice(first, first + size)
            block = self._all[:, some] if self._all is not None else self._unit[:, some] @ self._unit.mT
            aside = index[some].unsqueeze(-1) == index
            if candidates is not None:
                aside = aside | ~candidates.unsqueeze(1)
            found.append(block.masked_fill(aside, -1.0).amax(-1))
        return torch.cat(found, dim=-1)


class _Picks:
    """What is chosen so far, and what may still be."""

    def __init__(self, like: Tensor, keep: int, candidates: Tensor | None, parts: Parts | None = None) -> None:
        images, tokens = like.shape
        if not 1 <= keep <= tokens:
            raise BudgetError(f"keep={keep}, but there are {tokens} visual tokens; give 1 to {tokens}")
        self.images = torch.arange(images, device=like.device)
        self.candidates = torch.ones_like(like, dtype=torch.bool) if candidates is None else candidates
        self._out = torch.zeros_like(like, dtype=torch.float32).masked_fill_(~self.candidates, _LAST)
        self._turns = None if parts is None else _Turns(parts, self.candidates)
        self._order: list[Tensor] = []
        self._gains: list[Tensor] = []

    def open(self, score: Tensor) -> Tensor:
        """[G, N] -> the same, less than any score where a token cannot be chosen now."""
        score = score + self._out
        return score if self._turns is None else score.masked_fill(~self._turns.whose(len(self._order)), _LAST)

    def pick(self, score: Tensor) -> Tensor:
        """Choose the largest score of each image: its index, [G]."""
        gain, chosen = self.open(score).max(-1)  # of equals the first, as torch says
        self._out.scatter_(-1, chosen.unsqueeze(-1), float("-inf"))
        if self._turns is not None:
            self._turns.used(chosen)
        self._order.append(chosen)
        self._gains.append(gain)
        return chosen

    def found(self) -> Greedy:
        order = torch.stack(self._order, dim=-1)
        return Greedy(order.sort(dim=-1).values, order, torch.stack(self._gains, dim=-1).clamp_min(0.0))


class _Turns:
    """Which part of an image chooses next."""

    def __init__(self, parts: Parts, candidates: Tensor) -> None:
        self._of, self._number = parts
        self._free = candidates.clone()

    def whose(self, step: int) -> Tensor:
        """[G, N] bool: candidates of the part whose turn it is; all tokens where it has none left."""
        own = self._free & (self._of == step % self._number)
        return own | ~own.any(-1, keepdim=True)

    def used(self, chosen: Tensor) -> None:
        self._free.scatter_(-1, chosen.unsqueeze(-1), False)
