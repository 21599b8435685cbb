"""Gemma 4: images of different sizes padded to one length, 2 x 2 patches to a token, shared keys, inputs for every layer."""

from typing import Any

import torch
from models import BEGIN, END, IMAGE, MARKERS, PAD, PATCH, TOWER, VIDEO, VOCABULARY, FamilyRow, Visuals, finish, noise
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

BEGIN_IMAGE, END_IMAGE = MARKERS[0], MARKERS[1]
POOLED, LONGEST = 2, 56
"""Patches along each side of a token; patches that every image is padded to."""


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, window: int = 512, text: Any = None, **options: Any
) -> Any:
    """The sliding window is wider than any prompt here, since it is counted in tokens of the prompt that the model sees."""
    config = Gemma4Config(
        vision_config={
            **TOWER,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "patch_size": PATCH,
            "pooling_kernel_size": POOLED,
            "position_embedding_size": 32,
        },
        text_config={
            "vocab_size": VOCABULARY,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size": 48,
            "hidden_size_per_layer_input": 8,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "global_head_dim": 16,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "max_position_embeddings": 2048,
            "sliding_window": window,
            "pad_token_id": PAD,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            **(text or {}),
        },
        audio_config=None,
        boi_token_id=BEGIN_IMAGE,
        eoi_token_id=END_IMAGE,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=MARKERS[-1],
        tie_word_embeddings=False,
        **options,
    )
    return finish(Gemma4ForConditionalGeneration(config), seed, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    """As the processor writes them: patches in reading order, places as (x, y), padding behind them."""
    flat = [(height // PATCH, width // PATCH) for prompt in sizes for height, width in prompt]
    pixels = torch.zeros(len(flat), LONGEST, 3 * PATCH**2)
    places = torch.full((len(flat), LONGEST, 2), -1)
    tokens = []
    for number, (rows, columns) in enumerate(flat):
        pixels[number, : rows * columns] = noise(seed + number, rows * columns, 3 * PATCH**2)
        places[number, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
        tokens.append([BEGIN_IMAGE, *[IMAGE] * (rows * columns // POOLED**2), END_IMAGE])
    return {"pixel_values": pixels.to(model.dtype), "image_position_ids": places}, tokens


ROW = FamilyRow(
    "gemma4",
    build,
    images,
    [(84, 112), (112, 84), (56, 168), (56, 112)],
    token_types={"mm_token_type_ids": {IMAGE: 1}},
    needs_ids=True,
    offloads=False,
)
