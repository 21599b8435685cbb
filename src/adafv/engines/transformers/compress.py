"""`compress`: inputs of a model -> the same inputs with fewer image placeholders and already pruned image features.

The tokens to keep are counted before the tower runs, chosen after it, and taken out of everything that runs along the
prompt. Nothing inside the model changes: the result goes through the public arguments of its `generate` and `forward`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adafv.core import ImageLayout, tokens_to_keep
from adafv.engines.transformers.cache import (
    CacheContents,
    cached_length,
    contents_of,
    holds_pruned,
    remember,
)
from adafv.engines.transformers.choice import Choice, choose_tokens, encode_images
from adafv.engines.transformers.conversation import Conversation, new_images
from adafv.engines.transformers.prompt import (
    Compaction,
    PlacedImage,
    compact,
    nothing_removed,
)
from adafv.engines.transformers.record import Record, kv_bytes_per_token, timed
from adafv.engines.transformers.settings import Settings
from adafv.engines.transformers.text import text_columns
from adafv.errors import PromptError, UnsupportedCallError
from adafv.families import Encoded, Family, family_of
from adafv.methods import Method

_IGNORED_LABEL = -100


class CompressedInputs(dict[str, Any]):
    """Inputs for `model.generate(**...)` or `model(**...)`, with what was done to them."""

    record: Record | None = None
    """None where there was no image to prune."""
    compaction: Compaction
    """How the prompt became shorter, over the whole conversation where a cache is continued."""
    contents: CacheContents | None = None
    """What the cache will hold; None where that is what any cache would hold."""


def compress(
    model: Any,
    inputs: Mapping[str, Any],
    keep: int | float,
    *,
    method: str | Method = "adafv",
    positions: str = "compact",
    text: str | None = None,
    processor: Any = None,
    **parameters: Any,
) -> CompressedInputs:
    """Prune the visual tokens of `inputs`, as a processor made them, for one call of the stock model.

        inputs = processor(images=photo, text=prompt, return_tensors="pt")
        output = model.generate(**compress(model, inputs, keep=64), max_new_tokens=30)

    `generate` then returns the shorter prompt before the answer; `AdaFV` gives the caller's own prompt back, and sees to
    lengths, streamers and the next turn too. What is generated this way can be continued only on a cache that was passed
    here, empty, as `past_key_values`. Runs without gradients; to train through pruned tokens use `AdaFV`.

    Args:
        model: a supported model, wrapped or not. It is not changed.
        inputs: what the processor returned; not changed.
        keep, method, positions, text, processor, **parameters: see `Pruner`.

    Returns:
        The new inputs; what was kept is in their `record`.
    """
    settings = Settings.of(method, keep, positions, text, processor, **parameters)
    cache = inputs.get("past_key_values")
    if cached_length(cache) > 0 and contents_of(cache) is None:
        raise UnsupportedCallError("compress() cannot tell what this cache holds; to continue a conversation use AdaFV")
    with torch.no_grad():
        result = compress_call(model, family_of(model), settings, inputs, whole_conversation=True)
    if result.contents is not None:
        remember(cache, result.contents)
    return result


def compress_call(
    model: Any, family: Family, settings: Settings, inputs: Mapping[str, Any], *, whole_conversation: bool
) -> CompressedInputs:
    """`compress` for one call of `generate` or `forward`, with or without a cache.

    Args:
        whole_conversation: with a cache, whether the prompt repeats what is cached (`generate`) or not (`forward`).
    """
    seconds: dict[str, float] = {}
    result = CompressedInputs({name: value for name, value in inputs.items() if value is not None})
    images = {name: result.pop(name) for name in family.image_inputs if name in result}
    cache = result.get("past_key_values")
    encoded_already = bool(result.get("mm_encoder_outputs"))
    has_images = images.get("pixel_values") is not None and not encoded_already
    if not has_images and (encoded_already or not holds_pruned(cache)):
        result.update(images)
        return result

    with timed(seconds, "compaction"):
        call = Conversation.read(model, result, cache, whole_conversation)
        placed, images = new_images(model, family, settings.method, images if has_images else {}, call)
    if not placed and not call.prefix.changed:
        return result
    if "cache_position" in result:
        raise UnsupportedCallError("cache_position cannot be combined with pruned tokens; leave it out")

    keeps = [tokens_to_keep(settings.keep, image.layout.tokens) for image in placed]
    pruned = [keep < image.layout.tokens for keep, image in zip(keeps, placed, strict=True)]
    grids: list[tuple[int, int] | None] = [None] * len(placed)
    for i, image in enumerate(placed):
        if pruned[i]:
            grids[i] = settings.method.grid(keeps[i], image.layout)
            keeps[i] = settings.method.budget(keeps[i], image.layout)
    texts: list[Tensor | None] = [None] * len(placed)
    if settings.method.needs_text:
        texts = [
            text_columns(call.prompt, image, settings.scope, settings.template) if lose else None
            for image, lose in zip(placed, pruned, strict=True)
        ]

    encoded = Encoded([], None)
    if placed:
        with timed(seconds, "tower"):
            encoded = encode_images(model, family, settings.method, images, pruned, grids)
    with timed(seconds, "selection"):
        choices = choose_tokens(model, family, settings.method, placed, keeps, grids, encoded, texts, call)
    with timed(seconds, "compaction"):
        dropped = [0] * call.prompt.tokens.shape[0]
        stays = torch.ones(call.prompt.tokens.shape, dtype=torch.bool, device=call.device)
        for image, choice in zip(placed, choices, strict=True):
            columns = image.columns.to(call.device)
            dropped[image.row] += image.layout.tokens - choice.places.numel()
            stays[image.row, columns] = False
            stays[image.row, columns[choice.places.to(call.device)]] = True
        compaction = compact(call.prompt.attended, dropped, stays)
        result.compaction = call.prefix.then(compaction)
        _take_out(model, result, call, result.compaction, compaction, settings.positions, whole_conversation)
        if placed:
            result["mm_encoder_outputs"] = {"image": _by_prompt(placed, choices)}
    cached = contents_of(cache)
    tokens = cached.tokens if call.tokens is None and cached is not None else call.tokens
    result.contents = CacheContents(result.compaction, tokens)
    if placed:
        result.record = _record(model, call, placed, choices, result.compaction, seconds)
    return result


def _by_prompt(placed: list[PlacedImage], choices: list[Choice]) -> BaseModelOutputWithPooling:
    """The kept features, one entry per prompt that has images.

    Models read the entries one after the other, so one entry per image would do; but for beams and several return
    sequences `generate` repeats the entries, and transformers 5.18 repeats the images of one prompt in the wrong order.
    """
    features: dict[int, list[Tensor]] = {}
    for image, choice in zip(placed, choices, strict=True):
        features.setdefault(image.row, []).append(choice.features)
    return BaseModelOutputWithPooling(pooler_output=[torch.cat(parts) for parts in features.values()])  # type: ignore[arg-type]


def _take_out(
    model: Any,
    result: dict[str, Any],
    call: Conversation,
    whole: Compaction,
    compaction: Compaction,
    positions: str,
    whole_conversation: bool,
) -> None:
    """Take the dropped columns out of everything that runs along the prompt.

    Args:
        whole: over the cached columns and the new ones.
        compaction: over the new ones alone.
    """
    batch, new = call.prompt.tokens.shape
    fills = {
        "input_ids": _padding_id(model),
        "inputs_embeds": 0.0,
        "attention_mask": 0,
        "labels": _IGNORED_LABEL,
        "token_type_ids": 0,
        "mm_token_type_ids": 0,
    }
    _move_positions(result, call, whole, compaction, positions, whole_conversation)
    for name, fill in fills.items():
        values = result.get(name)
        if not isinstance(values, Tensor) or values.dim() < 2 or values.shape[1] == 0:
            continue
        if values.shape[1] == whole.length:
            result[name] = whole.take(values, fill)
        elif values.shape[1] == new:
            result[name] = compaction.take(values, fill)
        elif name == "attention_mask" and values.shape[1] == call.prefix.columns.shape[1] + new:
            cached = nothing_removed(batch, call.prefix.columns.shape[1], compaction.columns.device)
            result[name] = cached.then(compaction).take(values, fill)
        else:
            raise PromptError(f"{name} is {list(values.shape)}, but the prompt is [{batch}, {new}]")
    if result.get("attention_mask") is None and (whole.columns < 0).any():
        result["attention_mask"] = (whole.columns >= 0).long()
    if whole.changed and isinstance(result.get("logits_to_keep"), Tensor):
        raise UnsupportedCallError("logits_to_keep must be a number with pruned tokens: the columns of the prompt move")


def _move_positions(
    result: dict[str, Any],
    call: Conversation,
    whole: Compaction,
    compaction: Compaction,
    positions: str,
    whole_conversation: bool,
) -> None:
    """Set `position_ids` where the stock model would not come to them by itself.

    "compact": tokens move up, as if the dropped ones had never been there; that is what the stock model does with a
    shorter prompt. "original": each token keeps the position that it has in the full prompt.
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
            given = given[:, -new:]
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


def _record(
    model: Any,
    call: Conversation,
    placed: list[PlacedImage],
    choices: list[Choice],
    compaction: Compaction,
    seconds: dict[str, float],
) -> Record:
    batch, given = call.prompt.tokens.shape[0], call.is_image.shape[1]
    columns = compaction.columns
    keep_mask = torch.zeros(batch, compaction.length + 1, dtype=torch.bool, device=columns.device)
    keep_mask = keep_mask.scatter(1, columns.where(columns >= 0, compaction.length), True)[:, :-1]
    first_new = compaction.length - call.prompt.length
    kept = []
    for image, choice in zip(placed, choices, strict=True):
        if choice.layout is image.layout:
            kept.append(choice.kept)
            continue
        # The published layout: say it in the stock model's own, which cuts padding off and adds newlines.
        kept.append(_restate(torch.arange(image.layout.tokens), image.layout, choice.layout, -1)[choice.kept.cpu()])
        stays = torch.zeros(image.layout.tokens, dtype=torch.bool)
        stays[kept[-1][kept[-1] >= 0]] = True
        keep_mask[image.row, (image.columns + first_new).to(columns.device)] = stays.to(columns.device)
        choice.saliency, choice.text_attention = (
            None if scores is None else _restate(scores, choice.layout, image.layout, float("nan"))
            for scores in (choice.saliency, choice.text_attention)
        )
    places = [choice.layout.place(choice.kept) for choice in choices]
    bytes_per_token = kv_bytes_per_token(model)
    return Record(
        kept=kept,
        keep_mask=keep_mask[:, compaction.length - given :],
        rows=[image.row for image in placed],
        layouts=[image.layout for image in placed],
        crop=[place[0] for place in places],
        row=[place[1] for place in places],
        column=[place[2] for place in places],
        saliency=[choice.saliency for choice in choices],
        text_attention=[choice.text_attention for choice in choices],
        objective=[choice.objective for choice in choices],
        certificate=[choice.certificate for choice in choices],
        tokens_before=[image.layout.tokens for image in placed],
        tokens_after=[choice.kept.numel() for choice in choices],
        prompt_length_before=compaction.length,
        prompt_length_after=columns.shape[1],
        kv_bytes_before=batch * compaction.length * bytes_per_token,
        kv_bytes_after=batch * columns.shape[1] * bytes_per_token,
        seconds=seconds,
    )


def _restate(values: Tensor, own: ImageLayout, other: ImageLayout, missing: Any) -> Tensor:
    """Values per token of `own` ([N]), in the order of the tokens of `other`; `missing` where `own` lacks the patch."""
    by_patch = torch.full((own.crops * own.rows * own.columns,), missing, dtype=values.dtype, device=values.device)
    shows = own.shows_patch.to(values.device)
    by_patch = by_patch.scatter(0, own.source.to(values.device)[shows], values[shows])
    source = other.source.to(values.device)
    return by_patch[source.clamp_min(0)].masked_fill(source < 0, missing)


def _padding_id(model: Any) -> int:
    for config in (getattr(model, "generation_config", None), model.config.get_text_config(), model.config):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(config, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and value >= 0 and value != model.config.image_token_id:
                return value
    return 0
