"""Qwen3-VL: deepstack features for two language layers, M-RoPE, videos as frames with their times between them."""

from typing import Any

import torch
from models import IMAGE, NO_GUIDANCE, VIDEO, FamilyRow, Visuals, finish, words
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from rows import qwen2_5_vl
from rows.qwen2_5_vl import TEMPORAL, TOKENS, VISION_END, VISION_START, images, patches, rotary_text_config

VISION = {**qwen2_5_vl.VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}


def text_options() -> dict[str, Any]:
    options = {name: value for name, value in rotary_text_config().items() if value is not None}
    options["rope_parameters"] = {**options["rope_parameters"], "mrope_interleaved": True}
    return {**options, "head_dim": 12}


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = Qwen3VLConfig(vision_config=VISION, text_config=text_options(), **TOKENS, **options)
    return finish(Qwen3VLForConditionalGeneration(config), seed, dtype)


def videos(model: Any, frames: list[list[int]], seed: int) -> Visuals:
    """Each frame (of two pictures) is an image of its own in the prompt, behind the text "<1.5 seconds>"."""
    grids = [[count // TEMPORAL, 4, 6] for prompt in frames for count in prompt]
    entries, whole = patches(model, grids, seed + 50, VIDEO, "pixel_values_videos", "video_grid_thw")
    tokens = []
    for (count, *_), video in zip(grids, whole, strict=True):
        shown = [VIDEO] * (video.count(VIDEO) // count)
        stamps = [words(3, 70 + frame) for frame in range(count)]
        tokens.append([token for stamp in stamps for token in [*stamp, VISION_START, *shown, VISION_END]])
    return entries, tokens


ROW = FamilyRow(
    "qwen3-vl",
    build,
    images,
    [(84, 112), (140, 84), (56, 168), (112, 112)],
    videos,
    clips=(6, 4),
    token_types={"mm_token_type_ids": {IMAGE: 1, VIDEO: 2}},
    rotary=True,
    refuses={"guidance": NO_GUIDANCE},
)
