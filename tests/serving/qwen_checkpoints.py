"""Small Qwen models with random weights on disk, as their stock classes and processors save them.

The weights are lively, so that the answers depend on every token and on its position.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import END, IMAGE, MARKERS, PAD, PATCH, VIDEO, VOCABULARY, finish
from stock_processors import qwen2_5_vl, qwen3_vl

SIDE = 2 * PATCH
"""Of a token, in pixels."""

VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": END,
    "tie_word_embeddings": False,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": MARKERS[0],
    "vision_end_token_id": MARKERS[1],
}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


def _qwen2_5() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    # Of five blocks the fourth looks at the whole image: not the last, whose output goes on.
    vision = {**VISION, "depth": 5, "window_size": 56, "fullatt_block_indexes": [1, 3]}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": ROTARY}, **TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
    text = {**TEXT, "head_dim": 32, "rope_parameters": {**ROTARY, "mrope_interleaved": True}}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **TOKENS))


BUILDERS = {"Qwen2_5_VLForConditionalGeneration": _qwen2_5, "Qwen3VLForConditionalGeneration": _qwen3}
PROCESSORS = {"Qwen2_5_VLForConditionalGeneration": qwen2_5_vl, "Qwen3VLForConditionalGeneration": qwen3_vl}


def qwen(architecture: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with a checkpoint that takes images of 4 to 96 tokens."""
    target = folder / f"{architecture}-{dtype}"
    if not target.exists():
        model = finish(BUILDERS[architecture](), seed=3, dtype=dtype)
        processor = PROCESSORS[architecture](model)
        processor.image_processor.size = {"shortest_edge": 4 * SIDE**2, "longest_edge": 96 * SIDE**2}
        model.save_pretrained(target)
        processor.save_pretrained(target)
    return target
