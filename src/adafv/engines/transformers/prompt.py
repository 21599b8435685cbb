"""Reading the prompt of a call, and taking columns out of it.

A prompt is [batch, length]: rows of tokens, one column per token. Its layout is read once, on the host (the one
synchronisation of a call); which tokens stay is known on the device alone, so columns are taken out there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adafv.errors import PromptError, UnsupportedCallError
from adafv.families import Family
from adafv.prompts.prompt import Prompt, any_of, special_tokens


def read_prompt(model: Any, family: Family, inputs: Mapping[str, Any]) -> Prompt:
    """Read `input_ids` (or `inputs_embeds`) and `attention_mask`.

    In `inputs_embeds` the special tokens are found as the stock models find placeholders: by their embedding.

    Raises:
        UnsupportedCallError: the attention mask is not [batch, length].
        PromptError: ids and mask differ in shape.
    """
    visual = {family.placeholder(model, modality) for modality in family.modalities}
    ends, specials = special_tokens(model.config, getattr(model, "generation_config", None), visual)
    given = given_prompt(inputs)
    if given.dim() == 2:
        tokens = given.cpu()
    else:
        tokens = torch.full(given.shape[:2], -1)
        table = model.get_input_embeddings()
        for token in visual | specials:
            if token >= table.weight.shape[0]:
                continue  # configs name tokens that the model lacks
            embedding = table(torch.tensor(token, device=given.device)).to(given.dtype)
            tokens[(given == embedding).all(-1).cpu()] = token
    mask = inputs.get("attention_mask")
    if mask is None:
        attended = torch.ones_like(tokens, dtype=torch.bool)
    elif check_mask(mask).shape != tokens.shape:
        raise PromptError(f"attention_mask is {list(mask.shape)}, but the prompt is {list(tokens.shape)}")
    else:
        attended = mask.cpu() != 0
    is_special, is_end = any_of(tokens, specials), any_of(tokens, ends)
    prompt = Prompt(tokens, attended, family.placeholders(model, tokens), is_end, is_special)
    for modality in family.modalities:
        for row, start, stop in family.markers(prompt.runs(modality)):
            is_special[row, start:stop] = True
    return prompt


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


@dataclass(frozen=True)
class Compaction:
    """Which columns of a prompt stay, row by row."""

    columns: Tensor
    """[B, S'] long on the device: the column that each new column was; -1 for padding put in."""
    length: int
    """S, columns before."""
    changed: bool
    """Whether any row lost a column."""

    @property
    def removed(self) -> int:
        """Columns fewer than before, the same for every row."""
        return self.length - self.columns.shape[1]

    def take(self, values: Tensor, fill: Any) -> Tensor:
        """[B, S, ...] -> [B, S', ...]; padding put in gets `fill`."""
        columns = self.columns.to(values.device)
        index, padding = columns.clamp_min(0), columns < 0
        if values.dim() == 3:
            index = index.unsqueeze(-1).expand(*index.shape, values.shape[-1])
            padding = padding.unsqueeze(-1)
        return values.gather(1, index).masked_fill(padding, fill)

    @property
    def lost(self) -> Tensor:
        """[B] long, tokens that each row lost; padding does not count."""
        real = self.columns >= 0
        if self.columns.shape[1] == 0:
            return real.sum(1)
        first = self.columns.where(real, self.length).amin(1)
        last = self.columns.amax(1)
        return (last - first + 1 - real.sum(1)).clamp_min(0)

    def then(self, after: "Compaction") -> "Compaction":
        """Both, side by side: `after` is about the columns that follow these."""
        shifted = after.columns.where(after.columns < 0, after.columns + self.length)
        columns = torch.cat((self.columns.to(shifted.device), shifted), dim=1)
        return Compaction(columns, self.length + after.length, self.changed or after.changed)


def nothing_removed(batch: int, length: int, device: torch.device | None = None) -> Compaction:
    """The compaction that leaves [batch, length] as it is."""
    return Compaction(torch.arange(length, device=device).expand(batch, length), length, changed=False)


def compact(attended: Tensor, dropped: list[int], stays: Tensor) -> Compaction:
    """Take out the columns where `stays` is False.

    Rows that lose different numbers of columns are aligned again by their padding: padding is taken away where a row
    has more than it needs, and put in where it has too little, on the side where the batch has it (left if it has
    none: generation continues on the right). The new length is as small as the longest row allows, but never smaller
    than the row that loses most would be, so that prompts padded to a fixed length keep a fixed length.

    Args:
        attended: [B, S] bool on the host.
        dropped: per row, the number of columns that `stays` takes out; known on the host before `stays` is.
        stays: [B, S] bool on the device.
    """
    batch, length = attended.shape
    if not any(dropped):
        return nothing_removed(batch, length, stays.device)
    # From the first attended column to the last: what is masked inside that span stays, and stays masked.
    inside = attended.cumsum(1).bool() & attended.flip(1).cumsum(1).flip(1).bool()
    new_length = max(int((inside.sum(1) - torch.tensor(dropped)).max()), length - max(dropped))
    padded_left, padded_right = not inside[:, 0].all(), not inside[:, -1].all()

    wanted = stays & inside.to(stays.device)
    place = wanted.cumsum(1) - 1
    if padded_left or not padded_right:
        place = place + new_length - wanted.sum(1, keepdim=True)
    place = place.masked_fill(~wanted, new_length)  # one column beyond the end takes what is not wanted
    columns = torch.full((batch, new_length + 1), -1, device=stays.device)
    columns = columns.scatter(1, place, torch.arange(length, device=stays.device).expand(batch, length))
    return Compaction(columns[:, :new_length], length, changed=True)
