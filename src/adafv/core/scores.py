"""The two scores of AdaFV (arXiv 2501.09532, section 3): what the text asks for, and what the tower finds striking.

Both are distributions over the N visual tokens of an image, in float32 whatever the model's dtype: they are compared
with each other, and half precision would decide ties between tokens by rounding.
"""

import math
from itertools import repeat

import torch
from torch import Tensor
from torch.nn.functional import normalize

TEMPERATURE = 100.0
"""Factor on the cosine before the softmax, as in the paper: it makes t about as peaked as the saliency s."""

_SLICE = 256
"""Visual tokens taken at a time on a CPU: float32 copies of thousands of tokens fall out of its cache, and cost more than
the products themselves. Elsewhere every slice is a launch more."""
_COPIED = 2**27
"""Elsewhere, bytes of float32 copies at a time, where there are several images: eight of 2,880 tokens would take twice what
their own bfloat16 does."""


def text_to_image_attention(
    text: Tensor,
    visual: Tensor,
    text_mask: Tensor | None = None,
    visual_mask: Tensor | None = None,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """t[j] = max_i softmax_j(temperature * cos(text_i, visual_j)).

    The maximum over the text keeps a visual token that any single word asks for.

    Args:
        text: [..., T, D], input embeddings of the text, as the language model embeds them.
        visual: [..., N, D], visual tokens, as the projector hands them to the language model.
        text_mask: [..., T] bool, True where the text token counts. None: all count.
        visual_mask: [..., N] bool, True where the token shows a part of the image. None: all do.
        temperature: see `TEMPERATURE`.

    Returns:
        [..., N] float32, zero where `visual_mask` is False.
    """
    if not visual.is_cpu:
        return _text_attention_in_few_operations(text, visual, text_mask, visual_mask, temperature)
    text = normalize(text.float(), dim=-1)
    cosines = []
    for tokens in visual.split(_SLICE, dim=-2):
        tokens = tokens.float()
        norms = tokens.square().sum(dim=-1).sqrt().clamp_min(1e-12)
        cosines.append(text @ tokens.transpose(-1, -2) / norms.unsqueeze(-2))
    logits = temperature * torch.cat(cosines, dim=-1)
    if visual_mask is not None:
        logits = logits.masked_fill(~visual_mask.unsqueeze(-2), float("-inf"))
    attention = logits.softmax(dim=-1)
    if text_mask is not None:
        attention = attention.masked_fill(~text_mask.unsqueeze(-1), 0.0)
    return attention.amax(dim=-2)


def _text_attention_in_few_operations(
    text: Tensor, visual: Tensor, text_mask: Tensor | None, visual_mask: Tensor | None, temperature: float
) -> Tensor:
    """The same for devices where each operation is a launch: their number does not depend on N.

    It takes a float32 copy of `visual`, image by image where that is large.
    """
    at_a_time = max(1, _COPIED // max(1, 4 * math.prod(visual.shape[1:])))
    if visual.dim() > 2 and len(visual) > at_a_time and len(text) == len(visual):
        masks = (repeat(None) if mask is None else mask.split(at_a_time) for mask in (text_mask, visual_mask))
        return torch.cat(
            [
                _text_attention_in_few_operations(words, tokens, counted, shown, temperature)
                for words, tokens, counted, shown in zip(
                    text.split(at_a_time), visual.split(at_a_time), *masks, strict=False
                )
            ]
        )
    text, visual = text.float(), visual.float()
    text_norms, visual_norms = (torch.linalg.vector_norm(tokens, dim=-1) for tokens in (text, visual))
    products = text @ visual.transpose(-1, -2)
    norms = (text_norms.unsqueeze(-1) * visual_norms.unsqueeze(-2)).clamp_min(1e-12)
    if visual_mask is None:
        attention = (products / norms * temperature).softmax(dim=-1)
        if text_mask is not None:
            attention = attention.masked_fill(~text_mask.unsqueeze(-1), 0.0)
        return attention.amax(dim=-2)
    shown = visual_mask.log().unsqueeze(-2)  # 0 where True, -inf where False
    attention = torch.addcdiv(shown, products, norms, value=temperature).softmax(dim=-1)
    if text_mask is not None:  # nothing in `shown` is above an attention
        attention = attention.where(text_mask.unsqueeze(-1), shown)
    return attention.amax(dim=-2)


def class_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Visual saliency s[j]: the attention that [CLS] pays to patch j in one layer of the tower, mean over the heads.

    Args:
        query: [..., H, 1 + N, d] or [..., H, 1, d], queries of the layer; only that of [CLS], the first, is read.
        key: [..., H, 1 + N, d], keys of the layer, [CLS] first.
        scaling: factor on the dot product, d ** -0.5 in most towers.

    Returns:
        [..., N] float32. It sums to one minus the attention that [CLS] pays to itself.
    """
    logits = (query[..., :1, :].float() @ key.float().transpose(-1, -2)) * scaling
    return logits.softmax(dim=-1).mean(dim=-3)[..., 0, 1:]
