"""Aya Vision: named tiles of a SigLIP tower, and a language model without positions in some layers."""

from typing import Any

import torch
from models import IMAGE, MARKERS, PATCH, SIDE, FamilyRow, Visuals, finish, noise, text_config
from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config, SiglipVisionConfig

from rows.internvl import TOKENS, tiles

BEGIN_IMAGE, END_IMAGE, TILE, WHOLE = (MARKERS[number] for number in range(4))


def vision() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )


def text() -> Cohere2Config:
    """The sliding window is wider than any prompt here: it is counted in tokens of the prompt that the model sees."""
    return Cohere2Config(
        **text_config().to_diff_dict() | {"sliding_window": 512, "num_hidden_layers": 3, "logit_scale": 1.0},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = AyaVisionConfig(
        vision_config=vision(), text_config=text(), image_token_index=IMAGE, tie_word_embeddings=False, **options
    )
    return finish(AyaVisionForConditionalGeneration(config), seed, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    counts = [tiles(size) for prompt in sizes for size in prompt]
    pixels = [noise(seed + number, count, 3, SIDE, SIDE) for number, count in enumerate(counts)]
    run = [IMAGE] * TOKENS
    tokens = [
        [BEGIN_IMAGE, *(t for tile in range(1, count) for t in (TILE, 3 + tile, *run)), WHOLE, *run, END_IMAGE]
        for count in counts
    ]
    return {"pixel_values": torch.cat(pixels).to(model.dtype)}, tokens


ROW = FamilyRow("aya-vision", build, images, [(90, 130), (170, 56), (120, 118), (64, 64)], needs_ids=True)
