"""PaliGemma: a prompt in which every token looks at every other; an answer written from left to right."""

from typing import Any

import torch
import transformers
from models import IMAGE, PATCH, SIDE, FamilyRow, Visuals, finish, noise, text_config, vision_config
from packaging.version import Version
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from rows.gemma3 import centre_norms


def build(seed: int = 0, dtype: torch.dtype = torch.float32, text: str = "gemma", **options: Any) -> Any:
    config = PaliGemmaConfig(
        vision_config=vision_config("siglip"),
        text_config={**gemma_config(), "model_type": text},
        image_token_index=options.pop("image_token_index", IMAGE),
        vocab_size=text_config().vocab_size,
        projection_dim=48,
        hidden_size=48,
        **options,
    )
    model = finish(PaliGemmaForConditionalGeneration(config), seed, dtype)
    centre_norms(model)
    return model


def gemma_config() -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    return {**{name: getattr(text_config(), name) for name in names}, "head_dim": 12, "query_pre_attn_scalar": 12}


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    count = sum(len(prompt) for prompt in sizes)
    pixels = torch.stack([noise(seed + number, 3, SIDE, SIDE) for number in range(count)])
    return {"pixel_values": pixels.to(model.dtype)}, [[IMAGE] * (SIDE // PATCH) ** 2] * count


ROW = FamilyRow(
    "paligemma",
    build,
    images,
    [(SIDE, SIDE)] * 4,
    token_types={"token_type_ids": {}},
    answer_types={"token_type_ids": 1},
    looks_ahead=True,
    packed_rows=Version(transformers.__version__) >= Version("5.24"),
    first_position=1,
    continued_with_images=False,
)
