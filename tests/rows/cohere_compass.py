"""North Micro Vision: Qwen3-VL's inputs, layers with a sliding window and layers without positions."""

from typing import Any

import torch
from models import IMAGE, NO_GUIDANCE, VIDEO, FamilyRow, finish
from transformers import CohereCompassConfig, CohereCompassForConditionalGeneration

from rows.qwen2_5_vl import images
from rows.qwen3_vl import TOKENS, VISION, text_options, videos


def text() -> dict[str, Any]:
    """The sliding window is wider than any prompt here: it is counted in tokens of the prompt that the model sees."""
    options = text_options()
    return {
        **options,
        "rope_parameters": {"sliding_attention": options["rope_parameters"], "full_attention": None},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 512,
        "logit_scale": 1.0,
    }


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    kind = {"model_type": "cohere_compass_vision"}
    config = CohereCompassConfig(vision_config={**VISION, **kind}, text_config=text(), **TOKENS, **options)
    return finish(CohereCompassForConditionalGeneration(config), seed, dtype)


# Older releases fail to generate from videos, see test_family_cohere_compass.py.
GENERATES_FROM_VIDEOS = "video" in CohereCompassForConditionalGeneration.input_modalities

ROW = FamilyRow(
    "cohere-compass",
    build,
    images,
    [(84, 112), (140, 84), (56, 168), (112, 112)],
    videos if GENERATES_FROM_VIDEOS else None,
    clips=(6, 4),
    token_types={"mm_token_type_ids": {IMAGE: 1, VIDEO: 2}},
    rotary=True,
    refuses={"guidance": NO_GUIDANCE},
)
