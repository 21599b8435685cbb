"""Qwen2.5-Omni's thinker: Qwen2.5-VL's tower and inputs, positions told from the tokens, an encoder for audio beside."""

from typing import Any

import torch
import transformers.models.qwen2_5_omni.modeling_qwen2_5_omni as stock
from models import MARKERS, NO_GUIDANCE, FamilyRow, Visuals, finish
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from rows import qwen2_5_vl
from rows.qwen2_5_vl import VISION, VISION_START, images, rotary_text_config

AUDIO, AUDIO_START, AUDIO_END = MARKERS[5], MARKERS[6], MARKERS[7]
MELS = 8
HEARING = {
    "num_mel_bins": MELS,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "d_model": 16,
    "n_window": 4,
    "output_dim": 48,
    "max_source_positions": 64,
}
TOKENS = {
    **qwen2_5_vl.TOKENS,
    "audio_token_id": AUDIO,
    "audio_start_token_id": AUDIO_START,
    "audio_end_token_id": AUDIO_END,
    "position_id_per_seconds": 4,
}


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = Qwen2_5OmniThinkerConfig(
        audio_config=HEARING,
        vision_config={**VISION, "window_size": 56, "fullatt_block_indexes": [1, 3]},
        text_config={name: value for name, value in rotary_text_config().items() if value is not None},
        tie_word_embeddings=False,
        **TOKENS,
        **options,
    )
    return less_talkative(finish(Qwen2_5OmniThinkerForConditionalGeneration(config), seed, dtype))


def less_talkative(model: Any) -> Any:
    """Hardly ever says a token that begins an image or a sound: the stock models fail where none follows."""
    model.lm_head.weight.data[[VISION_START, AUDIO, AUDIO_START]] = 0
    return model


def videos(model: Any, frames: list[list[int]], seed: int) -> Visuals:
    entries, tokens = qwen2_5_vl.videos(model, frames, seed)
    entries["video_second_per_grid"] = entries.pop("second_per_grid_ts")
    return entries, tokens


ROW = None
if hasattr(stock, "Qwen2_5OmniThinkerModel"):  # older releases have the tower elsewhere: see test_family_qwen_omni.py
    ROW = FamilyRow(
        "qwen2.5-omni",
        build,
        images,
        [(84, 112), (140, 84), (56, 168), (112, 112)],
        videos,
        clips=(6, 4),
        rotary=True,
        refuses={"guidance": NO_GUIDANCE},
    )
