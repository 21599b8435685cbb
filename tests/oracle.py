"""The oracle: pruned == the stock, unpruned model with the dropped placeholders zeroed in the attention mask.

What is dropped before the language model and what it may not look at are the same thing, as long as the positions of
the rest agree. So the oracle needs nothing of adafv but the mask of what was kept.
"""

from typing import Any

import torch
from torch import Tensor


def masked_inputs(inputs: dict[str, Any], keep_mask: Tensor, positions: str = "compact") -> dict[str, Any]:
    """Inputs for the stock model under which it sees exactly the kept tokens."""
    given = inputs.get("attention_mask")
    given = torch.ones_like(keep_mask, dtype=torch.long) if given is None else given
    mask = given * keep_mask
    counted = mask if positions == "compact" else given
    position_ids = (counted.cumsum(-1) - 1).clamp_min(0)
    return {**inputs, "attention_mask": mask, "position_ids": position_ids}


def kept_logits(logits: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits of the attended tokens of each prompt: [B, S, V], [B, S] -> B times [attended, V]."""
    return [row[attended.bool()] for row, attended in zip(logits, mask, strict=True)]
