"""The oracle: pruned == the stock, unpruned model with the dropped placeholders zeroed in the attention mask.

What is dropped before the language model and what it may not look at are the same thing, as long as the positions of
the rest agree. So the oracle needs nothing of adafv but the mask of what was kept.
"""

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

STOCK_MIXES_UP_IMAGES = Version(transformers.__version__) < Version("5.23")
"""Older releases repeat several images of one prompt in the wrong order for beams and return sequences."""


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


def encoded_by_prompt(model: Any, inputs: dict[str, Any], image_token: int) -> dict[str, Any]:
    """`inputs` with all images encoded by the stock model, one entry per prompt: an order that no release mixes up."""
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(**images).pooler_output))
    counts = [int(row.sum()) for row in inputs["input_ids"] == image_token]
    encoded = BaseModelOutputWithPooling(pooler_output=list(features.split([count for count in counts if count])))
    rest = {name: value for name, value in inputs.items() if name not in images}
    return {**rest, "mm_encoder_outputs": {"image": encoded}}
