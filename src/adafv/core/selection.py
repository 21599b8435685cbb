"""SACMAM, the selection of AdaFV (arXiv 2501.09532, section 3.3): keep the K tokens whose text attention t and
saliency s have the largest geometric mean

    g(kept) = sqrt( sum of t over kept  *  sum of s over kept ).

Neither score needs a weight: a set that is rich in only one of them has a small product.

`split_search`      the paper's search over k1 + k2 = K, with duplicates refilled
`joint_search`      the optimum of the relaxation by Frank-Wolfe, with an upper bound on what any set could reach; for K of
                    one to three, where the relaxation can be far from any real set, the best set itself
`published_search`  what the published code does, to the letter

All functions are batched over leading dimensions, keep K on the host and everything else on the device, and never
wait for the device. Equal scores are resolved in favour of the lower index, so that every engine keeps the same tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from adafv.errors import BudgetError

FRANK_WOLFE_ROUNDS = 12
SEARCHED_TOKENS = {2: 4096, 3: 384}
"""Per K, the most tokens whose sets are all tried; see `_best_small_set`."""
_WEIGHTS = 16
_BLOCK = 2**21
"""Sets that are tried at a time, over all images: what bounds the memory."""
_ROUNDING = 1e-6
"""Of float32 sums of three products; what is not better by more is the same."""
_TINY = 1e-30


class Selection(NamedTuple):
    """Outcome of a search; all tensors share the leading dimensions of the scores."""

    indices: Tensor
    """[..., K] long, ascending: spatial order is what the language model was trained on."""
    objective: Tensor
    """[...] float32, the geometric mean g of the kept set."""
    certificate: Tensor
    """[...] float32 in [0, 1]: c: no set of K tokens has a g above objective / (1 - c); 0: it is the best."""


def geometric_mean(text_attention: Tensor, saliency: Tensor, indices: Tensor) -> Tensor:
    """g of the tokens at `indices` [..., K], for scores of shape [..., N]. Returns [...] float32."""
    text_mass = text_attention.gather(-1, indices).sum(-1)
    saliency_mass = saliency.gather(-1, indices).sum(-1)
    return (text_mass * saliency_mass).sqrt()


def top_tokens(scores: Tensor, keep: int, candidates: Tensor | None = None) -> Tensor:
    """Indices of the `keep` largest scores, ascending. [..., N] -> [..., K].

    Tokens outside `candidates` ([..., N] bool) are taken only once the candidates are used up.
    """
    return _descending(scores, candidates)[..., :keep].sort(dim=-1).values


def split_search(text_attention: Tensor, saliency: Tensor, keep: int, candidates: Tensor | None = None) -> Selection:
    """The paper's search: the top k1 by t and the top k2 by s, for the best split k1 + k2 = K.

    The two lists overlap (in the published code 5-30 % of the budget is spent twice). Here a token counts once and the
    s list is read on until exactly K distinct tokens are kept; every split is judged by the g of the set it really keeps.

    Args:
        text_attention, saliency: [..., N] non-negative scores.
        keep: K, 1 <= K <= N.
        candidates: [..., N] bool, see `top_tokens`.
    """
    _check(text_attention, keep)
    text_attention, saliency = _masked(text_attention, candidates), _masked(saliency, candidates)
    bound = _frank_wolfe(text_attention, saliency, keep, candidates).bound
    return _selection(text_attention, saliency, _best_split(text_attention, saliency, keep, candidates), bound)


def joint_search(
    text_attention: Tensor,
    saliency: Tensor,
    keep: int,
    candidates: Tensor | None = None,
    rounds: int = FRANK_WOLFE_ROUNDS,
) -> Selection:
    """The best K tokens under g, found by Frank-Wolfe, never worse than `split_search`.

    log(sum t) + log(sum s) is concave in the selection, so on fractional selections Frank-Wolfe climbs to the optimum:
    linearise (score_j = t_j / T + s_j / S at the masses T and S reached so far), take the top K of that score, move
    towards them by an exact line search, repeat. Only T and S of the fractional point are carried. Every top K met on
    the way is a real selection; the best is returned.

    With two or three tokens a fractional selection can be far better than every real one, and its vertices far from the
    best of them. So there the sets are tried one by one, after all tokens are ruled out that no better set can hold; a
    single token is the one with the largest t * s. The certificate is 0 then, unless more than `SEARCHED_TOKENS` tokens
    are left, which takes scores that are one another's opposite in almost every token.

    The duality gap of each round bounds the fractional optimum from above, hence every real selection too. So with
    `certificate` c no set of K tokens has a geometric mean above objective / (1 - c).

    Args and returns as `split_search`; `rounds` is the number of Frank-Wolfe rounds.
    """
    _check(text_attention, keep)
    text_attention, saliency = _masked(text_attention, candidates), _masked(saliency, candidates)
    split = _best_split(text_attention, saliency, keep, candidates)
    found = _frank_wolfe(text_attention, saliency, keep, candidates, rounds)
    better = geometric_mean(text_attention, saliency, found.indices) > geometric_mean(text_attention, saliency, split)
    indices, bound = torch.where(better.unsqueeze(-1), found.indices, split), found.bound
    if keep <= 3:
        indices, reached, is_best = _best_small_set(text_attention, saliency, indices, candidates)
        bound = torch.minimum(bound, reached).where(~is_best, geometric_mean(text_attention, saliency, indices))
    return _selection(text_attention, saliency, indices, bound)


def published_tokens(keep: int, crops: int) -> int:
    """V, the number of tokens the published code really keeps: `keep` rounded down to a multiple of 2 * crops."""
    return 2 * (keep // 2 // crops) * crops


def published_search(text_attention: Tensor, saliency: Tensor, keep: int) -> Tensor:
    """The selection of the published code, with its three peculiarities, to reproduce its tables:

    1. V = `published_tokens(keep, crops)` tokens are kept instead of K.
    2. A quarter of V is taken from the head of each list before the split is searched, and left out of its objective.
       The saliency list runs crop by crop, so its head is the head of the first crop(s).
    3. A token in both lists is kept twice, and saliency picks of crop c are offset by c instead of c * n: on anyres
       images they all land on the thumbnail.

    Args:
        text_attention: [..., C * n], t over the tokens of all C crops, in the order in which they are fed.
        saliency: [..., C, n], s of each crop.
        keep: K; V must be at least 1.

    Returns:
        [..., V] long, indices into the tokens as they are fed, ascending, possibly repeated.
    """
    crops, patches = saliency.shape[-2:]
    total = published_tokens(keep, crops)
    if total < 1 or total // crops > patches:
        raise BudgetError(
            f"the published variant keeps {total} of {crops} x {patches} visual tokens at keep={keep}: "
            f"give keep between {2 * crops} and {crops * patches}"
        )
    text_list = _descending(text_attention)[..., :total]
    crop_list = _descending(saliency)[..., : total // crops]
    saliency_values = saliency.gather(-1, crop_list).flatten(-2)
    crop_offset = torch.arange(crops, device=saliency.device).unsqueeze(-1)
    saliency_list = (crop_list + crop_offset).flatten(-2)

    floor = int(total * 0.25)
    searched = total - 2 * floor
    text_tail = text_attention.gather(-1, text_list)[..., floor:]
    saliency_tail, tail_order = saliency_values[..., floor:].sort(dim=-1, descending=True, stable=True)
    saliency_list = torch.cat((saliency_list[..., :floor], saliency_list[..., floor:].gather(-1, tail_order)), dim=-1)

    first = torch.arange(searched + 1, device=saliency.device)
    split_value = _prefix_sums(text_tail)[..., first] * _prefix_sums(saliency_tail)[..., searched - first]
    best = split_value.argmax(dim=-1, keepdim=True)

    place = torch.arange(total, device=saliency.device)
    from_text = place < floor + best
    indices = torch.where(from_text, text_list, saliency_list.gather(-1, (place - floor - best).clamp_min(0)))
    return indices.sort(dim=-1).values


def _best_split(text_attention: Tensor, saliency: Tensor, keep: int, candidates: Tensor | None) -> Tensor:
    """Indices [..., K] of the best split, ascending, see `split_search`."""
    if keep == saliency.shape[-1]:
        return torch.arange(keep, device=saliency.device).expand(saliency.shape)
    by_saliency = _descending(saliency, candidates)
    text_rank = _descending(text_attention, candidates).argsort(dim=-1).gather(-1, by_saliency)

    # Everything below is in the order of falling saliency; the new dimension -2 runs over the splits k1 = 0..K.
    first = torch.arange(keep + 1, device=saliency.device).unsqueeze(-1)
    from_text = text_rank.unsqueeze(-2) < first
    rank_among_rest = (~from_text).cumsum(dim=-1, dtype=torch.int32)
    kept = from_text | (rank_among_rest <= keep - first)
    masses = torch.stack((text_attention.gather(-1, by_saliency), saliency.gather(-1, by_saliency)), dim=-1)
    best = (kept.to(masses.dtype) @ masses).prod(dim=-1).argmax(dim=-1)

    kept = kept.gather(-2, best[..., None, None].expand(*best.shape, 1, kept.shape[-1])).squeeze(-2)
    places = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return by_saliency.gather(-1, places).sort(dim=-1).values


class _FrankWolfe(NamedTuple):
    indices: Tensor
    bound: Tensor


def _frank_wolfe(
    text_attention: Tensor, saliency: Tensor, keep: int, candidates: Tensor | None, rounds: int = FRANK_WOLFE_ROUNDS
) -> _FrankWolfe:
    """Best vertex met and the smallest upper bound on g, see `joint_search`."""
    # The first weights are those of all tokens together: not a selection of K, but a bound and a start all the same.
    text_mass = text_attention.sum(-1).clamp_min(_TINY)
    saliency_mass = saliency.sum(-1).clamp_min(_TINY)
    best_indices = torch.zeros(*text_mass.shape, keep, dtype=torch.long, device=text_mass.device)
    best_value, bound = torch.full_like(text_mass, -1.0), torch.full_like(text_mass, float("inf"))
    for step in range(rounds):
        score = text_attention / text_mass.unsqueeze(-1) + saliency / saliency_mass.unsqueeze(-1)
        indices = _descending(score, candidates)[..., :keep]
        vertex_text = text_attention.gather(-1, indices).sum(-1)
        vertex_saliency = saliency.gather(-1, indices).sum(-1)
        # AM-GM: with weights 1/T and 1/S every selection has g <= sqrt(T S) * (its score) / 2, and no selection's
        # score is above that of the top K. This is the Frank-Wolfe gap, in the units of g and free of logarithms.
        reach = (vertex_text / text_mass + vertex_saliency / saliency_mass) / 2 * (text_mass * saliency_mass).sqrt()
        bound = torch.minimum(bound, reach)
        value = vertex_text * vertex_saliency
        best_indices = torch.where((value > best_value).unsqueeze(-1), indices, best_indices)
        best_value = torch.maximum(value, best_value)
        # Exact line search: (T + a dT)(S + a dS) is a parabola in a, with its top inside (0, 1) or at the vertex.
        along_text, along_saliency = vertex_text - text_mass, vertex_saliency - saliency_mass
        curvature = 2 * along_text * along_saliency
        slope = along_text * saliency_mass + along_saliency * text_mass
        stride = torch.where(curvature < 0, -slope / curvature.clamp_max(-_TINY), torch.ones_like(slope)).clamp(0, 1)
        if step == 0:
            stride = torch.ones_like(stride)
        text_mass = (text_mass + stride * along_text).clamp_min(_TINY)
        saliency_mass = (saliency_mass + stride * along_saliency).clamp_min(_TINY)
    return _FrankWolfe(best_indices.sort(dim=-1).values, bound)


def _best_small_set(
    text_attention: Tensor, saliency: Tensor, indices: Tensor, candidates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The best set of K = 1, 2 or 3 tokens: (indices [..., K], bound on g [...], whether it is surely the best [...] bool).

    A token is ruled out where K others are at least as good in both scores, or where no set that holds it can be better
    than the best set known: for every a, b > 0 a set has T * S <= a * b * ((T / a + S / b) / 2)^2, and T / a + S / b is a sum
    over tokens, so with one of them given the largest is known. What is left (some ten tokens of real images) is tried.

    Args:
        indices: of the best set known, which stays where no other is better.
    """
    shape, keep = indices.shape, indices.shape[-1]
    # Neither score's scale matters. In units of their largest, products of small ones do not vanish.
    text, salient = (scores / scores.amax(-1, keepdim=True).clamp_min(_TINY) for scores in (text_attention, saliency))
    tokens = text.shape[-1]
    text, salient, indices = text.reshape(-1, tokens), salient.reshape(-1, tokens), indices.reshape(-1, keep)
    unit = (text_attention.amax(-1).clamp_min(_TINY).sqrt() * saliency.amax(-1).clamp_min(_TINY).sqrt()).reshape(-1)
    allowed = torch.ones_like(text, dtype=torch.bool)
    if candidates is not None:
        allowed = candidates.expand(text_attention.shape).reshape(text.shape)
    value = text.gather(-1, indices).sum(-1) * salient.gather(-1, indices).sum(-1)
    if keep == 1:
        product = (text * salient).masked_fill(~allowed, -1.0)
        best = product.amax(-1, keepdim=True)
        indices = torch.where(best > 0, _first(product == best).unsqueeze(-1), indices)
        reached = (best.squeeze(-1).clamp_min(0).sqrt() * unit).reshape(shape[:-1])
        return indices.reshape(shape), reached, torch.ones_like(reached, dtype=torch.bool)

    reach = _reach_with(text, salient, value, keep)
    reach = reach.masked_fill(~allowed | _has_betters(text, salient, keep), -1.0)
    open_ = reach > value.unsqueeze(-1) * (1 + _ROUNDING)
    most = min(SEARCHED_TOKENS[keep], tokens)
    left = most
    if _is_on_host(open_) and open_.numel():  # where reading a count waits for no device, fewer are tried
        left = min(most, max(keep, int(open_.sum(-1).max())))
    by_reach = _descending(reach.where(open_, torch.full_like(reach, -2.0)))
    tried = by_reach[..., :left].sort(dim=-1).values  # of equally good sets, the one with the lower indices
    is_open = open_.gather(-1, tried)
    found, places = _try_all(text.gather(-1, tried), salient.gather(-1, tried), is_open, keep)
    better = found > value
    indices = torch.where(better.unsqueeze(-1), tried.gather(-1, places), indices)
    value = torch.maximum(value, found)
    untried = torch.nn.functional.pad(
        reach.where(open_, torch.full_like(reach, -1.0)).gather(-1, by_reach), (0, 1), value=-1.0
    )
    untried = untried[..., most:].amax(-1)
    reached = torch.maximum(value, untried).sqrt() * unit
    return indices.reshape(shape), reached.reshape(shape[:-1]), (untried <= value).reshape(shape[:-1])


def _is_on_host(values: Tensor) -> bool:
    return values.is_cpu


def _reach_with(text: Tensor, salient: Tensor, value: Tensor, keep: int) -> Tensor:
    """[B, N]: no set of `keep` tokens that holds token j and is better than `value` [B] has a larger T * S."""
    most_text, most_salient = (scores.topk(keep, -1).values.sum(-1).clamp_min(_TINY) for scores in (text, salient))
    # A better set has T and S of at least `share` of the most, so T / S is within that of most_text / most_salient.
    share = (value / (most_text * most_salient)).clamp(1e-12, 1.0)
    reach = torch.full_like(text, float("inf"))
    for step in range(_WEIGHTS):
        tilt = share ** (2 * step / (_WEIGHTS - 1) - 1)
        a, b = most_text * tilt.sqrt(), most_salient / tilt.sqrt()
        score = text / a.unsqueeze(-1) + salient / b.unsqueeze(-1)
        best = score.topk(keep, -1).values
        total = best[..., :-1].sum(-1, keepdim=True) + torch.minimum(score, best[..., -1:])
        reach = torch.minimum(reach, (a * b).unsqueeze(-1) * (total / 2).square())
    return reach


def _has_betters(text: Tensor, salient: Tensor, keep: int) -> Tensor:
    """[B, N] bool: tokens known to have `keep` others that are no worse in either score.

    Those that none beats make one layer; without them, the next do. Behind `keep` layers every token has one in each.
    """
    order = text.argsort(dim=-1, descending=True, stable=True)
    ordered = salient.gather(-1, order)
    inside = torch.ones_like(ordered, dtype=torch.bool)
    for _ in range(keep):
        rest = ordered.masked_fill(~inside, -1.0)
        before = torch.nn.functional.pad(rest, (1, 0), value=-1.0).cummax(-1).values[..., :-1]
        inside = inside & ~(rest > before)
    return torch.zeros_like(inside).scatter(-1, order, inside)


def _try_all(text: Tensor, salient: Tensor, is_open: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """(the largest T * S [B], the places [B, K], ascending) over all sets of 2 or 3 of M tokens; -1 if none is open."""
    images, tokens = text.shape
    place = torch.arange(tokens, device=text.device)
    best = torch.full_like(text[:, 0], -1.0)
    places = torch.arange(keep, device=text.device).expand(images, keep)
    # The first tokens of a set along one dimension, in blocks; the last along the other.
    fronts = place.unsqueeze(-1) if keep == 2 else torch.triu_indices(tokens, tokens, 1, device=text.device).T
    text, salient = (scores.masked_fill(~is_open, float("-inf")) for scores in (text, salient))
    for front in fronts.split(max(1, _BLOCK // max(1, images * tokens))):
        masses = [scores[:, front].sum(-1, keepdim=True) + scores.unsqueeze(1) for scores in (text, salient)]
        # A mass of -inf marks a set with a token that is not open: the product of two would pass for the best.
        product = torch.where(masses[0] < 0, masses[0], masses[0] * masses[1])
        product = product.masked_fill(place <= front[:, -1:], -1.0).flatten(1)
        value = product.amax(-1)
        first = _first(product == value.unsqueeze(-1))
        chosen = torch.cat((front[first // tokens], (first % tokens).unsqueeze(-1)), dim=-1)
        places = torch.where((value > best).unsqueeze(-1), chosen, places)
        best = torch.maximum(best, value)
    return best, places


def _first(marks: Tensor) -> Tensor:
    """Index of the first True along the last dimension; `argmax` promises that of equals on no device."""
    return torch.where(marks, torch.arange(marks.shape[-1], device=marks.device), marks.shape[-1] - 1).amin(-1)


def _selection(text_attention: Tensor, saliency: Tensor, indices: Tensor, bound: Tensor) -> Selection:
    objective = geometric_mean(text_attention, saliency, indices)
    certificate = (1 - objective / bound.clamp_min(_TINY)).clamp_min(0.0).where(objective < bound, 0.0)
    return Selection(indices, objective, certificate)


def _descending(scores: Tensor, candidates: Tensor | None = None) -> Tensor:
    """All indices by falling score, the lower index first among equals, non-candidates last."""
    if candidates is not None:
        scores = scores.masked_fill(~candidates, float("-inf"))
    return scores.argsort(dim=-1, descending=True, stable=True)


def _masked(scores: Tensor, candidates: Tensor | None) -> Tensor:
    scores = scores.float()
    return scores if candidates is None else scores.masked_fill(~candidates, 0.0)


def _prefix_sums(values: Tensor) -> Tensor:
    """[..., M] -> [..., M + 1]: sum of the first 0, 1, ..., M values."""
    return torch.nn.functional.pad(values.cumsum(dim=-1), (1, 0))


def _check(scores: Tensor, keep: int) -> None:
    if not 1 <= keep <= scores.shape[-1]:
        raise BudgetError(f"keep={keep}, but there are {scores.shape[-1]} visual tokens; give 1 to {scores.shape[-1]}")
