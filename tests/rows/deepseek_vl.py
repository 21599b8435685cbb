"""DeepSeek-VL: a SigLIP tower, nothing around the placeholders."""

from typing import Any

import torch
from models import IMAGE, PATCH, SIDE, FamilyRow, Visuals, finish, llava_images, text_config, vision_config
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = DeepseekVLConfig(
        vision_config=vision_config("siglip"),
        text_config=text_config(**options.pop("text", {})),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
        **options,
    )
    return finish(DeepseekVLForConditionalGeneration(config), seed, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    flat = [size for prompt in sizes for size in prompt]
    pixels = llava_images(model, flat, seed)["pixel_values"].to(model.dtype)
    return {"pixel_values": pixels}, [[IMAGE] * (SIDE // PATCH) ** 2] * len(flat)


ROW = FamilyRow("deepseek-vl", build, images, [(SIDE, SIDE)] * 4)
