"""GLM-OCR: GLM-4.1V's inputs and language model, a tower without learned positions."""

from typing import Any

import torch
from models import FamilyRow, finish
from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

from rows.glm4v import OPTIONS, SIZES, TOKENS, VISION, text_options, videos
from rows.qwen2_5_vl import images


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    vision = {**VISION, "model_type": "glm_ocr_vision"}
    text = {**text_options(), "model_type": "glm_ocr_text", "head_dim": 12}
    config = GlmOcrConfig(vision_config=vision, text_config=text, **TOKENS, **options)
    return finish(GlmOcrForConditionalGeneration(config), seed, dtype)


ROW = FamilyRow("glm-ocr", build, images, SIZES, videos, clips=(6, 4), **OPTIONS)
