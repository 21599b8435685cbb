"""`compress`: inputs of a model -> the same inputs with fewer image placeholders and already pruned image features.

The tokens to keep are counted before the tower runs, chosen after it, and taken out of everything that runs along the
prompt. Nothing inside the model changes: the result goes through the public arguments of its `generate` and `forward`.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adafv.core import ImageLayout, tokens_to_keep
from adafv.engines.transformers.cache import (
    CacheContents,
    cached_length,
    contents_of,
    forget,
    holds_pruned,
    positions_known,
    remember,
)
from adafv.engines.transformers.choice import Choice, choose_tokens, encode_images
from adafv.engines.transformers.conversation import Conversation, new_images
from adafv.engines.transformers.devices import host_by_default
from adafv.engines.transformers.families import CallWithImages, Family, family_of
from adafv.engines.transformers.families.base import stock_model
from adafv.engines.transformers.packing import BORDERS, LONGEST, shorten_borders
from adafv.engines.transformers.positions import needs_guard, set_linear_positions, set_rotary_positions
from adafv.engines.transformers.prompt import Compaction, compact, nothing_removed
from adafv.engines.transformers.record import Record, kv_bytes, timed
from adafv.engines.transformers.releases import NEWEST_TESTED, OLDEST_TESTED, cache_of, warn_if_untested
from adafv.engines.transformers.settings import Settings
from adafv.errors import NoWordsError, PromptError, UnsupportedCallError
from adafv.methods import Method
from adafv.prompts.prompt import PlacedImage
from adafv.prompts.text import text_columns

_IGNORED_LABEL = -100

ALONG_THE_PROMPT = {
    "inputs_embeds": 0.0,
    "attention_mask": 0,
    "labels": _IGNORED_LABEL,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "seq_idx": 0,
}
"""Arguments that have a column per token of the prompt, besides `input_ids`, and what padding gets in them."""
_KNOWN = {
    "input_ids",
    *ALONG_THE_PROMPT,
    "shift_labels",
    "position_ids",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "logits_to_keep",
    *BORDERS,
    *LONGEST,
}
_GENERATION_SETTINGS = frozenset(vars(GenerationConfig()))


class CompressedInputs(dict[str, Any]):
    """Inputs for `model.generate(**...)` or `model(**...)`, with what was done to them."""

    record: Record | None = None
    """None where there was no image to prune."""
    compaction: Compaction
    """How the prompt became shorter, over the whole conversation where a cache is continued."""
    new: Compaction
    """The same of the columns of this call alone."""
    dropped: Tensor
    """[B, S] bool, which of those columns were visual tokens that did not stay."""
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
    video: str = "clip",
    **parameters: Any,
) -> CompressedInputs:
    """Prune the visual tokens of `inputs`, as a processor made them, for one call of the stock model.

        inputs = processor(images=photo, text=prompt, return_tensors="pt")
        output = model.generate(**compress(model, inputs, keep=64), max_new_tokens=30)

    `generate` then returns the shorter prompt before the answer; `AdaFV` gives the caller's own prompt back, and sees to
    lengths, streamers and the next turn too. What is generated this way can be continued only on a cache that was passed
    here, empty, as `cache` (`past_key_values` before transformers 5.24). Runs without gradients; to train through
    pruned tokens use `AdaFV`.

    Args:
        model: a supported model, wrapped or not. It is not changed.
        inputs: what the processor returned; not changed.
        keep, method, positions, text, processor, video, **parameters: see `Pruner`.

    Returns:
        The new inputs; what was kept is in their `record`.
    """
    model = stock_model(model)
    settings = Settings.of(method, keep, positions, text, processor, video, **parameters)
    warn_if_untested()
    cache = cache_of(inputs)
    if cached_length(cache) > 0 and contents_of(cache) is None:
        raise UnsupportedCallError("compress() cannot tell what this cache holds; to continue a conversation use AdaFV")
    with torch.no_grad(), host_by_default():
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
    visuals, taken = _visuals(family, result)
    cache = cache_of(result)
    if cached_length(cache) == 0:
        forget(cache)
    encoded_already = bool(result.get("mm_encoder_outputs"))
    if encoded_already or (not visuals and not holds_pruned(cache) and not positions_known(cache)):
        result.update(taken)
        return result

    with timed(seconds, "compaction"):
        call = Conversation.read(model, family, result, cache, whole_conversation)
        placed, visuals, layouts = new_images(model, family, settings, visuals, call)
    keeps = [tokens_to_keep(settings.keep, image.layout.tokens) for image in placed]
    pruned = [keep < image.layout.tokens for keep, image in zip(keeps, placed, strict=True)]
    if placed:
        packed = any(pruned) and call.packing is not None and call.packing.apart
        modalities = tuple(visuals)
        family.check_call(
            model, CallWithImages(result, modalities, cache, call.prefix.length > 0, call.generates, packed)
        )
    if not placed and not call.prefix.changed and not positions_known(cache):
        return result
    if "cache_position" in result:
        raise UnsupportedCallError("cache_position cannot be combined with pruned tokens; leave it out")

    texts, methods = _texts(settings, call, placed, pruned)
    grids: list[tuple[int, int] | None] = [None] * len(placed)
    for i, image in enumerate(placed):
        if pruned[i]:
            grids[i] = methods[i].grid(keeps[i], image.layout)
            if grids[i] is not None and not (family.downsamples and image.modality == "image"):
                raise UnsupportedCallError(
                    f"images at lower resolution are not supported for the {image.modality}s of {family.name}; use another "
                    "method, or scale the images before the processor"
                )
            keeps[i] = methods[i].budget(keeps[i], image.layout)
    if any(pruned) or call.prefix.changed:
        refuse_unknown_columns(result, (call.prompt.length, call.prefix.length + call.prompt.length))

    encoded = []
    if placed:
        with timed(seconds, "tower"):
            encoded = encode_images(model, family, methods, visuals, layouts, placed, pruned, grids)
    with timed(seconds, "selection"):
        choices = choose_tokens(model, methods, placed, keeps, grids, encoded, texts, call)
    delta = attended = None
    with timed(seconds, "compaction"):
        dropped = [0] * call.prompt.tokens.shape[0]
        stays = torch.ones(call.prompt.tokens.shape, dtype=torch.bool, device=call.device)
        for image, choice in zip(placed, choices, strict=True):
            columns = image.columns.to(call.device)
            dropped[image.row] += image.layout.tokens - choice.places.numel()
            stays[image.row, columns] = False
            stays[image.row, columns[choice.places.to(call.device)]] = True
        result.dropped = ~stays
        anchored = call.prompt.is_visual.any(1)
        guard = needs_guard(model, family, call, result, settings.positions)
        # The stock model counts placeholders, masked or not, as in a row that fills up a distributed batch.
        there = call.prompt.attended | call.prompt.is_visual
        compaction = result.new = compact(there, dropped, stays, anchored, guard)
        whole = result.compaction = call.prefix.then(compaction)
        if family.rotary_axes:
            delta, attended = set_rotary_positions(model, family, result, call, visuals, whole, compaction, stays)
        else:
            set_linear_positions(family, result, call, whole, compaction, stays, settings.positions)
        _take_out(model, family, result, call, whole, compaction)
        shorten_borders(result, _dropped_in_order(placed, choices))
        if placed:
            result["mm_encoder_outputs"] = _by_prompt(model, family, placed, choices)
    cached = contents_of(cache)
    tokens = cached.tokens if call.tokens is None and cached is not None else call.tokens
    result.contents = CacheContents(result.compaction, tokens, delta, attended)
    if placed:
        result.record = _record(model, call, placed, choices, result.compaction, seconds)
        result.record.methods = [method.name for method in methods]
    return result


def _texts(
    settings: Settings, call: Conversation, placed: list[PlacedImage], pruned: list[bool]
) -> tuple[list[Tensor | None], list[Method]]:
    """Per image: the columns of the text that counts for it, and the method that chooses its tokens.

    That is another where no word counts ("hello" may be all template): see `Method.without_text`. A warning says so.
    """
    texts: list[Tensor | None] = [None] * len(placed)
    methods = [settings.method] * len(placed)
    for i, image in enumerate(placed):
        if not (pruned[i] and settings.method.needs_text):
            continue
        try:
            texts[i] = text_columns(call.prompt, image, settings.scope, settings.template)
        except NoWordsError as error:
            if settings.method.published_layout:  # the published code has no other way
                raise
            methods[i] = settings.method.without_text()
            warnings.warn(
                f"no word of the prompt counts for {image.modality} {image.number}, so its tokens were chosen by "
                f"{methods[i].name} alone ({error})",
                stacklevel=2,
            )
    return texts, methods


def _visuals(family: Family, inputs: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
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


def _by_prompt(
    model: Any, family: Family, placed: list[PlacedImage], choices: list[Choice]
) -> dict[str, BaseModelOutputWithPooling]:
    """The kept features per modality, one entry per prompt that has any.

    Models read the entries one after the other, so one entry per image would do; but for beams and several return
    sequences `generate` repeats the entries, and transformers 5.18 repeats the images of one prompt in the wrong order.
    """
    outputs = {}
    for modality in family.modalities:
        features: dict[int, list[Tensor]] = {}
        deepstack: dict[int, list[Tensor]] = {}
        for image, choice in zip(placed, choices, strict=True):
            if image.modality == modality:
                features.setdefault(image.row, []).append(choice.features)
                if choice.deepstack is not None:
                    deepstack.setdefault(image.row, []).append(choice.deepstack)
        if features:
            joined, stacked = ([torch.cat(parts) for parts in each.values()] for each in (features, deepstack))
            name = family.handed_as(modality)
            outputs[name] = family.hand_over(model, name, joined, stacked)
    return outputs


def _take_out(
    model: Any, family: Family, result: dict[str, Any], call: Conversation, whole: Compaction, compaction: Compaction
) -> None:
    """Take the dropped columns out of everything that runs along the prompt.

    Args:
        whole: over the cached columns and the new ones.
        compaction: over the new ones alone.
    """
    batch, new = call.prompt.tokens.shape
    fills = {"input_ids": _padding_id(model, family, result, call), **ALONG_THE_PROMPT}
    if isinstance(result.get("shift_labels"), Tensor):
        result["shift_labels"] = _shifted(result["shift_labels"], compaction)
    for name, fill in fills.items():
        values = result.get(name)
        if not isinstance(values, Tensor) or values.dim() < 2 or values.shape[1] == 0:
            continue
        if values.shape[1] == new:
            values = family.since_the_cache_began(name, values, call.prefix.length)
        if values.shape[1] == whole.length:
            result[name] = whole.take(values, fill)
        elif values.shape[1] == new:
            result[name] = compaction.take(values, fill)
        elif name == "attention_mask" and values.shape[1] == call.prefix.columns.shape[1] + new:
            cached = nothing_removed(batch, call.prefix.columns.shape[1], compaction.columns.device)
            result[name] = cached.then(compaction).take(values, fill)
        else:
            raise PromptError(f"{name} is {list(values.shape)}, but the prompt is [{batch}, {new}]")
        if name == "labels":
            # Nothing predicts the first token of a prompt, and padding put in front of it must not begin to.
            first = (compaction.columns == 0).to(values.device)
            first[:, 0] = False
            labels = result[name]
            result[name] = labels.masked_fill(
                torch.nn.functional.pad(first, (labels.shape[1] - first.shape[1], 0)), _IGNORED_LABEL
            )
    packed = call.packing is not None and call.packing.apart
    if result.get("attention_mask") is None and not packed and (whole.columns < 0).any():
        result["attention_mask"] = (whole.columns >= 0).long()


def _shifted(values: Tensor, compaction: Compaction) -> Tensor:
    """`shift_labels` [B, S], each at the column in front of its token, in the shorter prompt.

    The column in front may have been dropped, as the last visual token in front of the answer may be; then the label goes
    to the column that is in front of the token now.
    """
    if values.shape[1] != compaction.length:
        raise PromptError(f"shift_labels is {list(values.shape)}, but the prompt has {compaction.length} columns")
    columns = compaction.columns.to(values.device)
    behind = torch.nn.functional.pad(columns[:, 1:] - 1, (0, 1))
    behind[:, -1] = columns[:, -1]
    return values.gather(1, behind.clamp_min(0)).masked_fill((columns < 0) | (behind < 0), _IGNORED_LABEL)


def _dropped_in_order(placed: list[PlacedImage], choices: list[Choice]) -> list[tuple[int, int]]:
    """(first column, tokens dropped) of every image."""
    return [
        (int(image.columns[0]), image.layout.tokens - choice.places.numel())
        for image, choice in zip(placed, choices, strict=True)
    ]


def refuse_unknown_columns(inputs: Mapping[str, Any], lengths: tuple[int, int]) -> None:
    """Raise UnsupportedCallError for a tensor as long as the prompt (or the conversation) under a name not known here.

    It would keep its length while the prompt becomes shorter; so a release that renames an argument, or adds one, is not
    silently wrong.
    """
    for name, value in inputs.items():
        if name in _KNOWN or name in _GENERATION_SETTINGS or not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if any(sound in name for sound in ("audio", "feature")):  # of models that hear too
            continue
        sizes = {value.shape[min(1, value.dim() - 1)], value.shape[-1]}
        if any(size in lengths and size > 1 for size in sizes):
            raise UnsupportedCallError(
                f"{name} is {list(value.shape)}, as long as the prompt, but adafv does not know what it says of the dropped "
                f"tokens; leave it out, or use keep=1.0 (transformers {OLDEST_TESTED} to {NEWEST_TESTED} were tested)"
            )


def _record(
    model: Any,
    call: Conversation,
    placed: list[PlacedImage],
    choices: list[Choice],
    compaction: Compaction,
    seconds: dict[str, float],
) -> Record:
    batch, given = call.prompt.tokens.shape[0], call.given.length
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
    return Record(
        kept=kept,
        keep_mask=keep_mask[:, compaction.length - given :],
        rows=[image.row for image in placed],
        modalities=[image.modality for image in placed],
        frames=[image.frame for image in placed],
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
        kv_bytes_before=batch * kv_bytes(model, compaction.length),
        kv_bytes_after=batch * kv_bytes(model, columns.shape[1]),
        seconds=seconds,
    )


def _restate(values: Tensor, own: ImageLayout, other: ImageLayout, missing: Any) -> Tensor:
    """Values per token of `own` ([N]), in the order of the tokens of `other`; `missing` where `own` lacks the patch."""
    by_patch = torch.full((own.crops * own.rows * own.columns,), missing, dtype=values.dtype, device=values.device)
    shows = own.shows_patch.to(values.device)
    by_patch = by_patch.scatter(0, own.source.to(values.device)[shows], values[shows])
    source = other.source.to(values.device)
    return by_patch[source.clamp_min(0)].masked_fill(source < 0, missing)


def _padding_id(model: Any, family: Family, inputs: Mapping[str, Any], call: Conversation) -> int:
    """The token of the caller's own padding; where there is none, the one that `generate` would take."""
    padding = call.prompt.tokens[~call.prompt.attended]
    if padding.numel() and int(padding[0]) >= 0:
        return int(padding[0])
    placeholders = {family.placeholder(model, modality) for modality in family.modalities}
    given = inputs.get("generation_config")
    text = model.config.get_text_config()
    for sources in ((inputs, given, getattr(model, "generation_config", None)), (text, model.config)):
        for name in ("pad_token_id", "eos_token_id"):
            for source in sources:
                value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
                values = torch.as_tensor([] if value is None else value).flatten().tolist()
                if values and values[0] >= 0 and values[0] not in placeholders:
                    return int(values[0])
    return 0
