"""Cosmos 3: Qwen3-VL's tower and language model in a class of their own."""

from typing import Any

import torch
from models import IMAGE, NO_GUIDANCE, VIDEO, FamilyRow, finish
from transformers import Cosmos3OmniConfig, Cosmos3OmniForConditionalGeneration

from rows.qwen2_5_vl import images
from rows.qwen3_vl import TOKENS, VISION, text_options, videos


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = Cosmos3OmniConfig(
        vision_config={**VISION, "model_type": "qwen3_vl_vision"},
        text_config={**text_options(), "model_type": "qwen3_vl_text"},
        **TOKENS,
        **options,
    )
    return finish(Cosmos3OmniForConditionalGeneration(config), seed, dtype)


ROW = FamilyRow(
    "cosmos3-omni",
    build,
    images,
    [(84, 112), (140, 84), (56, 168), (112, 112)],
    videos,
    clips=(6, 4),
    token_types={"mm_token_type_ids": {IMAGE: 1, VIDEO: 2}},
    rotary=True,
    refuses={"guidance": NO_GUIDANCE},
)
