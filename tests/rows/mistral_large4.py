"""Mistral Large 4: Mistral 3's inputs, a language model that attends to the 24 best keys only and has latent keys."""

from typing import Any

import torch
from models import BEGIN, END, IMAGE, PAD, VOCABULARY, FamilyRow, finish

from rows.mistral3 import MERGE, images, vision_config

try:
    from transformers import MistralLarge4Config, MistralLarge4ForConditionalGeneration
except ImportError:  # transformers 5.18
    MistralLarge4Config = None

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "index_head_dim": 16,
    # As many as there really are: a key that all of them score zero ties with others, and ties are broken by place.
    "index_n_heads": 32,
    "kv_source_layers": [0, 1, 1, 3],
    "indexer_types": ["full", "full", "shared", "full"],
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, best: int = 24, scaled: bool = False, **options: Any
) -> Any:
    """With `scaled`, queries grow with their position, as the released model's do; see test_family_mistral_large4.py."""
    config = MistralLarge4Config(
        vision_config=vision_config(),
        text_config={**TEXT, "index_topk": best},
        image_token_index=IMAGE,
        spatial_merge_size=MERGE,
        **options,
    )
    model = finish(MistralLarge4ForConditionalGeneration(config), seed, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("softmax_scaling.scale"):
                parameter.mul_(float(scaled))
                parameter.requires_grad_(scaled)  # its gradient tells positions apart even where it is zero
    return model


SIZES = [(84, 112), (112, 84), (56, 168), (112, 112)]
ROW = None if MistralLarge4Config is None else FamilyRow("mistral-large4", build, images, SIZES)
