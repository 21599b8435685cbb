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

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafv.core.sending import sent
from adafv.engines.transformers.cache import contents_of
from adafv.engines.transformers.call import Call
from adafv.engines.transformers.compaction import Compaction
from adafv.engines.transformers.packing import positions_along
from adafv.engines.transformers.releases import cache_of
from adafv.engines.transformers.settings import setting
from adafv.errors import CacheError, PromptError, UnsupportedCallError


def set_linear_positions(call: Call, stays: Tensor) -> None:
    """Set `position_ids` [B, S'] where the stock model would not come to them by itself.

    Args:
        stays: [B, new] bool, which of the new columns are not dropped.
    """
    result, positions, family = call.inputs, call.settings.positions, call.family
    whole, compaction = result.compaction, result.new
    given = result.get("position_ids")
    if not whole.changed or (given is None and positions == "compact"):
        return
    batch, new = call.prompt.tokens.shape
    length = call.prefix.length + new
    if given is None:
        mask = result.get("attention_mask")
        given = torch.arange(length, device=call.device).expand(batch, length)
        if call.generates and isinstance(mask, Tensor) and mask.shape[1] == length:
            given = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
        elif not call.generates:
            given = family.places(given[:, -new:])
    given = given.expand(batch, -1)
    if given.shape[1] not in (length, new):
        raise PromptError(f"position_ids is {list(given.shape)}, but the prompt is [{batch}, {length}]")
    part = whole if given.shape[1] == length else compaction
    if positions == "compact":
        given = given - sent(_lost_in_front(call, stays, given.shape[1]), given.device)
    given = _from_zero(call, given)
    result["position_ids"] = _padded(call, part, part.take(given, 0))
    if call.packed and positions == "original" and compaction.changed:
        raise UnsupportedCallError(
            "positions='original' leaves gaps, which the stock model takes for borders between prompts packed into one row; "
            "use positions='compact', or one prompt per row with an attention_mask"
        )
    if not call.packed and result.get("attention_mask") is None:
        # Without a mask, stock models take a gap in the positions for the border between prompts packed into one row.
        result["attention_mask"] = torch.ones(batch, length, dtype=torch.long, device=call.device)


def needs_guard(call: Call) -> bool:
    """Whether the shorter prompt needs a column of padding so that gaps in its positions are not taken for borders.

    Stock models do take them so where they see no mask, and some drop a mask that masks nothing: flash attention always,
    `generate` before it runs without a cache.
    """
    if call.settings.positions != "original" or call.family.rotary_axes or call.packed:
        return False
    without_cache = call.generates and setting(call.model, call.inputs, "use_cache") is False
    return without_cache or "flash" in str(call.model.config.get_text_config()._attn_implementation)


def _lost_in_front(call: Call, stays: Tensor, width: int) -> Tensor:
    """[B, width]: how many tokens were dropped in front of each of the last columns, in the prompt that it belongs to."""
    dropped = (~stays).long()
    lost = dropped.cumsum(1) - dropped
    if call.packing is not None:
        lost = lost - lost.gather(1, call.packing.starts.to(lost.device))
    lost = lost + call.prefix.lost.to(lost.device).unsqueeze(1)
    return torch.nn.functional.pad(lost, (width - lost.shape[1], 0))  # what is cached has its positions


def _from_zero(call: Call, positions: Tensor) -> Tensor:
    """Positions of packed prompts after the first one, from 0: so that a border stays one however the first one ends."""
    if not call.packed:
        return positions
    assert call.packing is not None
    starts = call.packing.starts.to(positions.device)
    return positions - positions.gather(1, starts).where(starts > 0, 0)


def _padded(call: Call, part: Compaction, moved: Tensor) -> Tensor:
    """Padding that was put in front of packed prompts must be no part of the first one: see `adafv...packing`."""
    if not call.packed:
        return moved
    padding = part.columns.to(moved.device) < 0
    first = padding.sum(1, keepdim=True).clamp_max(moved.shape[1] - 1)
    return moved.where(~padding, moved.gather(1, first) + 1)


def set_rotary_positions(call: Call, stays: Tensor) -> tuple[Tensor, Tensor]:
    """Set `position_ids` [R, B, S'] or, for `generate` and where it is given so, [1 + R, B, S'], whose first row counts
    along the prompt.

    Args:
        stays: [B, new] bool, which of the new columns are not dropped.

    Returns:
        What a cache must remember, each [B]: by how much the next position is above the number of attended tokens, and
        that number.
    """
    result, family = call.inputs, call.family
    whole, compaction = result.compaction, result.new
    batch, new = call.prompt.tokens.shape
    attended = call.prompt.attended.long()
    before, delta = _cached(call, result)
    given = result.get("position_ids")
    if given is None:
        # On the host, where the stock code's many small steps and looks at values cost no launch and no wait.
        sizes = {modality: _without_pixels(entries) for modality, entries in call.visuals.items()}
        fresh = family.positions(call.model, call.prompt.tokens, attended, sizes)
        fresh = fresh + (before + delta).to(fresh.device)[None, :, None]
    else:
        fresh = (given[-family.rotary_axes :] if given.dim() == 3 else given).expand(family.rotary_axes, batch, -1)
        if fresh.shape[-1] not in (call.prefix.length + new, new):
            raise PromptError(
                f"position_ids is {list(given.shape)}, but the prompt has {call.prefix.length + new} columns"
            )
        fresh = fresh[..., -new:]
    total = before + attended.sum(1)
    reached = fresh.masked_fill(~sent(call.prompt.attended, fresh.device), -1).amax(dim=(0, 2)).cpu() + 1
    fresh = sent(fresh, call.device)

    part, covers_cache = compaction, call.tokens is not None and call.prefix.length > 0
    if covers_cache:  # what is cached has its positions; these are never read
        part, fresh = whole, torch.cat((fresh.new_zeros(*fresh.shape[:2], call.prefix.length), fresh), dim=-1)
    moved = part.take(fresh.permute(1, 2, 0), 0).permute(2, 0, 1)
    along = None if call.prefix.length and call.generates else positions_along(family, given)
    if along is not None:
        along = along.expand(batch, -1)
        along = _from_zero(call, along - _lost_in_front(call, stays, along.shape[1]).to(along.device))
        along = _padded(call, compaction, compaction.take(along[:, -new:], 0))
        moved = torch.cat((along[None], moved))
    elif call.generates:
        mask = result.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape[1] == part.length:
            along = (part.take(mask.long(), 0).cumsum(-1) - 1).clamp_min(0)
        else:
            along = ((part.columns >= 0).long().cumsum(-1) - 1).clamp_min(0).to(moved.device)
        moved = torch.cat((along.to(moved)[None], moved))
    result["position_ids"] = moved
    return reached - total, total


def _without_pixels(visuals: Mapping[str, Any]) -> dict[str, Any]:
    """What says how large images are, on the host."""
    return {
        name: value.cpu() if isinstance(value, Tensor) else value
        for name, value in visuals.items()
        if not name.startswith("pixel")
    }


def _cached(call: Call, result: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(attended tokens in the cache, how far positions are ahead of them), each [B]."""
    batch, length = call.prompt.tokens.shape[0], call.prefix.length
    if not length:
        nothing = torch.zeros(batch, dtype=torch.long)
        return nothing, nothing
    contents = contents_of(cache_of(result))
    if contents is None or contents.position_delta is None or contents.attended is None:
        unknown = call.tokens is None or bool(call.given.is_visual[:, :length].any())
        if unknown:
            raise CacheError(
                "this cache was filled outside adafv, so the positions of its images are not known; start the conversation "
                "inside the `with` block, or without a cache"
            )
        delta, attended = torch.zeros(batch, dtype=torch.long), torch.full((batch,), length)
    elif length < contents.compaction.length:
        raise CacheError("a cropped cache cannot be continued with M-RoPE positions; start without a cache")
    else:
        delta, attended = contents.position_delta, contents.attended + (length - contents.compaction.length)
    mask = result.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape[1] == length + call.prompt.length:
        attended = mask[:, :length].long().sum(1).cpu()
    return attended, delta
