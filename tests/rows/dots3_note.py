"""dots 3 note: Qwen2-VL's patches, a language model of sparse and of windowed layers with latent keys; no markers needed."""

from typing import Any

import torch
from models import BEGIN, END, IMAGE, MARKERS, PAD, PATCH, TOWER, VIDEO, VOCABULARY, FamilyRow, Visuals, finish, noise

try:
    from transformers import Dots3NoteConfig, Dots3NoteForConditionalGeneration
except ImportError:  # transformers 5.18
    Dots3NoteConfig = None

MERGE = 2
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "head_dim": 32,
    "v_head_dim": 12,
    "index_head_dim": 16,
    # As many as there really are: a key that all of them score zero ties with others, and ties are broken by place.
    "index_n_heads": 32,
    "index_topk": 24,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 12,
    "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention", "indexed_attention"],
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}
AUDIO = {
    "hidden_size": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": 48,
    "downsample_hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def build(seed: int = 0, dtype: torch.dtype = torch.float32, window: int = 512, **options: Any) -> Any:
    """The sliding window is wider than any prompt here, since it is counted in tokens of the prompt that the model sees."""
    config = Dots3NoteConfig(
        vision_config={
            **TOWER,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "adapter_merge_size": MERGE,
            "adapter_in_dim": 32,
            "adapter_out_dim": 48,
            "moe_intermediate_size": 24,
            "pyramid_num_routed": [-1, 2, 4],
        },
        text_config={**TEXT, "sliding_window": window},
        audio_config=AUDIO,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=MARKERS[-1],
        **options,
    )
    return finish(Dots3NoteForConditionalGeneration(config), seed, dtype)


def patches(model: Any, grids: list[list[int]], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [
        noise(seed + number, count * down * across, 3 * PATCH**2) for number, (count, down, across) in enumerate(grids)
    ]
    return torch.cat(rows).to(model.dtype), torch.tensor(grids)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    grids = [[1, height // PATCH, width // PATCH] for prompt in sizes for height, width in prompt]
    pixels, in_patches = patches(model, grids, seed)
    tokens = [[MARKERS[0], *[IMAGE] * (down * across // MERGE**2), MARKERS[1]] for _, down, across in grids]
    return {"pixel_values": pixels, "image_grid_thw": in_patches}, tokens


def videos(model: Any, frames: list[list[int]], seed: int) -> Visuals:
    grids = [[count, 4, 6] for prompt in frames for count in prompt]
    pixels, in_patches = patches(model, grids, seed + 50)
    tokens = [[VIDEO] * (count * down * across // MERGE**2) for count, down, across in grids]
    return {"pixel_values_videos": pixels, "video_grid_thw": in_patches}, tokens


SIZES = [(84, 112), (140, 84), (56, 168), (112, 112)]
ROW = None if Dots3NoteConfig is None else FamilyRow("dots3-note", build, images, SIZES, videos, clips=(3, 2))
