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
    clips,
    finish,
    image_lengths,
    llava_next_images,
    text_config,
    vision_config,
)
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration


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
    entries = llava_next_images(model, flat, seed)
    entries["pixel_values"] = entries["pixel_values"].to(model.dtype)
    return entries, [[IMAGE] * length for length in image_lengths(model, entries)]


def videos(model: Any, frames: list[list[int]], seed: int) -> Visuals:
    pixels = clips(model, frames, seed)
    count = pixels.shape[1]
    tokens = count * ((SIDE // PATCH) ** 2 // 4)  # as the processor counts them
    return {"pixel_values_videos": pixels}, [[VIDEO] * tokens for _ in pixels]


ROW = FamilyRow(
    "llava-next-video",
    build,
    images,
    [(90, 100), (50, 120), (120, 40), (64, 64)],
    videos,
    clips=(4, 4),
)
