"""Visual saliency of towers without [CLS]."""

import torch
from torch import Tensor

_BLOCK = 256
"""Queries taken at a time, so that the attention of a large image never exists as a whole."""


def received_attention(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Visual saliency s[j]: the attention that patch j receives, mean over the heads and over the patches that look.

    Args:
        query: [..., H, N, d], queries of the layer.
        key: [..., H, N, d], keys of the layer.
        scaling: factor on the dot product.
        mask: [..., 1, N, N] or broadcastable, what may look at what: bool (True: yes) or added to the logits.

    Returns:
        [..., N] float32; it sums to one.
    """
    keys = key.float().transpose(-1, -2)
    count = query.shape[-2]
    total = torch.zeros(*query.shape[:-3], count, device=query.device)
    for start in range(0, count, _BLOCK):
        logits = (query[..., start : start + _BLOCK, :].float() @ keys) * scaling
        if mask is not None:
            rows = mask[..., start : start + _BLOCK, :] if mask.shape[-2] > 1 else mask
            logits = logits.masked_fill(~rows, float("-inf")) if rows.dtype == torch.bool else logits + rows.float()
        total += logits.softmax(dim=-1).mean(dim=-3).sum(dim=-2)
    return total / count
