"""Several prompts in one row, as trainers pack them to waste no padding (TRL, ms-swift, nanoVLM).

Nothing says so but the positions, which start again at every prompt, or `cu_seq_lens_*`, the borders as flash attention
wants them. Every prompt of a row is a prompt of its own here: its words are compared with its images alone, its positions
close up by what it lost itself, its length is its own.

Whether one prompt may look at another is for the stock model to say, and it decides by what it is given: positions that
do not go up by one are a border where there is neither a mask nor a cache. So a packed row gets no mask from us, and the
padding that aligns rows of a batch is a prompt of its own in front.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adafv.core.sending import sent
from adafv.engines.transformers.families import Family
from adafv.engines.transformers.releases import cache_of
from adafv.errors import PromptError, UnsupportedCallError

BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Where packed prompts begin, and where the last one ends: [prompts + 1] int32, for a batch of one row."""
LONGEST = ("max_length_q", "max_length_k")
"""The length of the longest of them."""


@dataclass(frozen=True)
class Packing:
    """Which prompt of its row each column belongs to. All on the host."""

    segments: Tensor
    """[B, S] long, counted from 0 in each row."""
    apart: bool
    """Whether the stock model, called as it is, keeps the prompts of a row apart by their positions alone."""

    @property
    def starts(self) -> Tensor:
        """[B, S] long, the first column of the prompt that each column belongs to."""
        column = torch.arange(self.segments.shape[1]).expand_as(self.segments)
        return column.where(self._first, 0).cummax(1).values

    @property
    def _first(self) -> Tensor:
        return torch.nn.functional.pad(self.segments.diff(dim=1) != 0, (1, 0), value=True)


def read_packing(model: Any, family: Family, inputs: Mapping[str, Any], attended: Tensor) -> Packing | None:
    """The packed prompts of a call without cached tokens; None where every row is one prompt.

    Args:
        attended: [B, S] bool on the host.

    Raises:
        UnsupportedCallError, PromptError: `cu_seq_lens_*` that are not the borders of one row.
    """
    batch, length = attended.shape
    along = positions_along(family, inputs.get("position_ids"))
    no_mask = inputs.get("attention_mask") is None
    apart = no_mask and along is not None and cache_of(inputs) is None and not _makes_a_cache(model, inputs)
    begins = torch.zeros(batch, length, dtype=torch.bool)
    if along is not None and along.shape[-1] == length:
        along = along.expand(batch, -1).cpu()
        before = torch.nn.functional.pad(along, (1, 0))[:, :-1]
        # Where the stock model keeps prompts apart it takes any other step than one for a border; elsewhere only positions
        # that start again are one. Padding in front has whatever positions.
        steps_off = (along - before != 1) if apart else (along <= before)
        begins |= steps_off & attended & torch.nn.functional.pad(attended, (1, 0))[:, :-1]
    borders = inputs.get(BORDERS[0])
    if borders is not None:
        places = torch.as_tensor(borders).flatten().tolist()
        if batch != 1:
            raise UnsupportedCallError(
                f"{BORDERS[0]} describes prompts packed into one row, but the batch has {batch}; pack them into one"
            )
        if len(places) < 2 or places[0] != 0 or places[-1] != length or places != sorted(places):
            raise PromptError(
                f"{BORDERS[0]} goes from {places[0] if places else 'nowhere'} to {places[-1] if places else 'nowhere'}, but "
                f"the prompt has {length} tokens; give the ascending borders of all of it"
            )
        begins[0, places[1:-1]] = True
    begins[:, 0] = False
    return Packing(begins.long().cumsum(1), apart) if begins.any() else None


def positions_along(family: Family, positions: Any) -> Tensor | None:
    """Of `position_ids`, those that count along the prompt, [B or 1, S]; None where there are none.

    Families with M-RoPE take them as a first row in front of the others.
    """
    if not isinstance(positions, Tensor):
        return None
    if positions.dim() == 2:
        return positions if not family.rotary_axes else None
    return positions[0] if positions.dim() == 3 and positions.shape[0] == family.rotary_axes + 1 else None


def _makes_a_cache(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether `forward` will make a cache, as `use_cache`, the config and gradient checkpointing say."""
    use = inputs.get("use_cache")
    if use is None:
        use = getattr(inputs.get("generation_config"), "use_cache", None)
    if use is None:
        use = getattr(model.config.get_text_config(), "use_cache", None)
    checkpointing = model.training and torch.is_grad_enabled()
    if checkpointing and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return False
    return bool(use)


def shorten_borders(result: dict[str, Any], dropped: list[tuple[int, int]]) -> None:
    """Make `cu_seq_lens_*` and `max_length_*` speak of the shorter prompts.

    Args:
        dropped: (first column, tokens dropped) of every image of the one row.
    """
    for name, longest in zip(BORDERS, LONGEST, strict=True):
        if name not in result:
            continue
        given = torch.as_tensor(result[name])
        places = [place - sum(lost for first, lost in dropped if first < place) for place in given.flatten().tolist()]
        result[name] = sent(torch.tensor(places, dtype=given.dtype), given.device).view(given.shape)
        if longest in result:
            length = max(end - start for start, end in pairwise(places))
            was = result[longest]
            result[longest] = torch.full_like(was, length) if isinstance(was, Tensor) else length
