"""LLaVA-OneVision: a SigLIP tower, crops scaled down to at most nine, videos."""

import math
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
    noise,
    text_config,
    vision_config,
)
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = LlavaOnevisionConfig(
        vision_config=vision_config("siglip"),
        text_config=Qwen2Config(**text_config().to_diff_dict()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[SIDE * rows, SIDE * columns] for rows in range(1, 4) for columns in range(1, 4)],
        vision_aspect_ratio="anyres_max_4",
        **options,
    )
    return finish(LlavaOnevisionForConditionalGeneration(config), seed, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

    flat = [size for prompt in sizes for size in prompt]
    in_crops = [len(prompt) == 1 for prompt in sizes for _ in prompt]
    pinpoints = model.config.image_grid_pinpoints
    crops = [
        image_size_to_num_patches(size, pinpoints, SIDE) if cut else 1 for size, cut in zip(flat, in_crops, strict=True)
    ]
    pixels = torch.zeros(len(flat), max(crops), 3, SIDE, SIDE)
    for number, count in enumerate(crops):
        pixels[number, :count] = noise(seed + number, count, 3, SIDE, SIDE)
    entries = {
        "pixel_values": pixels.to(model.dtype),
        "image_sizes": torch.tensor(flat),
        "batch_num_images": torch.tensor([len(prompt) for prompt in sizes if prompt]),
    }
    return entries, [[IMAGE] * length for length in image_lengths(model, entries)]


def videos(model: Any, frames: list[list[int]], seed: int) -> Visuals:
    pixels = clips(model, frames, seed)
    count = pixels.shape[1]
    tokens = count * math.ceil(SIDE / PATCH / 2) ** 2 + 1
    return {"pixel_values_videos": pixels}, [[VIDEO] * tokens for _ in pixels]


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Each was asked about alone, so each is in crops, as `batch_num_images` says."""
    crops = torch.cat((first["pixel_values"][0], second["pixel_values"][0]))
    counts = torch.tensor([1, 1])
    return {
        "pixel_values": crops,
        "image_sizes": torch.cat((first["image_sizes"], second["image_sizes"])),
        "batch_num_images": counts,
    }


ROW = FamilyRow(
    "llava-onevision",
    build,
    images,
    [(90, 100), (160, 168), (120, 40), (64, 64)],
    videos,
    clips=(3, 3),
    joined=joined,
)
