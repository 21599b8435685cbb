"""Qwen2-VL: Qwen2.5-VL's inputs, a tower that looks at whole frames in every block."""

from typing import Any

import torch
from models import IMAGE, NO_GUIDANCE, PATCH, VIDEO, FamilyRow, finish
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from rows.qwen2_5_vl import MERGE, TEMPORAL, VISION_END, VISION_START, images, rotary_text_config, videos


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = Qwen2VLConfig(
        vision_config={
            "depth": 3,
            "embed_dim": 32,
            "hidden_size": 48,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": PATCH,
            "temporal_patch_size": TEMPORAL,
            "spatial_merge_size": MERGE,
        },
        text_config={name: value for name, value in rotary_text_config().items() if value is not None},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        **options,
    )
    return finish(Qwen2VLForConditionalGeneration(config), seed, dtype)


def videos_without_rate(model: Any, frames: list[list[int]], seed: int) -> Any:
    """Qwen2-VL counts frames, not seconds: its processor says nothing of the frame rate."""
    entries, tokens = videos(model, frames, seed)
    return {name: value for name, value in entries.items() if name != "second_per_grid_ts"}, tokens


ROW = FamilyRow(
    "qwen2-vl",
    build,
    images,
    [(84, 112), (140, 84), (56, 168), (112, 112)],
    videos_without_rate,
    clips=(6, 4),
    token_types={"mm_token_type_ids": {IMAGE: 1, VIDEO: 2}},
    rotary=True,
    refuses={"guidance": NO_GUIDANCE},
)
