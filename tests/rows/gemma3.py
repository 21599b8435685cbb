"""Gemma 3: a SigLIP tower, 2 x 2 patches averaged to a token, tokens of an image that look at each other both ways.

The sliding window is wider than any prompt here, since it is counted in tokens of the prompt that the model sees, which
the oracle's is longer than; test_family_gemma3.py has a narrow one.
"""

from typing import Any

import torch
import transformers
from models import BEGIN, END, IMAGE, MARKERS, PAD, PATCH, SIDE, TOWER, VOCABULARY, FamilyRow, Visuals, finish, noise
from packaging.version import Version
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

BEGIN_IMAGE, END_IMAGE, BLANK_LINE = MARKERS[0], MARKERS[1], MARKERS[2]
TOKENS = (SIDE // PATCH) ** 2
"""Of one image: 2 x 2 of the patches become one token."""


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, window: int = 512, vision: Any = None, **options: Any
) -> Any:
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(
            **{
                **TOWER,
                "image_size": 2 * SIDE,
                "patch_size": PATCH,
                "vision_use_head": False,
                **(vision or {}),
            }
        ),
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "max_position_embeddings": 2048,
            "sliding_window": window,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "pad_token_id": PAD,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
        },
        mm_tokens_per_image=TOKENS,
        **{"boi_token_index": BEGIN_IMAGE, "eoi_token_index": END_IMAGE, "image_token_index": IMAGE, **options},
    )
    model = finish(Gemma3ForConditionalGeneration(config), seed, dtype)
    centre_norms(model)
    return model


def centre_norms(model: Any) -> None:
    """Gemma multiplies by one plus the weight of a norm: `finish` would make all signals twice as large, layer by layer."""
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.startswith("Gemma") and type(module).__name__.endswith("RMSNorm"):
                module.weight -= 1


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    count = sum(len(prompt) for prompt in sizes)
    side = model.config.vision_config.image_size
    pixels = torch.stack([noise(seed + number, 3, side, side) for number in range(count)])
    tokens = [BLANK_LINE, BEGIN_IMAGE, *[IMAGE] * model.config.mm_tokens_per_image, END_IMAGE, BLANK_LINE]
    return {"pixel_values": pixels.to(model.dtype)}, [tokens] * count


ROW = FamilyRow(
    "gemma3",
    build,
    images,
    [(2 * SIDE, 2 * SIDE)] * 4,
    token_types={"token_type_ids": {IMAGE: 1}},
    looks_ahead=True,
    packed_rows=Version(transformers.__version__) < Version("5.23"),
    continued_with_images=Version(transformers.__version__) >= Version("5.23"),
)
