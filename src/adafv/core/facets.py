"""Tokens that matter and are unlike each other: the scores and the searches of the method `facet`.

AdaFV keeps the set with the largest geometric mean of two masses, text and saliency. Masses add up, so two tokens that show
the same thing count twice, and neighbours that look alike are kept together. Here the geometric mean is taken of each
token's own two scores, and a token counts for what no kept token of more worth shows already:

    score_i = worth_i * (1 - largest cosine of i to a kept token of more worth, at least 0)

`facet_steps`   one token after the other, K steps; the kept tokens of more worth are those that were chosen before
`facet_rounds`  all at once, a few times over: each round reads "kept" off the one before

The second follows Matrix NMS (SOLOv2, arXiv 2003.10152), which replaces the serial loop of non-maximum suppression so.
It takes no steps that wait for each other, N x K cosines a round, and about as many operations as AdaFV's own search,
whatever K is. The two keep most tokens in common, not all: "more worth" is not "chosen before".

`fewest`             how many tokens hold a share of an image's worth
`with_the_farthest`  so many of those chosen for their worth, and for the rest of the budget what is unlike them
"""

from dataclasses import replace
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import pad

from adafv.core.greedy import AMONG, block_sizes, max_min_search
from adafv.core.likeness import best_word_cosines, cosines, crop_of, crop_under, min_max, self_cosines
from adafv.core.merging import rows_at
from adafv.core.tokens import SALIENCY, VisualTokens
from adafv.errors import BudgetError

FLOOR = 0.05
"""Added to both scores, which run from 0 to 1: what one of them calls worthless may still be kept for the other."""

_TINY = 1e-12
_CELLS = 2**22
"""Cosines that exist at a time, over all images: 16 MiB, twice."""
_LAST = 4.0
"""Above any cosine: how near to what is kept a token counts that is no candidate."""


def two_scores(tokens: VisualTokens, unit: Tensor) -> Tensor:
    """[2, G, N] float32, 0 to 1, 0 for tokens that show no part of the image: text, and saliency.

    Text is the cosine to the word that a token is most like, saliency the square root of the tower's attention, each brought
    to 0 to 1 over the image. There is no softmax: its temperature decides how many tokens a word may ask for, and the
    search does that here.

    Args:
        tokens: with words and saliency.
        unit: [G, N, D], their features at length one.
    """
    words = tokens.text
    alike = best_word_cosines(words.embeddings, words.mask, unit)
    return min_max(torch.stack((alike, tokens.saliency.float().clamp_min(0).sqrt())), tokens.candidates)


def worth(scores: Tensor, candidates: Tensor) -> Tensor:
    """[G, N] float32: sqrt((text + 0.05) * (saliency + 0.05)), 0 for tokens that show no part of the image.

    Args:
        scores: [2, G, N], see `two_scores`.
        candidates: [G, N] bool.
    """
    text, salient = scores + FLOOR
    return (text * salient).sqrt().masked_fill(~candidates, 0.0)


def of_views(tokens: VisualTokens) -> tuple[VisualTokens, Tensor]:
    """What an image of a thumbnail and crops is, to a search that covers it: its tokens anew, and their demand, [G, N].

    Attention of a tower adds up to one in every view, in a crop of bare sky as in one full of things. So the saliency of a
    crop's token is multiplied by the share of the thumbnail's saliency that lies where the crop does: all crops together
    then have as much as the thumbnail. And they are to be covered for as much together as the thumbnail, which would count
    for a fifth of the image with four crops.

    Tokens of an image without a thumbnail, a single view or frames, come back as they are, with a demand of 1 each.
    """
    shown = tokens.candidates
    if tokens.tiling is None:
        return tokens, shown.float()
    crop = crop_of(tokens.source, tokens.rows * tokens.columns)
    small = shown & (crop == 0)
    saliency = tokens.saliency.float()
    mass = saliency.clamp_min(0).masked_fill(~small, 0.0)
    under = crop_under(tokens.source, tokens.rows, tokens.columns, tokens.tiling).unsqueeze(-1)
    lies = under == torch.arange(tokens.crops - 1, device=crop.device)
    share = (mass.unsqueeze(-1) * lies).sum(1) / mass.sum(-1, keepdim=True).clamp_min(_TINY)
    # Of the thumbnail, and of what shows no patch: 1.
    factor = pad(share, (1, 0), value=1.0).gather(-1, crop.clamp_min(0))
    views = torch.stack((small, shown & (crop > 0))).float()
    demand = (views / views.sum(-1, keepdim=True).clamp_min(1.0)).sum(0)
    return replace(tokens, signals={**tokens.signals, SALIENCY: saliency * factor}), demand


def facet_steps(unit: Tensor, worth: Tensor, keep: int, candidates: Tensor) -> Tensor:
    """[G, K] long, as they are chosen: always the token with the largest score, of which the first is the one of most worth.

    Args:
        unit: [G, N, D] float32 vectors of length one.
        worth: [G, N], not negative.
        keep: K, 1 <= K <= N.
        candidates: [G, N] bool; others are kept only once these are used up.
    """
    return max_min_search(unit, keep, worth, candidates, start="weight").order


def facet_rounds(unit: Tensor, worth: Tensor, keep: int, candidates: Tensor, rounds: int) -> Tensor:
    """The same as `facet_steps`, nearly, without serial steps.

    At first the K tokens of most worth are kept. Each round scores all tokens against those that the round before kept, and
    keeps the K of the largest score, which comes first.

    Args:
        rounds: at least 1; of equal scores the token of more worth stays.
    """
    tokens = worth.shape[-1]
    if not 1 <= keep <= tokens:
        raise BudgetError(f"keep={keep}, but there are {tokens} visual tokens; give 1 to {tokens}")
    # Other tokens are last, by their index.
    worth, order = worth.masked_fill(~candidates, -1.0).sort(dim=-1, descending=True, stable=True)
    unit, gain = rows_at(unit, order), worth.clamp_min(0)
    place = torch.arange(worth.shape[-1], device=worth.device)
    kept = place[:keep].expand(len(worth), keep)
    for _ in range(rounds):
        score = torch.addcmul(worth, gain, _nearest_better(unit, kept, place), value=-1)
        kept = score.argsort(dim=-1, descending=True, stable=True)[:, :keep]
    return order.gather(-1, kept)


def with_the_farthest(
    unit: Tensor, chosen: Tensor, enough: Tensor, least: int, keep: int, candidates: Tensor, blocks: int
) -> Tensor:
    """[G, keep], ascending: the first of those that were chosen for their worth, and tokens that are least like any of these.

    As DivPrune chooses, from what is kept already: the token whose largest cosine to that is least. In `blocks` steps each
    takes several, each step more than the one before: of those that are farthest, three times as many as it may take, the
    ones that are farthest from what is kept and from those of them that are farther. All images take as many steps, for
    whatever number of tokens, so that the device need not say how many that is.

    Args:
        unit: [G, N, D] vectors of length one.
        chosen: [G, W], W <= keep, as they were chosen.
        enough: [G] long, 1 to W: how many of them stay.
        least: what the host knows of that: no image has fewer.
        keep: how many to keep at last.
        candidates: [G, N] bool; others are added where there are no more of these, in their order.
        blocks: 0: one token a step.
    """
    images, tokens, _ = unit.shape
    worthy, missing = chosen.shape[-1], keep - least
    enough = enough.unsqueeze(-1)
    image = torch.arange(images, device=unit.device).unsqueeze(-1)
    stays = torch.arange(worthy, device=unit.device) < enough
    taken = torch.zeros_like(candidates).scatter_(-1, chosen, stays)
    nearest = _nearest_of(unit, image, chosen, stays).masked_fill(~candidates, _LAST).masked_fill_(taken, float("inf"))
    found: list[Tensor] = []
    for size in block_sizes(missing, blocks or missing):
        if found:
            nearest = nearest.maximum(_nearest_of(unit, image, found[-1])).scatter_(-1, found[-1], float("inf"))
        near, order = nearest.sort(dim=-1, stable=True)
        if size > 1:
            # No more likenesses than exist elsewhere, however many images there are beside this one.
            among = max(size, min(AMONG * size, isqrt(_CELLS)))
            some = order[:, :among]
            between = self_cosines(unit[image, some]).tril_(-1).amax(-1)
            order = some.gather(-1, near[:, :among].maximum(between).argsort(dim=-1, stable=True))
        found.append(order[:, :size])
    marks = torch.cat((stays, torch.arange(missing, device=unit.device) < keep - enough), -1)
    both = torch.cat((chosen, *found), -1).masked_fill(~marks, tokens)
    return both.sort(dim=-1).values[:, :keep]


def _nearest_of(unit: Tensor, image: Tensor, chosen: Tensor, counts: Tensor | None = None) -> Tensor:
    """[G, N], the largest cosine of each token to these, [G, K], or to those of them that count, [G, K] bool.

    Args:
        image: [G, 1] long, 0 to G - 1.
    """
    size = max(1, _CELLS // unit[..., 0].numel())
    nearest = []
    for first in range(0, chosen.shape[-1], size):
        some = slice(first, first + size)
        alike = cosines(unit[image, chosen[:, some]], unit)
        if counts is not None:
            alike = alike.masked_fill(~counts[:, some].unsqueeze(-1), -1.0)
        nearest.append(alike.amax(1))
    return nearest[0] if len(nearest) == 1 else torch.stack(nearest).amax(0)


def _nearest_better(unit: Tensor, kept: Tensor, place: Tensor) -> Tensor:
    """[G, N]: the largest cosine of each token to a kept one in front of it, at least 0."""
    nearest = None
    for some in kept.split(max(1, _CELLS // (len(unit) * len(place))), dim=-1):
        alike = cosines(rows_at(unit, some), unit) * (some.unsqueeze(-1) < place)
        found = alike.amax(1)
        nearest = found if nearest is None else nearest.maximum(found)
    assert nearest is not None
    return nearest.clamp(0, 1)


def fewest(worth: Tensor, share: float, candidates: Tensor) -> Tensor:
    """[G] long, at least 1: the fewest tokens that hold this share of the image's worth, squared.

    Worth that lies in few tokens says that few tokens show what counts. docs/evidence.md has what that is worth beside other
    signs, and where it is worth nothing.

    Args:
        worth: [G, N], not negative.
        share: above 0, up to 1.
        candidates: [G, N] bool; others hold nothing.
    """
    held = worth.square().masked_fill(~candidates, 0.0).sort(dim=-1, descending=True).values.cumsum(-1)
    # Not "<": worth that is NaN is held by no number of tokens, rather than by one. So the search has to show it, and does.
    return ((~(held >= share * held[..., -1:])).sum(-1) + 1).clamp(max=worth.shape[-1])
