"""What one call says: the prompt that is new, the prefix that a cache holds, and the images that are not cached yet."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.engines.transformers.cache import cached_prefix, check_same_conversation
from adafv.engines.transformers.prompt import (
    Compaction,
    PlacedImage,
    Prompt,
    check_mask,
    given_prompt,
    place_images,
    read_prompt,
)
from adafv.errors import CacheError, PromptError
from adafv.families import Family
from adafv.methods import Method


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
    is_image: Tensor
    """[B, S] placeholders in whatever the call gives."""
    device: torch.device

    @classmethod
    def read(cls, model: Any, inputs: dict[str, Any], cache: Any, whole_conversation: bool) -> "Conversation":
        given = given_prompt(inputs)
        prefix = cached_prefix(cache, given.shape[0])
        mask = inputs.get("attention_mask")
        if prefix.length and whole_conversation and isinstance(mask, Tensor) and mask.shape[1] != given.shape[1]:
            whole_conversation = False  # only the new tokens, under a mask over all: `generate` takes that too
        if prefix.length and not whole_conversation:
            mask = _new_part_of_mask(mask, given.shape[1], prefix)
        read = read_prompt(model, {**inputs, "attention_mask": mask})
        tokens: Tensor | None = read.tokens
        is_image, embeds = read.is_image, inputs.get("inputs_embeds")
        if prefix.length:
            if whole_conversation:
                check_same_conversation(cache, read.tokens, prefix)
                embeds = None if embeds is None else embeds[:, prefix.length :]
                read = Prompt(
                    *(
                        part[:, prefix.length :]
                        for part in (read.tokens, read.attended, read.is_image, read.turn_ends, read.special)
                    )
                )
            else:
                tokens = None
        return cls(read, prefix, tokens, embeds, is_image, given.device)


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
    model: Any, family: Family, method: Method, images: dict[str, Any], call: Conversation
) -> tuple[list[PlacedImage], dict[str, Any]]:
    """The images whose placeholders are not cached yet.

    A processor that sees the whole conversation returns the cached images too; the stock model wants them left out, here
    both are right.
    """
    if not images:
        if call.prompt.is_image.any():
            raise PromptError(
                f"the prompt has {int(call.prompt.is_image.sum())} image placeholders that are not cached, but no images; "
                "pass pixel_values as the processor returned them"
            )
        return [], {}
    layouts = family.layouts(model, images)
    total = sum(layout.tokens for layout in layouts)
    if call.is_image.shape[1] > call.prompt.length and total == int(call.is_image.sum()):
        all_placed = place_images(call.is_image, layouts)
        wanted = [i for i, image in enumerate(all_placed) if int(image.columns[0]) >= call.prefix.length]
        if not wanted:
            return [], {}
        images = family.take(model, images, wanted)
        layouts = [layouts[i] for i in wanted]
    placed = place_images(call.prompt.is_image, layouts)
    if method.published_layout:
        published = family.published_layouts(model, images)
        placed = [
            PublishedImage(image.row, image.columns, image.layout, layout)
            for image, layout in zip(placed, published, strict=True)
        ]
    return placed, images


@dataclass(frozen=True)
class PublishedImage(PlacedImage):
    """An image whose tokens are fed in the layout of the published code."""

    published: ImageLayout

    @property
    def fed(self) -> ImageLayout:
        return self.published
