"""Kimi K2.5: patches in raster order, merged 2 x 2 behind the tower, a DeepSeek-V3 of two layers, one of them experts."""

from typing import Any

import torch
from models import BEGIN, END, IMAGE, PAD, PATCH, TOWER, VIDEO, VOCABULARY, FamilyRow, finish
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

from rows.paddleocr_vl import images
from rows.qwen2_5_vl import MERGE, VISION_END, VISION_START

TEXT = {
    "model_type": "deepseek_v3",
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = Kimi_K25Config(
        vision_config={
            **TOWER,
            "patch_size": PATCH,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "merge_kernel_size": [MERGE, MERGE],
        },
        text_config=TEXT,
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
        **options,
    )
    return finish(Kimi_K25ForConditionalGeneration(config), seed, dtype)


ROW = FamilyRow("kimi-k2.5", build, images, [(84, 112), (140, 84), (56, 168), (112, 112)])
