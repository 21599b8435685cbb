"""ViP-LLaVA: LLaVA-1.5 that reads several layers of the tower."""

from typing import Any

import torch
from models import IMAGE, PATCH, SIDE, FamilyRow, Visuals, finish, llava_images, text_config, vision_config
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

OLD_NAME = "vision_feature_layers" in vars(VipLlavaConfig())
"""Whether this release calls the setting by its older name."""


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, tower: str = "clip", layers: Any = (-2, -3, 1), **options: Any
) -> Any:
    config = VipLlavaConfig(
        vision_config=vision_config(tower, **options.pop("vision", {})),
        text_config=text_config(**options.pop("text", {})),
        image_token_index=IMAGE,
        **{"vision_feature_layers" if OLD_NAME else "vision_feature_layer": layers},
        **options,
    )
    return finish(VipLlavaForConditionalGeneration(config), seed, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    flat = [size for prompt in sizes for size in prompt]
    pixels = llava_images(model, flat, seed)["pixel_values"].to(model.dtype)
    return {"pixel_values": pixels}, [[IMAGE] * (SIDE // PATCH) ** 2] * len(flat)


ROW = FamilyRow("vipllava", build, images, [(SIDE, SIDE)] * 4)
