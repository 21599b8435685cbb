"""PaddleOCR-VL: M-RoPE, patches in raster order, a projector that merges 2 x 2 behind the tower."""

from typing import Any

import torch
from models import IMAGE, NO_GUIDANCE, PATCH, TOWER, VIDEO, FamilyRow, Visuals, finish, noise
from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

from rows.qwen2_5_vl import MERGE, VISION_END, VISION_START, rotary_text_config


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    text = {name: value for name, value in rotary_text_config().items() if value is not None}
    config = PaddleOCRVLConfig(
        vision_config={
            **TOWER,
            "image_size": 4 * PATCH,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
        },
        text_config={**text, "head_dim": 12},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
        **options,
    )
    return finish(PaddleOCRVLForConditionalGeneration(config), seed, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    grids = [[1, height // PATCH, width // PATCH] for prompt in sizes for height, width in prompt]
    pixels = [noise(seed + number, down * across, 3, PATCH, PATCH) for number, (_, down, across) in enumerate(grids)]
    tokens = [[VISION_START, *[IMAGE] * (down * across // MERGE**2), VISION_END] for _, down, across in grids]
    return {"pixel_values": torch.cat(pixels).to(model.dtype), "image_grid_thw": torch.tensor(grids)}, tokens


ROW = FamilyRow(
    "paddleocr-vl",
    build,
    images,
    [(84, 112), (140, 84), (56, 168), (112, 112)],
    token_types={"mm_token_type_ids": {IMAGE: 1}},
    rotary=True,
    refuses={"guidance": NO_GUIDANCE},
)
