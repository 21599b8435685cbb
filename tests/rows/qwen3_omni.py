"""Qwen3-Omni's thinker: Qwen3-VL's tower under a mixture of experts, positions in fractions, an encoder for audio."""

from typing import Any

import torch
import transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe as stock
from models import NO_GUIDANCE, FamilyRow, Visuals, finish
from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

from rows import qwen2_5_omni, qwen3_vl
from rows.qwen2_5_omni import HEARING, TOKENS, less_talkative
from rows.qwen2_5_vl import images


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen3OmniMoeThinkerConfig(
        audio_config={
            **HEARING,
            "n_window": 50,
            "n_window_infer": 100,
            "conv_chunksize": 4,
            "downsample_hidden_size": 8,
        },
        vision_config=qwen3_vl.VISION,
        text_config={**qwen3_vl.text_options(), **experts},
        **TOKENS,
        **options,
    )
    return less_talkative(finish(Qwen3OmniMoeThinkerForConditionalGeneration(config), seed, dtype))


def videos(model: Any, frames: list[list[int]], seed: int) -> Visuals:
    entries, tokens = qwen2_5_omni.videos(model, frames, seed)
    return {**entries, "video_second_per_grid": entries["video_second_per_grid"] * 0.7}, tokens


ROW = None
if hasattr(stock, "Qwen3OmniMoeThinkerModel"):  # older releases have the tower elsewhere: see test_family_qwen_omni.py
    ROW = FamilyRow(
        "qwen3-omni",
        build,
        images,
        [(84, 112), (140, 84), (56, 168), (112, 112)],
        videos,
        clips=(6, 4),
        rotary=True,
        refuses={"guidance": NO_GUIDANCE},
    )
