"""Janus: its own tower, a token in front of an image and one behind it."""

from typing import Any

import torch
from models import IMAGE, MARKERS, PATCH, SIDE, FamilyRow, Visuals, finish, llava_images, text_config
from transformers import JanusConfig, JanusForConditionalGeneration
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

IMAGE_START, IMAGE_END = MARKERS[0], MARKERS[1]


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = JanusConfig(
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
            mlp_ratio=2.0,
            projection_dim=48,
            num_image_tokens=(SIDE // PATCH) ** 2,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=16,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            projection_dim=48,
            image_token_embed_dim=48,
        ),
        text_config=text_config(**options.pop("text", {})),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
        **options,
    )
    return finish(JanusForConditionalGeneration(config), seed, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    flat = [size for prompt in sizes for size in prompt]
    pixels = llava_images(model, flat, seed)["pixel_values"].to(model.dtype)
    return {"pixel_values": pixels}, [[IMAGE_START, *[IMAGE] * (SIDE // PATCH) ** 2, IMAGE_END]] * len(flat)


ROW = FamilyRow("janus", build, images, [(SIDE, SIDE)] * 4)
