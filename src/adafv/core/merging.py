"""What methods share that merge tokens, or drop what is alike: batched over images, without a wait for the device.

Candidates, the tokens that show a patch, are marked per image and are never counted on the host; what is taken of images with
fewer of them is masked. Equal values are resolved in favour of what stands first, on every device.
"""

import torch
from torch import Tensor


def rows_at(values: Tensor, indices: Tensor) -> Tensor:
    """[..., N, C] at [..., K] -> [..., K, C]."""
    return values.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, values.shape[-1]))


def marks_of(indices: Tensor, tokens: int) -> Tensor:
    """[..., K] long -> [..., N] bool, True at the indices."""
    marks = torch.zeros(*indices.shape[:-1], tokens, dtype=torch.bool, device=indices.device)
    return marks.scatter(-1, indices, True)


def indices_of(marks: Tensor, count: int) -> Tensor:
    """[..., N] bool -> [..., count] long: the first that are True, ascending; behind them those that are not."""
    return (~marks).to(torch.int8).argsort(dim=-1, stable=True)[..., :count]


def in_turn(*sets: Tensor) -> Tensor:
    """All indices [..., N]: those in the first set ([..., N] bool), ascending, then in the second, ..., then in none."""
    turn = torch.full(sets[0].shape, len(sets), dtype=torch.int8, device=sets[0].device)
    for number, marks in reversed(list(enumerate(sets))):
        turn = turn.masked_fill(marks, number)
    return turn.argsort(dim=-1, stable=True)


def first_largest(values: Tensor) -> Tensor:
    """[..., N] -> [...] long, the first place of the largest value; `argmax` promises that of equals on no device."""
    return first_true(values == values.amax(-1, keepdim=True))


def first_true(marks: Tensor) -> Tensor:
    """[..., N] bool -> [...] long, the first True; the last place where there is none."""
    places = torch.arange(marks.shape[-1], device=marks.device)
    return torch.where(marks, places, marks.shape[-1] - 1).amin(-1)


def last_true(marks: Tensor) -> Tensor:
    """[..., N] bool -> [...] long, the last True; 0 where there is none."""
    return torch.where(marks, torch.arange(marks.shape[-1], device=marks.device), 0).amax(-1)


def means(indices: Tensor, belongs: Tensor) -> Tensor:
    """The weights of mean tokens.

    Args:
        indices: [..., K] long, the tokens that stay.
        belongs: [..., N] long, for every token the one that it goes to (itself, if it stays); -1: to none.

    Returns:
        [..., K, N] float32; rows sum to 1.
    """
    members = (indices.unsqueeze(-1) == belongs.unsqueeze(-2)).float()
    return members / members.sum(-1, keepdim=True).clamp_min(1.0)


def with_the_rest(
    indices: Tensor, weights: Tensor, kept: Tensor, candidates: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Add one token that is a mix of the candidates that were not kept; it stands in the place of the last of them.

    Where nothing is left that shows a patch, the next newline stays as it is.

    Args:
        indices: [..., K] long, the tokens that stay; weights: [..., K, N], of their mixes; kept: [..., N] bool, the same.
        candidates: [..., N] bool.
        shares: [..., N] or [..., 1] float32, of the candidates that were not kept.

    Returns:
        Indices [..., K + 1], ascending, and weights [..., K + 1, N].
    """
    rest = candidates & ~kept
    place = torch.where(rest.any(-1), last_true(rest), first_true(~kept)).unsqueeze(-1)
    newline = marks_of(place, kept.shape[-1]).float()
    row = torch.where(rest.any(-1, keepdim=True), shares * rest, newline)
    indices, order = torch.cat((indices, place), dim=-1).sort(dim=-1)
    return indices, rows_at(torch.cat((weights, row.unsqueeze(-2)), dim=-2), order)


def outliers(scores: Tensor, candidates: Tensor) -> Tensor:
    """How many scores are outliers by the rule of the quartiles: above Q3 + 1.5 (Q3 - Q1).

    Quartiles lie between the two nearest scores where they fall between two, as NumPy's `percentile` has them.

    Args:
        scores: [..., N].
        candidates: [..., N] bool, those that count.

    Returns:
        [...] long; 0 where nothing stands out.
    """
    values = scores.detach().double().masked_fill(~candidates, float("inf")).sort(dim=-1).values
    last = (candidates.sum(-1, keepdim=True) - 1).clamp_min(0)
    quartiles = []
    for share in (0.25, 0.75):
        place = last * share
        below = place.floor().long()
        low, high = values.gather(-1, below), values.gather(-1, torch.minimum(below + 1, last))
        quartiles.append(low + (high - low) * (place - below))
    fence = quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])
    return ((scores.double() > fence) & candidates).sum(-1)


def evenly(order: Tensor, available: Tensor, wanted: Tensor, most: int) -> Tensor:
    """Marks of evenly spaced members of a list: one from the middle of each of so many equal parts of it.

    Args:
        order: [G, N] long, every token once, those of the list first.
        available: [G, 1] long, how long the list is. Where it is too short, what follows is taken, too.
        wanted: [G, 1] long, how many are marked, at most `most`.

    Returns:
        [G, N] bool.
    """
    step = torch.arange(most, device=order.device)
    middle = (step * 2 + 1) * available // (2 * wanted.clamp_min(1))
    places = torch.where(available >= wanted, middle, step.expand_as(middle))
    tokens = order.shape[-1]
    chosen = order.gather(-1, places.clamp(0, tokens - 1)).masked_fill(step >= wanted, tokens)
    return marks_of(chosen, tokens + 1)[..., :tokens]
