"""How alike tokens are: cosines in float32, and scores brought to 0 to 1."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

_SMALL = 1e-6
_SIDE = 512
"""Tokens of a block of cosines on a CPU."""


def unit_vectors(vectors: Tensor) -> Tensor:
    """[..., D] of any dtype -> the same in float32 at length one; a vector of zeros stays one."""
    return normalize(vectors.float(), dim=-1)


def cosines(ones: Tensor, others: Tensor) -> Tensor:
    """[..., M, D], [..., N, D] of length one (`unit_vectors`) -> [..., M, N]."""
    return ones @ others.mT


def best_word_cosines(text: Tensor, mask: Tensor, unit: Tensor) -> Tensor:
    """[G, N], the cosine of each token ([G, N, D] of length one) to the word it is most like.

    Args:
        text: [G, T, D] embeddings of the words, of any length.
        mask: [G, T] bool, the words that count.
    """
    return cosines(unit_vectors(text), unit).masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(-2)


def self_cosines(unit: Tensor) -> Tensor:
    """[..., N, D] of length one -> [..., N, N], the same above and below the diagonal.

    On a CPU, where the product is what takes the time, only what is above is computed.
    """
    tokens = unit.shape[-2]
    if not unit.is_cpu or tokens <= _SIDE:
        return unit @ unit.mT
    alike = unit.new_empty(*unit.shape[:-1], tokens)
    for first in range(0, tokens, _SIDE):
        last = min(first + _SIDE, tokens)
        block = unit[..., first:last, :] @ unit[..., first:, :].mT
        alike[..., first:last, first:] = block
        alike[..., last:, first:last] = block[..., last - first :].mT
    return alike


def min_max(scores: Tensor, candidates: Tensor) -> Tensor:
    """(s - least + 1e-6) / (most - least + 1e-6) over the candidates: above 0 and at most 1; 0 for other tokens.

    Args:
        scores: [..., N] float.
        candidates: [..., N] bool.
    """
    least = scores.masked_fill(~candidates, float("inf")).amin(-1, keepdim=True)
    most = scores.masked_fill(~candidates, float("-inf")).amax(-1, keepdim=True)
    return ((scores - least + _SMALL) / (most - least + _SMALL)).masked_fill(~candidates, 0.0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[..., M, D], [..., M] bool -> [..., D], the mean of the rows where `mask` is True; zeros where none is."""
    share = mask.to(values.dtype)
    share = share / share.sum(-1, keepdim=True).clamp_min(1.0)
    return (share.unsqueeze(-2) @ values).squeeze(-2)


def crop_of(source: Tensor, patches: int) -> Tensor:
    """[...] long, the crop that each token is of; -1 where it shows no patch.

    Args:
        source: see `adafv.core.ImageLayout`.
        patches: of one crop.
    """
    return torch.div(source, patches, rounding_mode="floor")


def crop_under(source: Tensor, rows: int, columns: int, tiling: tuple[int, int]) -> Tensor:
    """[...] long, which of the crops behind the thumbnail shows the middle of each patch of the thumbnail; 0: the first.

    Args:
        source, tiling: see `adafv.core.ImageLayout`. What is said of tokens that are not the thumbnail's means nothing.
    """
    vertical, horizontal = tiling
    row, column = source // columns, source % columns
    # By the middle of the patch; it may lie in two crops.
    down = (row * 2 + 1) * vertical // (2 * rows)
    across = (column * 2 + 1) * horizontal // (2 * columns)
    return down * horizontal + across
