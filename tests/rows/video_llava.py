"""Video-LLaVA: a tower for images, another for videos, whose frames keep their [CLS] token."""

from typing import Any

import torch
from models import IMAGE, PATCH, SIDE, VIDEO, FamilyRow, Visuals, clips, finish, noise, text_config, vision_config
from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration


def build(seed: int = 0, dtype: torch.dtype = torch.float32, tower: str = "clip", **options: Any) -> Any:
    config = VideoLlavaConfig(
        vision_config=vision_config(tower, **options.pop("vision", {})),
        text_config=text_config(**options.pop("text", {})),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        **options,
    )
    return finish(VideoLlavaForConditionalGeneration(config), seed, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    count = sum(map(len, sizes))
    pixels = torch.stack([noise(seed + number, 3, SIDE, SIDE) for number in range(count)])
    # The name that the processor gives them unless it is told otherwise, and the only one that older releases know.
    return {"pixel_values_images": pixels.to(model.dtype)}, [[IMAGE] * (SIDE // PATCH) ** 2] * count


def videos(model: Any, frames: list[list[int]], seed: int) -> Visuals:
    pixels = clips(model, frames, seed)
    count = pixels.shape[1]
    return {"pixel_values_videos": pixels}, [[VIDEO] * (count * (1 + (SIDE // PATCH) ** 2))] * len(pixels)


ROW = FamilyRow("video-llava", build, images, [(SIDE, SIDE)] * 4, videos, clips=(3, 3))
