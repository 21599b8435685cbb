"""LLaVA with a SigLIP tower: no [CLS], so every token of the tower is a patch."""

from typing import Any

import torch
from models import IMAGE, PATCH, SIDE, FamilyRow, Visuals, finish, llava_images, text_config, vision_config
from transformers import LlavaConfig, LlavaForConditionalGeneration


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = LlavaConfig(
        vision_config=vision_config("siglip"),
        text_config=text_config(),
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
        **options,
    )
    return finish(LlavaForConditionalGeneration(config), seed, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    flat = [size for prompt in sizes for size in prompt]
    entries = llava_images(model, flat, seed)
    return {"pixel_values": entries["pixel_values"].to(model.dtype)}, [[IMAGE] * (SIDE // PATCH) ** 2] * len(flat)


ROW = FamilyRow("llava-siglip", build, images, [(SIDE, SIDE)] * 4)
