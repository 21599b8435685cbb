"""Reading the prompt of a call, on the host: the one wait for the device of a call.

A prompt is [batch, length]: rows of tokens, one column per token.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafv.engines.transformers.families import Family
from adafv.errors import PromptError, StaleImagesError, UnsupportedCallError
from adafv.prompts.prompt import Prompt, any_of, special_tokens

WEIGHTS_CHANGED = "weights of the vision tower or the projector have changed since these images were encoded"
ENCODE_AGAIN = "encode the images again: adafv.encode(model, inputs)"


def visuals_of(family: Family, inputs: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Take the images and videos out of `inputs`: per modality that is present, and all of them together."""
    if not family.videos and "pixel_values_videos" in inputs:
        raise UnsupportedCallError(
            f"videos are not supported for {family.name}; pass the frames as images, if it takes several"
        )
    names = {name for modality in family.modalities for name in family.inputs(modality)}
    taken = {name: inputs.pop(name) for name in list(inputs) if family.named(name) in names}
    known = {family.named(name): value for name, value in taken.items()} | taken
    visuals: dict[str, dict[str, Any]] = {}
    for modality in family.modalities:
        mine = {name: known[name] for name in family.inputs(modality) if name in known}
        if family.inputs(modality)[0] in mine:
            visuals[modality] = _Visuals(mine)
    return visuals, taken


class _Visuals(dict[str, Any]):
    """The inputs of one modality. What the family asks for and the caller left out is named."""

    def __missing__(self, name: str) -> Any:
        raise PromptError(
            f"{name} is missing beside {', '.join(self)}; pass all that the processor returned: model(**inputs) or "
            "model.generate(**inputs)"
        )


def read_prompt(model: Any, family: Family, inputs: Mapping[str, Any], same: Tensor | None = None) -> Prompt:
    """Read `input_ids` (or `inputs_embeds`) and `attention_mask`.

    In `inputs_embeds` the special tokens are found as the stock models find placeholders: by their embedding.

    Args:
        same: one bool, on the device, read with the prompt: whether the weights are those that images were encoded with.

    Raises:
        StaleImagesError: they are not.
        UnsupportedCallError: the attention mask is not [batch, length].
        PromptError: ids and mask differ in shape.
    """
    visual = {family.placeholder(model, modality) for modality in family.modalities}
    ends, specials = special_tokens(model.config, getattr(model, "generation_config", None), visual)
    given, mask = given_prompt(inputs), inputs.get("attention_mask")
    if mask is not None and check_mask(mask).shape != given.shape[:2]:
        raise PromptError(f"attention_mask is {list(mask.shape)}, but the prompt is {list(given.shape[:2])}")
    if given.dim() == 2 and given.device.type != "cpu":
        beside = {"mask": mask, "same": same}
        along = {name: value for name, value in beside.items() if value is not None and value.device == given.device}
        stacked = (given, *((value != 0).to(given.dtype).expand_as(given) for value in along.values()))
        tokens, *read = torch.stack(stacked).cpu().unbind()  # one wait, not one for each
        beside.update(zip(along, read, strict=True))
        mask, same = beside["mask"], beside["same"]
    elif given.dim() == 2:
        tokens = given.cpu()
    else:
        tokens = torch.full(given.shape[:2], -1)
        table = model.get_input_embeddings()
        for token in visual | specials:
            if token >= table.weight.shape[0]:
                continue  # configs name tokens that the model lacks
            embedding = table(torch.tensor([[token]], device=given.device))[0, 0].to(given.dtype)
            tokens[(given == embedding).all(-1).cpu()] = token
    check_same_weights(same)
    attended = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.cpu() != 0
    is_special, is_end = any_of(tokens, specials), any_of(tokens, ends)
    prompt = Prompt(tokens, attended, family.placeholders(model, tokens), is_end, is_special)
    for modality in family.modalities:
        for row, start, stop in family.markers(prompt.runs(modality)):
            is_special[row, start:stop] = True
    return prompt


def check_same_weights(same: Tensor | None) -> None:
    """Raise where images were encoded with other weights than the model's.

    Raises:
        StaleImagesError: they were.
    """
    if same is not None and not same.all():
        raise StaleImagesError(f"{WEIGHTS_CHANGED}; {ENCODE_AGAIN}")


def given_prompt(inputs: Mapping[str, Any]) -> Tensor:
    """`input_ids` [B, S], or where there are none `inputs_embeds` [B, S, D].

    Raises:
        PromptError: there is neither.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is not None and ids.shape[1] > 0:
        return ids
    if embeds is None:
        raise PromptError("there is no prompt: give input_ids or inputs_embeds beside the images")
    return embeds


def check_mask(mask: Any) -> Tensor:
    """Return `mask`, or raise UnsupportedCallError where it is not [batch, length]."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UnsupportedCallError("attention_mask must be a tensor [batch, length]; custom 4-D masks cannot be pruned")
    return mask
