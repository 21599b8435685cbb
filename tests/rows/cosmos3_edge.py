"""Cosmos 3 Edge: a SigLIP2 tower over packed patches, M-RoPE, videos as frames with their times between them."""

from typing import Any

import torch
from models import IMAGE, NO_GUIDANCE, PATCH, VIDEO, FamilyRow, Visuals, finish
from transformers import Cosmos3EdgeConfig, Cosmos3EdgeForConditionalGeneration

from adafv.engines.transformers import releases
from rows import qwen3_vl
from rows.qwen2_5_vl import TOKENS
from rows.qwen3_vl import text_options

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": PATCH,
    "num_patches": 16,
}


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    text = {**text_options(), "hidden_act": "relu2"}
    del text["rope_parameters"]["mrope_interleaved"]  # it always is
    config = Cosmos3EdgeConfig(vision_config=VISION, text_config=text, projector_hidden_size=64, **TOKENS, **options)
    return finish(Cosmos3EdgeForConditionalGeneration(config), seed, dtype)


def one_picture_each(visuals: Visuals, pixels: str) -> Visuals:
    """Of patches of two pictures, as Qwen's towers see them, the first half: this tower sees one."""
    entries, tokens = visuals
    return {**entries, pixels: entries[pixels][:, : 3 * PATCH**2]}, tokens


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    return one_picture_each(qwen3_vl.images(model, sizes, seed), "pixel_values")


def videos(model: Any, frames: list[list[int]], seed: int) -> Visuals:
    return one_picture_each(qwen3_vl.videos(model, frames, seed), "pixel_values_videos")


ROW = None
if releases.COUNTS_ALONG_COSMOS_PROMPTS:  # else refused: see test_family_packed_rows.py
    ROW = FamilyRow(
        "cosmos3-edge",
        build,
        images,
        [(84, 112), (140, 84), (56, 168), (112, 112)],
        videos,
        clips=(6, 4),
        token_types={"mm_token_type_ids": {IMAGE: 1, VIDEO: 2}},
        rotary=True,
        refuses={"guidance": NO_GUIDANCE},
        offloads=False,
    )
