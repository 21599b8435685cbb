"""What one call says: the prompt that is new, the prefix that a cache holds, and the images that are not cached yet."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.engines.transformers.cache import cached_prefix, check_same_conversation
from adafv.engines.transformers.families import Family
from adafv.engines.transformers.packing import Packing, read_packing
from adafv.engines.transformers.prompt import Compaction, check_mask, given_prompt, read_prompt
from adafv.engines.transformers.settings import Settings
from adafv.errors import CacheError, PromptError
from adafv.prompts.prompt import PlacedImage, Prompt, frames_of, place_images


@dataclass
class Conversation:
    """A call of `generate` or `forward`, read on the host."""

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

    @classmethod
    def read(
        cls, model: Any, family: Family, inputs: dict[str, Any], cache: Any, whole_conversation: bool
    ) -> "Conversation":
        given, generates = given_prompt(inputs), whole_conversation
        prefix = cached_prefix(cache, given.shape[0])
        mask = inputs.get("attention_mask")
        if prefix.length and whole_conversation and isinstance(mask, Tensor) and mask.shape[1] != given.shape[1]:
            whole_conversation = False  # only the new tokens, under a mask over all: `generate` takes that too
        if prefix.length and not whole_conversation:
            mask = _new_part_of_mask(mask, given.shape[1], prefix)
        whole = read = read_prompt(model, family, {**inputs, "attention_mask": mask})
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
        return cls(read, prefix, tokens, embeds, whole, given.device, generates, packing)


def _new_part_of_mask(mask: Any, new: int, prefix: Compaction) -> Any:
    if mask is None:
        return None
    if check_mask(mask).shape[1] not in (new, prefix.length + new, prefix.columns.shape[1] + new):
        raise CacheError(
            f"attention_mask covers {mask.shape[1]} tokens, but {prefix.length} are cached and {new} are new; the mask must "
            "cover both, or the new ones alone"
        )
    return mask[:, -new:]


def new_images(
    model: Any, family: Family, settings: Settings, visuals: dict[str, dict[str, Any]], call: Conversation
) -> tuple[list[PlacedImage], dict[str, dict[str, Any]], dict[str, list[ImageLayout]]]:
    """The images and videos whose placeholders are not cached yet, in reading order; their inputs; their layouts.

    A processor that sees the whole conversation returns the cached images too; the stock model wants them left out, here
    both are right.
    """
    placed: list[PlacedImage] = []
    new_visuals, fed = {}, {}
    for modality in call.prompt.placeholders:
        found, given, layouts = _new_of(model, family, modality, visuals.get(modality, {}), call)
        if not found:
            continue
        if settings.method.published_layout and modality == "image":
            published = family.published_layouts(model, given, layouts)
            found = [replace(image, published=layout) for image, layout in zip(found, published, strict=True)]
        if settings.video == "frame" and modality == "video":
            found = [frame for video in found for frame in frames_of(video)]
        else:
            layouts = [image.fed for image in found]
        placed += found
        new_visuals[modality], fed[modality] = given, layouts
    placed.sort(key=lambda image: (image.row, int(image.columns[0])))
    return placed, new_visuals, fed


def _new_of(
    model: Any, family: Family, modality: str, visuals: dict[str, Any], call: Conversation
) -> tuple[list[PlacedImage], dict[str, Any], list[ImageLayout]]:
    new = call.prompt.placeholders[modality]
    if not visuals:
        if new.any():
            raise PromptError(
                f"the prompt has {int(new.sum())} {modality} placeholders that are not cached, but no {modality}s; "
                f"pass {family.inputs(modality)[0]} as the processor returned them"
            )
        return [], {}, []
    whole = call.given.placeholders[modality]
    if whole.shape[1] > new.shape[1]:
        layouts = family.layouts(model, modality, visuals, call.given.runs(modality))
        if sum(layout.tokens for layout in layouts) == int(whole.sum()):
            images = place_images(modality, whole, layouts)
            wanted = [i for i, image in enumerate(images) if int(image.columns[0]) >= call.prefix.length]
            if not wanted:
                return [], {}, []
            visuals = family.take(model, modality, visuals, layouts, wanted)
            layouts = [layouts[i] for i in wanted]
            return place_images(modality, new, layouts), visuals, layouts
    layouts = family.layouts(model, modality, visuals, call.prompt.runs(modality))
    return place_images(modality, new, layouts), visuals, layouts
