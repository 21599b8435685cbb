"""Qianfan-OCR: tiles and prompts as InternVL's."""

from typing import Any

import torch
from models import IMAGE, PATCH, SIDE, TOWER, FamilyRow, finish, text_config
from transformers import QianfanOCRConfig, QianfanOCRForConditionalGeneration, Qwen3Config

from rows.internvl import TOKENS, images


def build(seed: int = 0, dtype: torch.dtype = torch.float32, vision: Any = None, **options: Any) -> Any:
    config = QianfanOCRConfig(
        vision_config={
            **TOWER,
            "image_size": SIDE,
            "patch_size": PATCH,
            "drop_path_rate": 0.0,  # chance has no place in a comparison of two models that are trained
            **(vision or {}),
        },
        text_config=Qwen3Config(**{**text_config().to_diff_dict(), "head_dim": 12}),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        **options,
    )
    return finish(QianfanOCRForConditionalGeneration(config), seed, dtype)


ROW = FamilyRow("qianfan-ocr", build, images, [(90, 130), (170, 56), (120, 118), (64, 64)])
