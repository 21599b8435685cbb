"""GLM-4.5V: GLM-4.1V's tower under a mixture of experts."""

from typing import Any

import torch
from models import FamilyRow, finish
from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

from rows.glm4v import OPTIONS, SIZES, TOKENS, VISION, text_options, videos
from rows.qwen2_5_vl import images


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Glm4vMoeConfig(vision_config=VISION, text_config={**text_options(), **experts}, **TOKENS, **options)
    return finish(Glm4vMoeForConditionalGeneration(config), seed, dtype)


ROW = FamilyRow("glm-moe-4v", build, images, SIZES, videos, clips=(6, 4), offloads=False, **OPTIONS)
