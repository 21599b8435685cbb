"""DeepSeek-VL 7B: DeepSeek-VL with a SAM tower for the same images at a higher resolution."""

from typing import Any

import torch
from models import IMAGE, SIDE, FamilyRow, Visuals, finish, noise, text_config, vision_config
from transformers import DeepseekVLHybridConfig, DeepseekVLHybridForConditionalGeneration, SamVisionConfig

from rows.deepseek_vl import images as low_resolution

HIGH_SIDE = 64


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = DeepseekVLHybridConfig(
        vision_config=vision_config("siglip"),
        high_res_vision_config=SamVisionConfig(
            hidden_size=32,
            output_channels=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=HIGH_SIDE,
            patch_size=8,
            window_size=3,
            global_attn_indexes=[1, 2],
            mlp_dim=48,
            num_pos_feats=8,
        ),
        text_config=text_config(**options.pop("text", {})),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
        **options,
    )
    model = finish(DeepseekVLHybridForConditionalGeneration(config), seed, dtype)
    with torch.no_grad():
        model.model.high_res_vision_alpha.fill_(0.5)
    return model


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    entries, tokens = low_resolution(model, sizes, seed)
    high = torch.stack([noise(seed + number + 500, 3, HIGH_SIDE, HIGH_SIDE) for number in range(len(tokens))])
    return {**entries, "high_res_pixel_values": high.to(model.dtype)}, tokens


ROW = FamilyRow("deepseek-vl-hybrid", build, images, [(SIDE, SIDE)] * 4)
