"""Positions of the tokens that stay.

Most language models count positions along the prompt. "compact" then lets tokens move up, as if the dropped ones had
never been there, which is what the stock model does with a shorter prompt; "original" leaves each token the position it
has in the full prompt.

Qwen and its kin (M-RoPE) give a visual token a position in time, height and width, and an image as many positions as its
longer side has tokens. Dropping tokens leaves no gap there, so both settings mean the same: every token keeps its place
in the picture, and the text after an image its distance from it. The stock model works such positions out from the
sizes of the images, keeps what it needs for the next turn on the model, and would be wrong about a shorter prompt; here
they are worked out from the full prompt, by the stock model's own code, and kept beside the cache.
"""

from typing import Any

import torch
from torch import Tensor

from adafv.engines.transformers.cache import contents_of
from adafv.engines.transformers.conversation import Conversation
from adafv.engines.transformers.prompt import Compaction
from adafv.errors import CacheError, PromptError
from adafv.families import Family


def set_linear_positions(
    family: Family,
    result: dict[str, Any],
    call: Conversation,
    whole: Compaction,
    compaction: Compaction,
    positions: str,
    whole_conversation: bool,
) -> None:
    """Set `position_ids` [B, S'] where the stock model would not come to them by itself.

    Args:
        result: the inputs, with whatever the caller gave.
        whole: over the cached columns and the new ones.
        compaction: over the new ones alone.
        positions: "compact" or "original".
        whole_conversation: whether the prompt repeats what is cached.
    """
    given = result.get("position_ids")
    if given is None and positions == "compact":
        return
    batch, new = call.prompt.tokens.shape
    length = call.prefix.length + new
    if given is None:
        mask = result.get("attention_mask")
        given = torch.arange(length, device=call.device).expand(batch, length)
        if whole_conversation and isinstance(mask, Tensor) and mask.shape[1] == length:
            given = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
        elif not whole_conversation:
            given = given[:, -new:] + family.first_position
    given = given.expand(batch, -1)
    if given.shape[1] not in (length, new):
        raise PromptError(f"position_ids is {list(given.shape)}, but the prompt is [{batch}, {length}]")
    part = whole if given.shape[1] == length else compaction
    moved = part.take(given, 0)
    if positions == "compact":
        columns = part.columns.to(moved.device)
        before = torch.zeros(batch, 1, dtype=torch.long, device=moved.device)
        if part is compaction and call.prefix.length:
            before = call.prefix.lost.to(moved.device).unsqueeze(1)
        # A token's position falls by the number of tokens that its row lost in front of it.
        first = columns.where(columns >= 0, part.length).amin(1, keepdim=True)
        lost = columns - first - ((columns >= 0).cumsum(1) - 1)
        moved = (moved - before - lost).where(columns >= 0, 0)
    result["position_ids"] = moved
    if result.get("attention_mask") is None:
        # Without a mask, stock models take a gap in the positions for the border between prompts packed into one row.
        result["attention_mask"] = torch.ones(batch, length, dtype=torch.long, device=call.device)


def set_rotary_positions(
    model: Any,
    family: Family,
    result: dict[str, Any],
    call: Conversation,
    visuals: dict[str, dict[str, Any]],
    whole: Compaction,
    compaction: Compaction,
) -> tuple[Tensor, Tensor]:
    """Set `position_ids` [R, B, S'] or, for `generate`, [1 + R, B, S'], whose first row counts along the prompt.

    Args:
        result: the inputs, not yet shortened.
        visuals: of the images whose placeholders are new.

    Returns:
        What a cache must remember, each [B]: by how much the next position is above the number of attended tokens, and
        that number.
    """
    batch, new = call.prompt.tokens.shape
    attended = call.prompt.attended.long()
    before, delta = _cached(call, result)
    given = result.get("position_ids")
    if given is None:
        fresh = family.positions(model, call.prompt.tokens.to(call.device), attended.to(call.device), visuals)
        fresh = fresh + (before + delta).to(fresh.device)[None, :, None]
    else:
        fresh = given[-family.rotary_axes :] if given.dim() == 3 else given.expand(family.rotary_axes, batch, -1)
        if fresh.shape[-1] not in (call.prefix.length + new, new):
            raise PromptError(
                f"position_ids is {list(given.shape)}, but the prompt has {call.prefix.length + new} columns"
            )
        fresh = fresh[..., -new:]
    total = before + attended.sum(1)
    reached = fresh.masked_fill(~call.prompt.attended.to(fresh.device), -1).amax(dim=(0, 2)).cpu() + 1

    part, covers_cache = compaction, call.tokens is not None and call.prefix.length > 0
    if covers_cache:  # what is cached has its positions; these are never read
        part, fresh = whole, torch.cat((fresh.new_zeros(*fresh.shape[:2], call.prefix.length), fresh), dim=-1)
    moved = part.take(fresh.permute(1, 2, 0), 0).permute(2, 0, 1)
    if call.generates:
        mask = result.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape[1] == part.length:
            along = (part.take(mask.long(), 0).cumsum(-1) - 1).clamp_min(0)
        else:
            along = ((part.columns >= 0).long().cumsum(-1) - 1).clamp_min(0).to(moved.device)
        moved = torch.cat((along.to(moved)[None], moved))
    result["position_ids"] = moved
    return reached - total, total


def _cached(call: Conversation, result: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(attended tokens in the cache, how far positions are ahead of them), each [B]."""
    batch, length = call.prompt.tokens.shape[0], call.prefix.length
    if not length:
        nothing = torch.zeros(batch, dtype=torch.long)
        return nothing, nothing
    contents = contents_of(result["past_key_values"])
    if contents is None or contents.position_delta is None or contents.attended is None:
        unknown = call.tokens is None or bool(call.given.is_visual[:, :length].any())
        if unknown:
            raise CacheError(
                "this cache was filled outside adafv, so the positions of its images are not known; start the conversation "
                "inside the `with` block, or without past_key_values"
            )
        delta, attended = torch.zeros(batch, dtype=torch.long), torch.full((batch,), length)
    elif length < contents.compaction.length:
        raise CacheError("a cropped cache cannot be continued with M-RoPE positions; start without past_key_values")
    else:
        delta, attended = contents.position_delta, contents.attended + (length - contents.compaction.length)
    mask = result.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape[1] == length + call.prompt.length:
        attended = mask[:, :length].long().sum(1).cpu()
    return attended, delta
