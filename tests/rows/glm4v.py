"""GLM-4.1V: Qwen2-VL's inputs, a tower with a convolution for a merger, M-RoPE over half of each head."""

from typing import Any

import torch
from models import IMAGE, NO_GUIDANCE, PATCH, VIDEO, FamilyRow, Visuals, finish, words
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from rows.qwen2_5_vl import MERGE, TEMPORAL, VISION_END, VISION_START, images, patches, rotary_text_config

VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 48,
    "image_size": 4 * PATCH,
    "patch_size": PATCH,
    "temporal_patch_size": TEMPORAL,
    "spatial_merge_size": MERGE,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": VISION_START + 2,
    "video_end_token_id": VISION_START + 3,
}
SIZES = [(84, 112), (140, 84), (56, 168), (112, 112)]


def text_options() -> dict[str, Any]:
    options = {name: value for name, value in rotary_text_config().items() if value is not None}
    return {**options, "rope_parameters": {**options["rope_parameters"], "partial_rotary_factor": 1.0}}


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = Glm4vConfig(vision_config=VISION, text_config=text_options(), **TOKENS, **options)
    return finish(Glm4vForConditionalGeneration(config), seed, dtype)


def videos(model: Any, frames: list[list[int]], seed: int) -> Visuals:
    """Each frame (of two pictures) is written as an image, with its time in seconds behind it."""
    grids = [[count // TEMPORAL, 4, 6] for prompt in frames for count in prompt]
    entries, whole = patches(model, grids, seed + 50, IMAGE, "pixel_values_videos", "video_grid_thw")
    tokens = []
    for (count, *_), video in zip(grids, whole, strict=True):
        shown = [IMAGE] * (video.count(IMAGE) // count)
        each = [[VISION_START, *shown, VISION_END, *words(1, 70 + frame)] for frame in range(count)]
        inside = [token for frame in each for token in frame]
        tokens.append([TOKENS["video_start_token_id"], *inside, TOKENS["video_end_token_id"]])
    return entries, tokens


def kinds(ids: torch.Tensor) -> torch.Tensor:
    """As the processor counts: inside a video, more have begun than ended."""
    begun, ended = ((ids == TOKENS[f"video_{name}_token_id"]).cumsum(-1) for name in ("start", "end"))
    return torch.where(ids == IMAGE, torch.where(begun > ended, 2, 1), 0)


OPTIONS = {
    "token_types": {"mm_token_type_ids": kinds},
    "rotary": True,
    "refuses": {"guidance": NO_GUIDANCE},
    "mixes_up_images": True,
    "one_placeholder": True,
}
ROW = FamilyRow("glm-4v", build, images, SIZES, videos, clips=(6, 4), offloads=False, **OPTIONS)
