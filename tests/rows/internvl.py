"""InternVL: tiles of one size in one row, a thumbnail behind them, 2 x 2 patches to a token."""

from typing import Any

import torch
from models import IMAGE, MARKERS, PATCH, SIDE, TOWER, FamilyRow, Visuals, finish, noise, text_config
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

BEGIN_IMAGE, END_IMAGE = MARKERS[0], MARKERS[1]
TOKENS = (SIDE // PATCH // 2) ** 2
"""Of one tile."""


def build(seed: int = 0, dtype: torch.dtype = torch.float32, vision: Any = None, **options: Any) -> Any:
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            **{
                **TOWER,
                "image_size": SIDE,
                "patch_size": PATCH,
                "attention_bias": True,
                "use_qk_norm": True,
                **(vision or {}),
            }
        ),
        text_config=Qwen2Config(**text_config().to_diff_dict()),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
        **options,
    )
    return finish(InternVLForConditionalGeneration(config), seed, dtype)


def tiles(size: tuple[int, int]) -> int:
    """Crops, and a thumbnail where there is more than one."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    columns, rows = get_optimal_tiled_canvas(size, (SIDE, SIDE), 1, 6)
    return columns * rows + (columns * rows > 1)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    counts = [tiles(size) for prompt in sizes for size in prompt]
    pixels = [noise(seed + number, count, 3, SIDE, SIDE) for number, count in enumerate(counts)]
    tokens = [[BEGIN_IMAGE, *[IMAGE] * (TOKENS * count), END_IMAGE] for count in counts]
    return {"pixel_values": torch.cat(pixels).to(model.dtype)}, tokens


ROW = FamilyRow("internvl", build, images, [(90, 130), (170, 56), (120, 118), (64, 64)])
