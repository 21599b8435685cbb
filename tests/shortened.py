"""The prompt that pruning leaves, made by hand: what a model must make of a pruned prompt, bit by bit.

The oracle (`oracle.py`) asks the stock model for the whole prompt with the dropped tokens masked. That needs a model in
which a masked token changes nothing else; where it does, as under LLM.int8 or behind virtual tokens, this is what is exact.
"""

from typing import Any

import torch
from models import PAD
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adafv import Record


def shortened_by_hand(model: Any, inputs: dict[str, Any], record: Record) -> dict[str, Any]:
    """`inputs`, padded on the left, without the dropped tokens, and with features that the stock model made.

    Nothing of adafv is in it but the choice.
    """
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    with torch.no_grad():
        features = model.get_image_features(**images).pooler_output
    by_prompt: dict[int, list[Tensor]] = {}
    for row, kept, tokens in zip(record.rows, record.kept, features, strict=True):
        by_prompt.setdefault(row, []).append(tokens[kept])
    stays = inputs["attention_mask"].bool() & record.keep_mask[:, -inputs["input_ids"].shape[1] :]
    prompts = [ids[here] for ids, here in zip(inputs["input_ids"], stays, strict=True)]
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), PAD)
    for row, prompt in zip(ids, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    mask = torch.stack([torch.arange(longest) >= longest - len(prompt) for prompt in prompts]).long()
    encoded = BaseModelOutputWithPooling(pooler_output=[torch.cat(parts) for parts in by_prompt.values()])
    return {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": {"image": encoded}}
