"""SACMAM, the selection of AdaFV (arXiv 2501.09532, section 3.3): keep the K tokens whose text attention t and
saliency s have the largest geometric mean

    g(kept) = sqrt( sum of t over kept  *  sum of s over kept ).

Neither score needs a weight: a set that is rich in only one of them has a small product.

`joint_search`        the best of a family of weighted scores and of all splits, with an upper bound on what any set could
                      reach; for K of one to three the best set itself
`split_search`        the paper's search over k1 + k2 = K, with duplicates refilled
`frank_wolfe_search`  `joint_search` as it was: the optimum of the relaxation by Frank-Wolfe
`published_search`    what the published code does, to the letter

All functions are batched over leading dimensions, keep K on the host and everything else on the device, and never
wait for the device. Equal scores are resolved in favour of the lower index, so that every engine keeps the same tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adafv.core.merging import first_true
from adafv.errors import BudgetError

WEIGHTS = 33
"""Weights that `joint_search` tries. Neighbours differ by a factor of 1.09, which costs the bound 0.03 % at most."""
FRANK_WOLFE_ROUNDS = 12
SEARCHED_TOKENS = {2: 256, 3: 64}
"""Per K, the most tokens whose sets `joint_search` tries all; see `_best_few`. Some 2^17 sets, about 4 MiB per image."""
_SEARCHED_BEFORE = {2: 4096, 3: 384}
"""The same of `frank_wolfe_search`; see `_best_small_set`."""
_WEIGHTS = 16
_BLOCK = 2**21
"""Sets that are tried at a time, or splits x tokens, over all images: what bounds the memory."""
_IMAGES = 16
"""Whose sets of two or three tokens are tried at a time."""
_ROUNDING = 1e-6
"""Of float32 sums of three products; what is not better by more is the same."""
_TINY = 1e-30
_NOTHING = 1e-140
"""Times the largest float32 it is below every product of two, and its square is still a number of double precision."""
_LAST = -0.0
"""Score of what is no candidate. It adds nothing to a mass, but its bits are the smallest whole number."""


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

    Tokens outside `candidates` ([..., N] bool) are taken only once the candidates are used up, whatever these score: -inf,
    whole numbers, or bool.
    """
    if candidates is not None:
        scores = scores if scores.is_floating_point() else scores.double()  # whole numbers as they are
        scores = scores.clamp_min(torch.finfo(scores.dtype).min)
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


def joint_search(text_attention: Tensor, saliency: Tensor, keep: int, candidates: Tensor | None = None) -> Selection:
    """The best K tokens under g of those that a weighted score ranks first, never worse than `split_search`.

    For any r > 0 and any set with masses T and S, T * S <= ((T + r * S)^2) / (4 * r), with equality where T = r * S. The
    right side is largest for the top K of t + r * s, so each r gives a set and an upper bound on every set; `WEIGHTS`
    values of r are tried at once. Half of the budget from the head of either list reaches at least (K^2 - 1) / (4 K^2) of
    T0 * S0, the largest masses there are, so no better set has less than that share of T0 or of S0: the r that are worth
    a try lie within that factor of T0 / S0.

    Sets that no weight ranks first can be better. Those of `split_search` are tried, too, all K + 1 of them: see
    `_best_last`. Sets of two or three tokens are tried one by one, see `_best_few`; a single token is the one with the
    largest t * s.

    The number of tensor operations does not depend on N, K or the number of images (two or three tokens: of up to 16 images;
    then their sets are tried in blocks), and memory grows with N + K^1.5. Args and returns as `split_search`; certificates
    below 1e-6 are 0, which float32 cannot tell from it.
    """
    _check(text_attention, keep)
    if keep == 1:
        return _best_token(text_attention, saliency, candidates)
    if keep <= 3:
        return _best_few(text_attention, saliency, keep, candidates)
    tokens = text_attention.shape[-1]
    scores = torch.stack((text_attention.float(), saliency.float()), dim=-2)
    if candidates is not None:
        scores = scores.masked_fill(~candidates.unsqueeze(-2), _LAST)
    count = torch.arange(tokens + math.isqrt(tokens) + 2, device=scores.device)
    index = count[:tokens]
    order = scores.view(torch.int32).sort(dim=-1, descending=True, stable=True).indices
    place = order.scatter(-1, order, index.expand_as(order))
    if keep < tokens:
        last, most = _best_last(scores, order, place, count, keep)
    else:
        last, most = index[:1].expand(place[..., 0, :1].shape), scores.sum(-1)

    weights = _weights(keep, scores)
    text_most, saliency_most = most.clamp_min(_TINY).split(1, dim=-1)
    weights = weights * (text_most / saliency_most)
    ranked = torch.addcmul(scores[..., :1, :], weights.unsqueeze(-1), scores[..., 1:, :])
    # Whole numbers that no two tokens share: what is kept does not depend on how a device orders equals.
    ranked = torch.sub(index, ranked.view(torch.int32), alpha=tokens)
    split = place[..., 1:, :].masked_fill(place[..., :1, :] <= last.unsqueeze(-1), -1)
    kept = torch.cat((ranked, split, place[..., 1:, :]), dim=-2).topk(keep, largest=False, sorted=False).indices

    masses = _at(scores, kept).sum(-1, dtype=torch.float64)
    value, best = masses.prod(dim=-2, dtype=torch.float32).max(dim=-1)
    indices = kept.gather(-2, best[..., None, None].expand(*best.shape, 1, keep)).squeeze(-2)
    text_mass, saliency_mass = masses[..., :WEIGHTS].unbind(-2)
    bound = (torch.addcmul(text_mass, weights, saliency_mass) * weights.rsqrt()).amin(-1)
    objective = value.sqrt()
    certificate = torch.sub(bound, objective, alpha=2) / bound.clamp_min(_TINY)
    return Selection(
        indices.sort(dim=-1).values, objective, torch.nn.functional.threshold(certificate, _ROUNDING, 0.0).float()
    )


def frank_wolfe_search(
    text_attention: Tensor,
    saliency: Tensor,
    keep: int,
    candidates: Tensor | None = None,
    rounds: int = FRANK_WOLFE_ROUNDS,
) -> Selection:
    """What `joint_search` was before, for comparison: the best K tokens by Frank-Wolfe, never worse than `split_search`.

    log(sum t) + log(sum s) is concave in the selection, so on fractional selections Frank-Wolfe climbs to the optimum:
    linearise (score_j = t_j / T + s_j / S at the masses T and S reached so far), take the top K of that score, move
    towards them by an exact line search, repeat. Only T and S of the fractional point are carried. Every top K met on
    the way is a real selection; the best is returned.

    With two or three tokens a fractional selection can be far better than every real one, and its vertices far from the
    best of them. So there the sets are tried one by one, after all tokens are ruled out that no better set can hold; a
    single token is the one with the largest t * s. The certificate is 0 then, unless more than 4,096 (K = 2) or
    384 (K = 3) tokens are left, which takes scores that are one another's opposite in almost every token.

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


def _best_last(scores: Tensor, order: Tensor, place: Tensor, count: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """(k1 - 1 [..., 1] of the best split with k1 >= 1, the largest mass of either score [..., 2]), for K < N.

    The split k1 keeps the k1 tokens at the head of the text list and those at the places before q(k1) of the saliency
    list. The step from k1 to k1 + 1 puts one token in and, unless it was kept already, the one at place q(k1 + 1) out:
    with all q known the masses of all splits are two running sums.

    Args:
        scores: [..., 2, N], text attention and saliency.
        order: [..., 2, N], tokens by falling score; `place` is its inverse.
        count: 0, 1, 2, ..., longer than any list here.
    """
    on_saliency_list = count.expand(*place.shape[:-2], -1).scatter(-1, place[..., 0, :], place[..., 1, :])
    ends = _saliency_ends(on_saliency_list, place[..., 0, :].gather(-1, order[..., 1, :keep]), count)
    heads = _at(scores, order[..., :keep])
    # A token that was kept already lies before q: it goes out for itself.
    out = torch.minimum(on_saliency_list[..., :keep], ends).unsqueeze(-2).expand_as(heads[..., 1, :])
    out = heads[..., 1, :].gather(-1, out)
    steps = (heads[..., 0, :] - out).cumsum(dim=-1, dtype=torch.float64)
    sums = heads.sum(-1)
    text_mass, saliency_mass = (steps + sums[..., 1:]).unbind(-2)
    return (text_mass * saliency_mass).argmax(dim=-1, keepdim=True), sums.diagonal(dim1=-2, dim2=-1)


def _saliency_ends(on_saliency_list: Tensor, on_text_list: Tensor, count: Tensor) -> Tensor:
    """q(k1) [..., K] for k1 = 1..K: how far the saliency list is read in the split k1 (see `_best_last`).

    q is the largest place for which the k1 heads of the text list, and those before q that are not among them, are at
    most K tokens. Finding it for all k1 at once would take K x K cells. So it is found in two steps of K^1.5: for the
    first k1 of every block of about K^0.5, over the whole list; and inside a block over the places that it can still
    give up, which are as many as the block is long.

    Args:
        on_saliency_list: [..., K + K^0.5 at least], places on the saliency list of the tokens of the text list. What
            stands behind the first K does not matter.
        on_text_list: [..., K], places on the text list of the tokens of the saliency list.
        count: 0, 1, 2, ..., up to K + K^0.5 + 1 at least.
    """
    keep = on_text_list.shape[-1]
    size = math.isqrt(keep - 1) + 1
    blocks = -(-keep // size)
    # [..., blocks, K]: how many of the places so far hold tokens that the text list has not brought yet.
    free = (on_text_list.unsqueeze(-2) >= count[: blocks * size : size].unsqueeze(-1)).cumsum(dim=-1)
    # [..., blocks, size + 1]: where the block starts, and the places that go next.
    wanted = keep + 1 - count[: blocks * size + 1].unfold(0, size + 1, size).expand(*free.shape[:-1], size + 1)
    places = torch.searchsorted(free, wanted)
    entering = on_saliency_list[..., : blocks * size].unflatten(-1, (blocks, size))
    # [..., blocks, entered, given up]: with n places given up there is room for n from behind.
    behind = (entering.unsqueeze(-1) >= places.unsqueeze(-2)).cumsum(dim=-2)
    ends = (places.unsqueeze(-2) * (behind <= count[: size + 1])).amax(-1)
    return ends.flatten(-2)[..., :keep]


def _best_token(text_attention: Tensor, saliency: Tensor, candidates: Tensor | None) -> Selection:
    """K = 1: the token with the largest t * s, in double precision, where no product of two float32 vanishes."""
    product = text_attention.double() * saliency.float()
    if candidates is not None:
        product = product.masked_fill(~candidates, -1.0)
    best = product.max(dim=-1, keepdim=True)
    objective = best.values.squeeze(-1).clamp_min(0.0).sqrt().float()
    return Selection(best.indices, objective, torch.zeros_like(objective))


def _weights(keep: int, scores: Tensor) -> Tensor:
    """The weights [`WEIGHTS`] that are worth a try, in units of T0 / S0, rising: see `joint_search`."""
    reach = math.log(4 * keep**2 / (keep**2 - 1))
    return torch.logspace(-reach, reach, WEIGHTS, base=math.e, dtype=scores.dtype, device=scores.device)


def _best_few(text_attention: Tensor, saliency: Tensor, keep: int, candidates: Tensor | None) -> Selection:
    """K = 2 or 3: the best of all sets of the `SEARCHED_TOKENS` most promising tokens.

    Promising is what the sets that hold a token could reach (`_reach`). The K at the head of either list are always among
    them, and with them all sets of `split_search`. Where none of the others could reach more than what was found, which is
    the rule, no better set exists: the certificate is 0.

    In double precision, where neither sums nor products of a few float32 tie or vanish that should not.
    """
    shape, tokens = text_attention.shape[:-1], text_attention.shape[-1]
    # A score of 0 counts as next to nothing: then the other decides among sets that lack it, and no special case is left.
    scores = torch.stack((text_attention.float(), saliency.float()), dim=-2).double().clamp_min(_NOTHING)
    scores = scores.view(math.prod(shape), 2, tokens)
    key = torch.arange(tokens, device=scores.device).expand(len(scores), tokens)
    others = None
    if candidates is not None:
        others = ~candidates.expand(*shape, tokens).reshape(-1, tokens)
        scores = scores.masked_fill(others.unsqueeze(1), _NOTHING * 1e-10)
        key = key.add(others, alpha=tokens)  # behind all candidates, also in the order that equals are resolved by
    most = min(SEARCHED_TOKENS[keep], tokens)
    bound = None
    if most < tokens:
        reach, order = _reach(scores, keep, others).sort(dim=-1, descending=True, stable=True)
        key, bound = key.gather(-1, order[:, :most]), reach[:, most]
    tried = key.sort(dim=-1).values.remainder(tokens)
    values = scores.gather(-1, tried.unsqueeze(1).expand(-1, 2, -1))
    blocks = [_best_of_all(block, keep) for block in values.split(_IMAGES)]
    value, places = blocks[0] if len(blocks) == 1 else map(torch.cat, zip(*blocks, strict=True))
    objective = value.sqrt()
    if bound is None:
        certificate = torch.zeros_like(objective)
    else:
        certificate = torch.nn.functional.threshold(1 - objective / bound, _ROUNDING, 0.0)
    indices = tried.gather(-1, places).sort(dim=-1).values
    return Selection(indices.view(*shape, keep), objective.float().view(shape), certificate.float().view(shape))


def _reach(scores: Tensor, keep: int, others: Tensor | None) -> Tensor:
    """[B, N]: no set of K tokens that holds token j has a larger g; infinite for the K at the head of either list.

    For each weight r the inequality of `joint_search` bounds the sets that hold j by r's score of j and its K - 1 best.
    What is no candidate comes last, at 0.
    """
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    most = ranked.values[..., :keep].sum(-1)
    text, salient = scores.split(1, dim=1)
    text_most, salient_most = most.unsqueeze(-1).split(1, dim=1)
    # g is at most (T + r * S) / (2 * r^0.5), and r is the square of this.
    root = (_weights(keep, scores) * (text_most / salient_most)).sqrt().mT
    score = torch.addcmul(text / root, salient, root)
    best = score.topk(keep, dim=-1).values
    with_it = score.minimum(best[..., -1:]) + best[..., :-1].sum(-1, keepdim=True)
    reach = with_it.amin(1) / 2
    if others is not None:
        reach = reach.masked_fill(others, 0.0)
    return reach.scatter(-1, ranked.indices[..., :keep].flatten(1), math.inf)


def _best_of_all(values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """(the largest T * S [B], places of the set [B, K], ascending) over all sets of 2 or 3 of M tokens, [B, 2, M].

    Of equally good sets, the first in the order of their places.
    """
    tokens = values.shape[-1]
    place = torch.arange(tokens, device=values.device)
    # All tokens of a set but the last along one dimension, the last along the other.
    fronts = place.unsqueeze(0) if keep == 2 else torch.triu_indices(tokens, tokens, 1, device=values.device)
    front = values if keep == 2 else values[..., fronts[0]] + values[..., fronts[1]]
    product = (front.unsqueeze(-1) + values.unsqueeze(-2)).prod(1)
    value, first = product.masked_fill(place <= fronts[-1].unsqueeze(-1), -1.0).flatten(1).max(dim=-1)
    chosen = [*fronts[:, first // tokens], first % tokens]
    return value, torch.stack(chosen, dim=-1)


def _at(scores: Tensor, indices: Tensor) -> Tensor:
    """[..., 2, N] at [..., sets, K]: [..., 2, sets, K]."""
    indices = indices.unsqueeze(-3).expand(*scores.shape[:-1], *indices.shape[-2:])
    return scores.unsqueeze(-2).expand(*indices.shape[:-1], scores.shape[-1]).gather(-1, indices)


def _best_split(text_attention: Tensor, saliency: Tensor, keep: int, candidates: Tensor | None) -> Tensor:
    """Indices [..., K] of the best split, ascending, see `split_search`."""
    if keep == saliency.shape[-1]:
        return torch.arange(keep, device=saliency.device).expand(saliency.shape)
    by_saliency = _descending(saliency, candidates)
    text_rank = _descending(text_attention, candidates).argsort(dim=-1).gather(-1, by_saliency)

    # Everything below is in the order of falling saliency; the new dimension -2 runs over the splits k1 = 0..K.
    masses = torch.stack((text_attention.gather(-1, by_saliency), saliency.gather(-1, by_saliency)), dim=-1)
    splits = torch.arange(keep + 1, device=saliency.device).unsqueeze(-1)
    blocks = splits.split(max(1, _BLOCK // max(1, text_rank.numel())))
    values = [(_kept(text_rank, first, keep).to(masses.dtype) @ masses).prod(dim=-1) for first in blocks]
    best = torch.cat(values, dim=-1).argmax(dim=-1)
    kept = _kept(text_rank, best[..., None, None], keep).squeeze(-2)
    places = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return by_saliency.gather(-1, places).sort(dim=-1).values


def _kept(text_rank: Tensor, first: Tensor, keep: int) -> Tensor:
    """[..., splits, N] bool: the top `first` ([..., splits, 1]) by text, and the first of the others, K in all."""
    from_text = text_rank.unsqueeze(-2) < first
    rank_among_rest = (~from_text).cumsum(dim=-1, dtype=torch.int32)
    return from_text | (rank_among_rest <= keep - first)


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
        indices = torch.where(best > 0, first_true(product == best).unsqueeze(-1), indices)
        reached = (best.squeeze(-1).clamp_min(0).sqrt() * unit).reshape(shape[:-1])
        return indices.reshape(shape), reached, torch.ones_like(reached, dtype=torch.bool)

    reach = _reach_with(text, salient, value, keep)
    reach = reach.masked_fill(~allowed | _has_betters(text, salient, keep), -1.0)
    open_ = reach > value.unsqueeze(-1) * (1 + _ROUNDING)
    most = min(_SEARCHED_BEFORE[keep], tokens)
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
        first = first_true(product == value.unsqueeze(-1))
        chosen = torch.cat((front[first // tokens], (first % tokens).unsqueeze(-1)), dim=-1)
        places = torch.where((value > best).unsqueeze(-1), chosen, places)
        best = torch.maximum(best, value)
    return best, places


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
