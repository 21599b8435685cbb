"""GLM-4.6V: GLM-4.1V's tower and language model under a class of its own."""

from typing import Any

import torch
from models import FamilyRow, finish
from transformers import Glm46VConfig, Glm46VForConditionalGeneration

from rows.glm4v import OPTIONS, SIZES, TOKENS, VISION, text_options, videos
from rows.qwen2_5_vl import images


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    kinds = {"vision_config": {**VISION, "model_type": "glm4v_vision"}}
    config = Glm46VConfig(**kinds, text_config={**text_options(), "model_type": "glm4v_text"}, **TOKENS, **options)
    return finish(Glm46VForConditionalGeneration(config), seed, dtype)


ROW = FamilyRow("glm-4.6v", build, images, SIZES, videos, clips=(6, 4), offloads=False, **OPTIONS)
