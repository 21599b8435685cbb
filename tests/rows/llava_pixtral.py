"""LLaVA with a Pixtral tower: images of any size, every patch a token, a token at the end of each row."""

from typing import Any

import torch
from models import IMAGE, PATCH, FamilyRow, Visuals, finish, text_config
from transformers import LlavaConfig, LlavaForConditionalGeneration

from rows.mistral3 import pixels, tokens, vision_config


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = LlavaConfig(
        **{
            "vision_config": vision_config(),
            "text_config": text_config(),
            "image_token_id": IMAGE,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            **options,
        }
    )
    return finish(LlavaForConditionalGeneration(config), seed, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    flat = [size for prompt in sizes for size in prompt]
    entries = pixels(flat, seed)
    entries["pixel_values"] = entries["pixel_values"].to(model.dtype)
    return entries, [tokens(size, PATCH) for size in flat]


ROW = FamilyRow("llava-pixtral", build, images, [(42, 56), (56, 42), (28, 84), (56, 56)])
