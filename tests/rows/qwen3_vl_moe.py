"""Qwen3-VL with a mixture of experts for a language model."""

from typing import Any

import torch
from models import IMAGE, NO_GUIDANCE, VIDEO, FamilyRow, finish
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from rows.qwen2_5_vl import images
from rows.qwen3_vl import TOKENS, VISION, text_options, videos


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen3VLMoeConfig(
        vision_config=VISION,
        text_config={**text_options(), **experts, "tie_word_embeddings": False},
        **TOKENS,
        **options,
    )
    return finish(Qwen3VLMoeForConditionalGeneration(config), seed, dtype)


ROW = FamilyRow(
    "qwen3-moe-vl",
    build,
    images,
    [(84, 112), (140, 84), (56, 168), (112, 112)],
    videos,
    clips=(6, 4),
    token_types={"mm_token_type_ids": {IMAGE: 1, VIDEO: 2}},
    rotary=True,
    refuses={"guidance": NO_GUIDANCE},
)
