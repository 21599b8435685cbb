"""Prompts of different lengths in one batch, padded in front, as `generate` wants them. The one place where that is done."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Prompt:
    """One chat as the model takes it: tensors with one row, beside those of its pictures."""

    inputs: Mapping[str, Any]
    text: str = ""
    """As the template wrote it, before pictures were put in."""

    @property
    def length(self) -> int:
        """Columns of the prompt, with those of the pictures."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def shape(self) -> Hashable:
        """What prompts share that stand in one batch as they are: all but how long they are, and of how many parts."""
        return tuple(
            (name, () if self._runs_along(value) else tuple(value.shape[1:]), value.dtype)
            for name, value in sorted(self.inputs.items())
        )

    def cut(self, columns: int) -> "Prompt":
        """Without its last columns."""
        if not columns:
            return self
        inputs = {
            name: value[:, : self.length - columns] if self._runs_along(value) else value
            for name, value in self.inputs.items()
        }
        return Prompt(inputs, self.text)

    def _runs_along(self, value: Any) -> bool:
        return isinstance(value, Tensor) and tuple(value.shape[:2]) == (1, self.length)

    def padded(self, name: str, length: int, filling: int) -> Any:
        """An input, filled up in front where it runs along the prompt."""
        value = self.inputs[name]
        if not self._runs_along(value):
            return value
        missing = length - self.length
        return functional.pad(value, (0, 0) * (value.dim() - 2) + (missing, 0), value=filling)


def longest(prompts: Sequence[Prompt]) -> int:
    """Columns of the longest prompt."""
    return max(prompt.length for prompt in prompts)


def filling_of(tokenizer: Any) -> int:
    """The token that fills prompts up. Whatever it is, the attention mask says that it is not looked at."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(each) for each in found if each is not None)


def in_one_batch(prompts: Sequence[Prompt], filling: int) -> dict[str, Any]:
    """One batch. Pictures of several sizes are filled up with zeros behind, as processors do it."""
    length = longest(prompts)
    inputs = {}
    if "attention_mask" not in prompts[0].inputs:  # alone it is not needed, but here it tells padding from prompts
        masks = ({"attention_mask": torch.ones_like(prompt.inputs["input_ids"])} for prompt in prompts)
        prompts = [Prompt({**prompt.inputs, **mask}, prompt.text) for prompt, mask in zip(prompts, masks, strict=True)]
    for name in prompts[0].inputs:
        parts = [prompt.padded(name, length, filling if name == "input_ids" else 0) for prompt in prompts]
        inputs[name] = (
            _one_below_the_other(parts) if isinstance(parts[0], Tensor) else [x for part in parts for x in part]
        )
    return inputs


def _one_below_the_other(parts: Sequence[Tensor]) -> Tensor:
    if len({part.shape[1:] for part in parts}) > 1:
        largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        parts = [
            functional.pad(
                part, [x for size, own in zip(largest[::-1], part.shape[:0:-1], strict=True) for x in (0, size - own)]
            )
            for part in parts
        ]
    return torch.cat(list(parts))


def until_the_end(tokens: Sequence[int], ends: int | Sequence[int] | None) -> int:
    """Length of an answer, with the token that ends it; what is behind that in a batch is padding."""
    known = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return next((place for place, token in enumerate(tokens, 1) if token in known), len(tokens))
