"""Qwen2.5-VL: windows, full attention in two blocks of four, M-RoPE, videos."""

from typing import Any

import torch
from models import IMAGE, MARKERS, NO_GUIDANCE, PATCH, VIDEO, FamilyRow, Visuals, finish, noise, text_config
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

VISION_START, VISION_END = MARKERS[0], MARKERS[1]
TEMPORAL, MERGE = 2, 2
VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 48,
    "patch_size": PATCH,
    "temporal_patch_size": TEMPORAL,
    "spatial_merge_size": MERGE,
}
"""What the towers of all of Qwen's generations have in common."""
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def rotary_text_config() -> dict[str, Any]:
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    return {**text_config().to_diff_dict(), "rope_parameters": rotary, "model_type": None}


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = Qwen2_5_VLConfig(
        vision_config={**VISION, "window_size": 56, "fullatt_block_indexes": [1, 3]},
        text_config={name: value for name, value in rotary_text_config().items() if value is not None},
        **TOKENS,
        **options,
    )
    return finish(Qwen2_5_VLForConditionalGeneration(config), seed, dtype)


def patches(model: Any, grids: list[list[int]], seed: int, token: int, pixels: str, sizes: str) -> Visuals:
    width = 3 * TEMPORAL * PATCH**2
    rows = [noise(seed + number, frames * down * across, width) for number, (frames, down, across) in enumerate(grids)]
    tokens = [
        [VISION_START, *[token] * (frames * down * across // MERGE**2), VISION_END] for frames, down, across in grids
    ]
    return {pixels: torch.cat(rows).to(model.dtype), sizes: torch.tensor(grids)}, tokens


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    grids = [[1, height // PATCH, width // PATCH] for prompt in sizes for height, width in prompt]
    return patches(model, grids, seed, IMAGE, "pixel_values", "image_grid_thw")


def videos(model: Any, frames: list[list[int]], seed: int) -> Visuals:
    grids = [[count // TEMPORAL, 4, 6] for prompt in frames for count in prompt]
    entries, tokens = patches(model, grids, seed + 50, VIDEO, "pixel_values_videos", "video_grid_thw")
    return {**entries, "second_per_grid_ts": torch.tensor([0.5] * len(grids))}, tokens


ROW = FamilyRow(
    "qwen2.5-vl",
    build,
    images,
    [(84, 112), (140, 84), (56, 168), (112, 112)],
    videos,
    clips=(6, 4),
    token_types={"mm_token_type_ids": {IMAGE: 1, VIDEO: 2}},
    rotary=True,
    refuses={"guidance": NO_GUIDANCE},
)
