"""LightOnOCR: a Pixtral tower for images of any size in one row, 2 x 2 patches to a token, placeholders in one run."""

from typing import Any

import torch
from models import IMAGE, PATCH, FamilyRow, Visuals, finish, text_config
from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration, Qwen3Config

from rows.mistral3 import MERGE, pixels, vision_config


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = LightOnOcrConfig(
        **{
            "vision_config": vision_config(),
            "text_config": Qwen3Config(**{**text_config().to_diff_dict(), "head_dim": 12}),
            "image_token_id": IMAGE,
            "spatial_merge_size": MERGE,
            **options,
        }
    )
    return finish(LightOnOcrForConditionalGeneration(config), seed, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    flat = [size for prompt in sizes for size in prompt]
    entries = pixels(flat, seed)
    entries["pixel_values"] = entries["pixel_values"].to(model.dtype)
    side = MERGE * PATCH
    return entries, [[IMAGE] * (height // side * (width // side)) for height, width in flat]


ROW = FamilyRow("lighton-ocr", build, images, [(84, 112), (112, 84), (56, 168), (112, 112)])
