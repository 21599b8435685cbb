"""`compress`: inputs of a model -> the same inputs with fewer image placeholders and already pruned image features.

The tokens to keep are counted before the tower runs, chosen after it, and taken out of everything that runs along the
prompt. Nothing inside the model changes: the result goes through the public arguments of its `generate` and `forward`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adafv.core.budget import Budget
from adafv.core.crops import Crops
from adafv.core.select import Wanted, among_all, select_tokens, whole_of
from adafv.core.sending import sent
from adafv.core.tokens import STRINGS
from adafv.engines.transformers.cache import CacheContents, cached_length, contents_of, shortened_inside
from adafv.engines.transformers.cache import remember as write_on
from adafv.engines.transformers.call import Call, CompressedInputs, ImageJob, read_call
from adafv.engines.transformers.columns import take_out
from adafv.engines.transformers.compaction import compact
from adafv.engines.transformers.crops import check_auto, check_crops
from adafv.engines.transformers.devices import host_by_default
from adafv.engines.transformers.encode import encode_images
from adafv.engines.transformers.families import Family, family_of
from adafv.engines.transformers.families.base import stock_model
from adafv.engines.transformers.layers import InsideRun, check_continued
from adafv.engines.transformers.packing import shorten_borders
from adafv.engines.transformers.plan import plan_images
from adafv.engines.transformers.positions import needs_guard, set_linear_positions, set_rotary_positions
from adafv.engines.transformers.record import record_of, timed
from adafv.engines.transformers.releases import cache_of, warn_if_untested
from adafv.engines.transformers.remembered import ImageStore
from adafv.engines.transformers.settings import Settings
from adafv.errors import OptionError, UnsupportedCallError
from adafv.methods import Method


def compress(
    model: Any,
    inputs: Mapping[str, Any],
    keep: Budget | int | float | str,
    *,
    method: str | Method = "adafv",
    positions: str = "compact",
    text: str | None = None,
    processor: Any = None,
    video: str = "clip",
    crops: Crops | str | int = "all",
    remember: ImageStore | None = None,
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
        inputs: what the processor returned; not changed. With `images`, what `adafv.encode` made of them.
        keep, method, positions, text, processor, video, crops, **parameters: see `Pruner`.
        remember: where encoded images are kept from one call to the next.

    Returns:
        The new inputs; what was kept is in their `record`.
    """
    model = stock_model(model)
    if not isinstance(remember, ImageStore | None):
        raise OptionError(
            f"remember={remember!r}: a call of compress() can only keep images in a store that outlives it; make one, "
            'store = adafv.ImageStore("512MB"), and pass it: remember=store'
        )
    settings = Settings.of(
        method, keep, positions, text, processor, video, crops=crops, remember=remember, **parameters
    )
    warn_if_untested()
    cache = cache_of(inputs)
    if cached_length(cache) > 0 and contents_of(cache) is None:
        raise UnsupportedCallError("compress() cannot tell what this cache holds; to continue a conversation use AdaFV")
    with torch.no_grad(), host_by_default():
        family = family_of(model)
        check_crops(settings.crops, family, model)
        check_auto(settings.crops)
        result = compress_call(model, family, settings, inputs, whole_conversation=True)
    if result.contents is not None:
        write_on(cache, result.contents)
    return result


def compress_call(
    model: Any,
    family: Family,
    settings: Settings,
    inputs: Mapping[str, Any],
    *,
    whole_conversation: bool,
    wrapped: bool = False,
) -> CompressedInputs:
    """`compress` for one call of `generate` or `forward`, with or without a cache, in five steps.

    Args:
        whole_conversation: with a cache, whether the prompt repeats what is cached (`generate`) or not (`forward`).
        wrapped: whether the caller runs the stock model within `inside` of the result, where it has one: then methods may
            act inside the language model.
    """
    seconds: dict[str, float] = {}
    held = shortened_inside(cache_of(inputs))
    with timed(seconds, "compaction"):
        call = read_call(model, family, settings, inputs, whole_conversation)
        if held is not None:
            new = call if isinstance(call, CompressedInputs) else call.inputs
            jobs = [] if isinstance(call, CompressedInputs) else call.jobs
            check_continued(model, new, bool(jobs), whole_conversation, wrapped)
            new.inside = InsideRun.continued(model, held, cache_of(inputs))
        if isinstance(call, CompressedInputs):
            return call
        call.wrapped = wrapped
        plan_images(call)
    with timed(seconds, "tower"):
        encode_images(call)
    with timed(seconds, "selection"):
        choose(call)
    with timed(seconds, "compaction"):
        write(call)
        if any(job.cuts for job in call.jobs):
            call.inputs.inside = InsideRun(call)
    if call.jobs:
        call.inputs.record = record_of(call, seconds)
    return call.inputs


def choose(call: Call) -> None:
    """Step 4: run the methods; images of one size, budget and method together."""
    jobs = [job for job in call.jobs if job.plan is not None]
    speaking = [job for job in jobs if job.text is not None]
    embedded = {}
    if speaking:
        assert speaking[0].encoded is not None
        embedded = call.embedded_words(speaking, speaking[0].encoded.features.device)
    wanted, choosing = [], []
    for job in jobs:
        assert job.encoded is not None
        assert job.plan is not None
        words, ids = embedded.get(id(job), (None, None))
        strings = None
        if ids is not None and STRINGS in job.method.needs:
            strings = call.settings.tokenizer.convert_ids_to_tokens(ids.tolist())
        project = partial(call.family.project, call.model)
        among = None if job.places is None else job.image.layout.tokens
        image = Wanted(job.encoded, job.method, job.plan, job.keep, words, ids, strings, project, among)
        if job.places is not None and job.plan.keep == len(job.places):  # a method is never shown what stays anyway
            job.selected, job.place = among_all(whole_of(image), [job.places], job.image.layout.tokens), 0
            job.encoded = None
            continue
        wanted.append(image)
        choosing.append(job)
    for found in select_tokens(wanted):
        members = [choosing[i] for i in found.members]
        places = [job.places for job in members if job.places is not None]
        group = among_all(found, places, members[0].image.layout.tokens) if places else found
        for place, job in enumerate(members):
            job.selected, job.place, job.keep = group, place, group.kept.indices.shape[1]
            job.encoded = None  # what did not stay need not live on beside what did


def write(call: Call) -> None:
    """Step 5: take the dropped columns out of the inputs, and put the kept features in."""
    result, prompt = call.inputs, call.prompt
    stays = _stays(call)
    dropped = [0] * prompt.tokens.shape[0]
    for job in call.jobs:
        dropped[job.image.row] += job.lost
    # The stock model counts placeholders, masked or not, as in a row that fills up a distributed batch.
    visual = prompt.is_visual
    result.dropped = ~stays
    if (prompt.arrays.is_visual & ~prompt.arrays.attended).any():  # what is masked is padding, which becomes no NaN
        result.dropped &= sent(prompt.attended, stays.device)
    result.new = compact(prompt.attended | visual, dropped, stays, visual.any(1), needs_guard(call))
    result.compaction = call.prefix.then(result.new)
    delta = attended = None
    if call.family.rotary_axes:
        delta, attended = set_rotary_positions(call, stays)
    else:
        set_linear_positions(call, stays)
    take_out(call)
    shorten_borders(result, [(job.image.first, job.lost) for job in call.jobs])
    if call.jobs:
        result["mm_encoder_outputs"] = _by_prompt(call)
    cached = contents_of(cache_of(result))
    tokens = cached.tokens if call.tokens is None and cached is not None else call.tokens
    held = None if cached is None else cached.inside
    result.contents = CacheContents(result.compaction, tokens, delta, attended, held)


def _stays(call: Call) -> Tensor:
    """[B, S] bool on the device: which of the new columns are not dropped."""
    width = call.prompt.length
    groups: dict[int, list[ImageJob]] = {}
    for job in call.jobs:
        if job.selected is not None:
            groups.setdefault(id(job.selected), []).append(job)
    on_host = np.ones(call.prompt.tokens.numel(), dtype=bool)
    chosen = []
    for jobs in groups.values():
        columns = [job.image.columns.numpy() + job.image.row * width for job in jobs]
        on_host[np.concatenate(columns)] = False
        kept = jobs[0].selected.kept.indices  # type: ignore[union-attr]
        if jobs[0].method.may_repeat:  # distinct places for what may not be distinct
            chosen += [sent(torch.from_numpy(each[: kept.shape[1]]), call.device) for each in columns]
            continue
        order = [job.place for job in jobs]
        if order != list(range(len(kept))):
            kept = kept[order]
        places = sent(torch.from_numpy(np.stack(columns)), kept.device)
        chosen.append(places.gather(1, kept).flatten().to(call.device))
    stays = sent(torch.from_numpy(on_host), call.device)
    if chosen:
        stays = stays.index_fill(0, torch.cat(chosen) if len(chosen) > 1 else chosen[0], True)
    return stays.view(-1, width)


def _by_prompt(call: Call) -> dict[str, BaseModelOutputWithPooling]:
    """The kept features per modality, one entry per prompt that has any.

    Models read the entries one after the other, so one entry per image would do; but for beams and several return
    sequences `generate` repeats the entries, and transformers 5.18 repeats the images of one prompt in the wrong order.
    """
    family, outputs = call.family, {}
    # An image that stays whole may be a view of what the tower made of all of them: alone, it does not hold the others.
    pruned = any(job.selected is not None for job in call.jobs)
    for modality in family.modalities:
        features: dict[int, list[Tensor]] = {}
        deepstack: dict[int, list[Tensor]] = {}
        for job in call.jobs:
            if job.image.modality == modality:
                own, rows = _kept_of(job, pruned)
                features.setdefault(job.image.row, []).append(own)
                if rows is not None:
                    deepstack.setdefault(job.image.row, []).append(rows)
        if features:
            joined, stacked = (
                [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in each.values()]
                for each in (features, deepstack)
            )
            name = family.handed_as(modality)
            outputs[name] = family.hand_over(call.model, name, joined, stacked)
    return outputs


def _kept_of(job: ImageJob, shared: bool) -> tuple[Tensor, Tensor | None]:
    """What stays of an image: features [K, D], deepstack rows [K, L, D]."""
    if job.selected is None:
        assert job.encoded is not None
        whole = job.encoded.copy() if shared else job.encoded
        return whole.features, whole.deepstack
    deepstack = job.selected.deepstack
    return job.selected.features[job.place], None if deepstack is None else deepstack[job.place]
