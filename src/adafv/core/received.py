"""Visual saliency for towers without a [CLS] token (SigLIP, Qwen-VL, Pixtral): what each patch sends to the others.

A [CLS] token pools the picture, so its attention says which patches count. Without one there are only the patches
themselves, and the attention that a patch receives from all others, averaged, is what most pruning methods use instead
(VisionZip, arXiv 2412.04467). It has a flaw: the patches that receive most are often attention sinks, which the tower
uses as a place to look at nothing (arXiv 2309.16588, 2506.08010). They show no object, and their values are small or all
alike.

So two things are done here. Sinks, known by the length of their features, are left out. And what a patch receives is
weighted by how much its value differs from the mean value: attention moves values, so a patch that all look at but that
says the same as all others has nothing to tell. `docs/saliency.md` has the comparison that led here.
"""

import torch
from torch import Tensor

ROWS = 256
"""Rows of attention that exist at a time, over all images of a batch."""

SINK_DEVIATIONS = 5.0
"""How many robust standard deviations above the median the features of a sink are long, at least."""

SINK_RATIO = 2.0
"""How many times longer than the median they are, at least. On a blank background lengths hardly differ, and without
this an object on it would pass for a sink."""


def sinks(features: Tensor, ignored: Tensor | None = None) -> Tensor:
    """Patches whose features are much longer than those of the others, as sinks are (arXiv 2309.16588).

    Median and median deviation are used because a few sinks can be so long that they would move a mean.

    Args:
        features: [..., N, D], output of the layer.
        ignored: [..., N] bool, True for padding, which does not count and is no sink.

    Returns:
        [..., N] bool; never all patches.
    """
    lengths = features.float().norm(dim=-1)
    if ignored is not None:
        lengths = lengths.masked_fill(ignored, float("nan"))
    middle = lengths.nanmedian(dim=-1, keepdim=True).values
    spread = 1.4826 * (lengths - middle).abs().nanmedian(dim=-1, keepdim=True).values  # of a normal distribution
    return (lengths > middle + SINK_DEVIATIONS * spread) & (lengths > SINK_RATIO * middle)


def received_attention(
    query: Tensor, key: Tensor, scaling: float, ignored: Tensor | None = None, rows: int = ROWS
) -> Tensor:
    """The attention that each patch receives in each head of one layer, mean over the patches that look.

    Args:
        query, key: [..., H, N, d] of the layer, position encoding applied.
        scaling: factor on the dot product, d ** -0.5 in most towers.
        ignored: [..., N] bool, True for patches that neither look nor are looked at: sinks, padding. None: none.
        rows: queries taken at a time, over all leading dimensions but the heads; the attention map never exists whole.

    Returns:
        [..., H, N] float32. It sums to 1 over N, and is 0 where `ignored`.
    """
    patches = query.shape[-2]
    images = max(1, query.shape[:-3].numel())
    looks = torch.ones(*query.shape[:-3], patches, dtype=torch.float32, device=query.device)
    bias = None
    if ignored is not None:
        looks = looks.masked_fill(ignored, 0.0)
        bias = torch.zeros_like(looks).masked_fill(ignored, float("-inf"))[..., None, None, :]
    looks = looks / looks.sum(dim=-1, keepdim=True).clamp_min(1.0)
    columns = key.float().transpose(-1, -2)
    received = torch.zeros(query.shape[:-1], dtype=torch.float32, device=query.device)
    for start in range(0, patches, max(1, rows // images)):
        block = slice(start, start + max(1, rows // images))
        logits = (query[..., block, :].float() * scaling) @ columns
        if bias is not None:
            logits = logits + bias
        received += (looks[..., None, None, block] @ logits.softmax(dim=-1)).squeeze(-2)
    return received


def patch_saliency(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: Tensor,
    scaling: float,
    ignored: Tensor | None = None,
    rows: int = ROWS,
) -> Tensor:
    """Visual saliency s[j] without [CLS]: mean over heads of (attention received by j) * |value_j - mean value|^2.

    Read as a share of variance: how much of what differs in the values that this layer moves around comes from patch j.

    Args:
        query, key, value: [..., H, N, d] of the layer, patches alone, as many heads in each.
        features: [..., N, D], output of the layer, to know sinks by.
        scaling: factor on the dot product.
        ignored: [..., N] bool, True for padding.
        rows: see `received_attention`.

    Returns:
        [..., N] float32, not negative, zero for sinks and padding; it sums to 1 unless all patches are alike.
    """
    left_out = sinks(features, ignored)
    if ignored is not None:
        left_out = left_out | ignored
    received = received_attention(query, key, scaling, left_out, rows)
    value = value.float()
    counted = (~left_out).float()[..., None, :, None]
    mean = (value * counted).sum(dim=-2, keepdim=True) / counted.sum(dim=-2, keepdim=True).clamp_min(1.0)
    saliency = (received * (value - mean).square().sum(dim=-1)).mean(dim=-2)
    return saliency / saliency.sum(dim=-1, keepdim=True).clamp_min(1e-30)
