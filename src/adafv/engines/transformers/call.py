"""What one call says: the prompt that is new, the prefix that a cache holds, and the images that are not cached yet.

One object per call, and in it one per image, go through the five steps of `compress`; each step fills in what it finds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.encoded import EncodedImage
from adafv.core.select import Selected
from adafv.core.sending import sent
from adafv.core.tokens import Cut, Plan
from adafv.engines.transformers.cache import (
    CacheContents,
    cached_length,
    cached_prefix,
    check_same_conversation,
    forget,
    holds_pruned,
    positions_known,
)
from adafv.engines.transformers.compaction import Compaction
from adafv.engines.transformers.encoded import ENCODED, EncodedImages, encoded_in, refuse_other_images, refuse_training
from adafv.engines.transformers.families import Family
from adafv.engines.transformers.packing import Packing, read_packing
from adafv.engines.transformers.reading import check_mask, check_same_weights, given_prompt, read_prompt, visuals_of
from adafv.engines.transformers.record import Record
from adafv.engines.transformers.releases import cache_of
from adafv.engines.transformers.settings import Settings, said
from adafv.errors import CacheError, PromptError, UnsupportedCallError
from adafv.methods import Method
from adafv.prompts.prompt import PlacedImage, Prompt, frames_of, place_images

if TYPE_CHECKING:
    from adafv.engines.transformers.layers import InsideRun


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
    inside: "InsideRun | None" = None
    """Where tokens go inside the language model, or went when the cache was filled."""

    @property
    def changed(self) -> bool:
        """Whether the last layer sees fewer columns than the caller gave."""
        return self.compaction.changed or (self.inside is not None and bool(self.inside.images))


@dataclass
class ImageJob:
    """An image (a video, or a frame with a budget of its own) on its way through a call."""

    image: PlacedImage
    method: Method
    """That chooses its tokens: another than the one asked for where no word counts."""
    layout: ImageLayout
    """In which its tokens are fed to the method and to the language model."""
    keep: int = 0
    """K; until the tokens are chosen, what the budget leaves."""
    plan: Plan | None = None
    """None: all of it stays."""
    cuts: tuple[Cut, ...] = ()
    """Where its tokens go inside the language model; then all of it stays in front of it."""
    text: Tensor | None = None
    """[T] long, the columns of the words that count; None where the method needs none."""
    encoded: EncodedImage | None = None
    """Where crops were chosen, of these alone."""
    crops: tuple[int, ...] | None = None
    """Those that went through the tower; None: all."""
    places: Tensor | None = None
    """[n] long on the host, which of its tokens are encoded; None: all."""
    words: tuple[Tensor, Tensor] | None = None
    """Input embeddings [T, D] and ids [T] of the words that count, once they were looked up."""
    selected: Selected | None = None
    """What was chosen for the images like this one; None where all of it stays."""
    place: int = 0
    """Which of those it is."""

    @property
    def lost(self) -> int:
        """Tokens that did not stay."""
        return self.image.layout.tokens - self.keep


@dataclass
class Call:
    """A call of `generate` or `forward`, read on the host."""

    model: Any
    family: Family
    settings: Settings
    inputs: CompressedInputs
    """As given, without the images; at the end what the stock model gets."""
    prompt: Prompt
    """The new columns alone."""
    prefix: Compaction
    """How the cached columns became what the cache holds."""
    tokens: Tensor | None
    """[B, S] the whole conversation, where the call gives it."""
    embeds: Tensor | None
    """[B, new, D], where the call gives embeddings."""
    given: Prompt
    """Whatever the call gives: the whole conversation, or the new columns alone."""
    device: torch.device
    generates: bool
    """A call of `generate`, not of `forward`."""
    packing: Packing | None = None
    """The prompts packed into each row; None where every row is one."""
    visuals: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per modality, the inputs of the images whose placeholders are new."""
    encoded: EncodedImages | None = None
    """Images that were encoded before, in place of such inputs."""
    numbers: dict[str, list[int]] = field(default_factory=dict)
    """Per modality, which of the images that were given are new."""
    jobs: list[ImageJob] = field(default_factory=list)
    """One per new image, in reading order."""
    remembered: set[tuple[str, int]] = field(default_factory=set)
    """(modality, number) of the images that did not go through the tower, as they were known."""
    wrapped: bool = False
    """Whether the stock model runs within the wrapper, which can reach into its layers."""

    @property
    def packed(self) -> bool:
        """Whether rows hold several prompts that the stock model keeps apart by their positions."""
        return self.packing is not None and self.packing.apart

    def embedded_words(self, jobs: Sequence[ImageJob], device: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
        """Per image, by `id`, input embeddings [T, D] and ids [T] of its words; looked up together, as one row."""
        missing = [job for job in jobs if job.words is None]
        columns = [job.text for job in missing if job.text is not None]
        if columns:
            tokens = self.prompt.arrays.tokens
            ids = [tokens[job.image.row, text.numpy()] for job, text in zip(missing, columns, strict=True)]
            if self.embeds is not None:
                given = self.embeds
                parts = [
                    given[job.image.row, sent(text, given.device)].detach().to(device)
                    for job, text in zip(missing, columns, strict=True)
                ]
            else:
                row = sent(torch.from_numpy(np.concatenate(ids)).unsqueeze(0), self.device)
                embedded = self.model.get_input_embeddings()(row)[0].detach().to(device)
                parts = list(embedded.split(list(map(len, ids))))
            for job, part, each in zip(missing, parts, ids, strict=True):
                job.words = part, torch.from_numpy(each)
        return {id(job): job.words for job in jobs if job.words is not None}

    @property
    def changes_nothing(self) -> bool:
        """Whether the stock model can be called just so."""
        return not self.jobs and not self.prefix.changed and not positions_known(cache_of(self.inputs))


def read_call(
    model: Any, family: Family, settings: Settings, inputs: Mapping[str, Any], whole_conversation: bool
) -> Call | CompressedInputs:
    """Read a call; where it has nothing to do with pruning, its inputs as they were."""
    result = CompressedInputs(said(inputs))
    encoded = encoded_in(result)
    refuse_other_images(result)
    same: Tensor | None = None
    visuals, taken = visuals_of(family, result)
    cache = cache_of(result)
    if cached_length(cache) == 0:
        forget(cache)
    encoded_already = bool(result.get("mm_encoder_outputs"))
    if encoded is not None:
        del result[ENCODED]
        refuse_training(model)
        same = encoded.check(model, family, taken)
        visuals = encoded.visuals
    if encoded_already or (not visuals and not holds_pruned(cache) and not positions_known(cache)):
        check_same_weights(same)
        result.update(taken)
        return result
    call = _read(model, family, settings, result, whole_conversation, same)
    call.encoded = encoded
    _place_images(call, visuals)
    if call.changes_nothing:
        return result
    if "cache_position" in result:
        raise UnsupportedCallError("cache_position cannot be combined with pruned tokens; leave it out")
    return call


def _read(
    model: Any,
    family: Family,
    settings: Settings,
    inputs: CompressedInputs,
    whole_conversation: bool,
    same: Tensor | None,
) -> Call:
    """The prompt and the cached prefix of a call."""
    cache, given, generates = cache_of(inputs), given_prompt(inputs), whole_conversation
    prefix = cached_prefix(cache, given.shape[0])
    mask = inputs.get("attention_mask")
    if prefix.length and whole_conversation and isinstance(mask, Tensor) and mask.shape[1] != given.shape[1]:
        whole_conversation = False  # only the new tokens, under a mask over all: `generate` takes that too
    if prefix.length and not whole_conversation:
        mask = _new_part_of_mask(mask, given.shape[1], prefix)
    whole = read = read_prompt(model, family, {**inputs, "attention_mask": mask}, same)
    tokens: Tensor | None = read.tokens
    embeds = inputs.get("inputs_embeds")
    if prefix.length:
        if whole_conversation:
            check_same_conversation(cache, read.tokens, prefix)
            embeds = None if embeds is None else embeds[:, prefix.length :]
            read = whole.after(prefix.length)
        else:
            tokens = None
    packing = None
    if not prefix.length:
        packing = read_packing(model, family, inputs, read.attended)
        if packing is not None:
            whole = read = replace(read, segments=packing.segments)
    return Call(model, family, settings, inputs, read, prefix, tokens, embeds, whole, given.device, generates, packing)


def _new_part_of_mask(mask: Any, new: int, prefix: Compaction) -> Any:
    if mask is None:
        return None
    if check_mask(mask).shape[1] not in (new, prefix.length + new, prefix.columns.shape[1] + new):
        raise CacheError(
            f"attention_mask covers {mask.shape[1]} tokens, but {prefix.length} are cached and {new} are new; the mask must "
            "cover both, or the new ones alone"
        )
    return mask[:, -new:]


def _place_images(call: Call, visuals: dict[str, dict[str, Any]]) -> None:
    """Find the images and videos whose placeholders are not cached yet, in reading order.

    A processor that sees the whole conversation returns the cached images too; the stock model wants them left out, here
    both are right.
    """
    for modality in call.prompt.placeholders:
        found, given, numbers = _new_of(call, modality, visuals.get(modality, {}))
        if not found:
            continue
        call.visuals[modality], call.numbers[modality] = given, numbers
        if call.settings.video == "frame" and modality == "video":
            found = [frame for video in found for frame in frames_of(video)]
        call.jobs += [ImageJob(image, call.settings.method, image.layout) for image in found]
    call.jobs.sort(key=lambda job: (job.image.row, job.image.first))


def _new_of(call: Call, modality: str, visuals: dict[str, Any]) -> tuple[list[PlacedImage], dict[str, Any], list[int]]:
    """The new images of one modality, their inputs, and which of the given ones they are."""
    model, family, new = call.model, call.family, call.prompt.placeholders[modality]
    if not visuals:
        if new.any():
            raise PromptError(
                f"the prompt has {int(new.sum())} {modality} placeholders that are not cached, but no {modality}s; "
                f"pass {family.inputs(modality)[0]} as the processor returned them"
            )
        return [], {}, []
    whole = call.given.placeholders[modality]
    if whole.shape[1] > new.shape[1]:
        layouts = _layouts(call, modality, visuals, call.given)
        if sum(layout.tokens for layout in layouts) == int(whole.sum()):
            images = place_images(modality, whole, layouts)
            wanted = [i for i, image in enumerate(images) if image.first >= call.prefix.length]
            if not wanted:
                return [], {}, []
            visuals = family.take(model, modality, visuals, layouts, wanted)
            layouts = [layouts[i] for i in wanted]
            return place_images(modality, new, layouts), visuals, wanted
    layouts = _layouts(call, modality, visuals, call.prompt)
    return place_images(modality, new, layouts), visuals, list(range(len(layouts)))


def _layouts(call: Call, modality: str, visuals: dict[str, Any], shown: Prompt) -> list[ImageLayout]:
    """Of all images that were given; those that are encoded already bring theirs, and no pixels to tell it by."""
    if call.encoded is not None:
        return [image.layout for image in call.encoded.images[modality]]
    return call.family.layouts(call.model, modality, visuals, shown.runs(modality))
