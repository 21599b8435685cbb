"""LLaVA-NeXT-Video: LLaVA-NeXT's images, videos whose frames are pooled 2 x 2."""

from typing import Any

import torch
from models import (
    IMAGE,
    PATCH,
    SIDE,
    VIDEO,
    FamilyRow,
    Visuals,
    finish,
    image_lengths,
    noise,
    text_config,
    vision_config,
)
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration
from transformers.models.llava_next_video.modeling_llava_next_video import image_size_to_num_patches


def build(seed: int = 0, dtype: torch.dtype = torch.float32, tower: str = "clip", **options: Any) -> Any:
    config = LlavaNextVideoConfig(
        vision_config=vision_config(tower, **options.pop("vision", {})),
        text_config=text_config(**options.pop("text", {})),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE]],
        **options,
    )
    return finish(LlavaNextVideoForConditionalGeneration(config), seed, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    flat = [size for prompt in sizes for size in prompt]
    crops = [image_size_to_num_patches(size, model.config.image_grid_pinpoints, SIDE) for size in flat]
    pixels = torch.zeros(len(flat), max(crops), 3, SIDE, SIDE)
    for number, count in enumerate(crops):
        pixels[number, :count] = noise(seed + number, count, 3, SIDE, SIDE)
    entries = {"pixel_values": pixels.to(model.dtype), "image_sizes": torch.tensor(flat)}
    return entries, [[IMAGE] * length for length in image_lengths(model, entries)]


def videos(model: Any, frames: list[list[int]], seed: int) -> Visuals:
    flat = [count for prompt in frames for count in prompt]
    count = min(flat)  # the stock model takes videos of one length
    pixels = torch.stack([noise(50 + seed + number, count, 3, SIDE, SIDE) for number in range(len(flat))])
    tokens = count * ((SIDE // PATCH) ** 2 // 4)  # as the processor counts them
    return {"pixel_values_videos": pixels.to(model.dtype)}, [[VIDEO] * tokens for _ in flat]


ROW = FamilyRow(
    "llava-next-video",
    build,
    images,
    [(90, 100), (50, 120), (120, 40), (64, 64)],
    videos,
    clips=(4, 4),
)
