"""What the published AdaFV code does, to the letter, so that its tables can be reproduced: variant="published" of AdaFV.

All of its peculiarities come in through the contract of a method: it plans fewer tokens than asked for, arranges them as
its code does, and may keep one twice. Nothing else in this package knows of it.
"""

import torch
from torch import Tensor

from adafv.core import ImageLayout, published_search, published_tokens
from adafv.core.tokens import Kept, Plan, VisualTokens
from adafv.errors import BudgetError


def plan(layout: ImageLayout, keep: int) -> Plan:
    """Rounded down to a multiple of two tokens per crop; in the layout of the published code.

    Raises:
        BudgetError: nothing is left.
    """
    crops = layout.crops
    if keep < 2 * crops:
        raise BudgetError(
            f"keep={keep} leaves nothing in the published variant, which rounds down to a multiple of two tokens "
            f"per crop; this image has {crops} crop(s): give keep={2 * crops} or more"
        )
    return Plan(published_tokens(keep, crops), arranged=arranged(layout))


def arranged(layout: ImageLayout) -> ImageLayout | None:
    """Thumbnail, then the crops merged into one raster: no unpadding, no newline tokens. None: as it is."""
    if layout.tiling is None:
        return None
    vertical, horizontal = layout.tiling
    numbers = torch.arange(layout.crops * layout.rows * layout.columns).view(layout.crops, -1)
    raster = numbers[1:].view(vertical, horizontal, layout.rows, layout.columns).transpose(1, 2)
    source = torch.cat((numbers[0], raster.flatten()))
    return ImageLayout(source, layout.crops, layout.rows, layout.columns, layout.tiling)


def select(tokens: VisualTokens, text_attention: Tensor, keep: int) -> Kept:
    """The published search, crop by crop.

    Args:
        text_attention: [G, N].
    """
    crop_by_crop = tokens.source.argsort(dim=-1)
    saliency = tokens.saliency.gather(-1, crop_by_crop).unflatten(-1, (tokens.crops, -1))
    indices = published_search(text_attention, saliency, keep)
    once = torch.zeros_like(text_attention).scatter(-1, indices, 1.0)
    objective = ((once * text_attention).sum(-1) * (once * tokens.saliency).sum(-1)).sqrt()
    return Kept(indices, text_attention=text_attention, objective=objective)
