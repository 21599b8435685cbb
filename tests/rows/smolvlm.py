"""SmolVLM: Idefics3 whose markers are one token each."""

from typing import Any

import torch
from models import IMAGE, MARKERS, PAD, FamilyRow, Visuals, finish, text_config
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMModel

from rows.idefics3 import VISION, joined, tiles, tokens_of

WHOLE = MARKERS[3]
PLACES = {(0, 0): MARKERS[6], (0, 1): MARKERS[7], (1, 0): MARKERS[1], (1, 1): MARKERS[2]}


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = SmolVLMConfig(
        vision_config=VISION,
        text_config=text_config(),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        **options,
    )
    return finish(SmolVLMForConditionalGeneration(config), seed, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    shown = [tokens_of(size, lambda *place: [PLACES[place]], (WHOLE,)) for prompt in sizes for size in prompt]
    return tiles(model, sizes, seed), shown


ROW = None
if hasattr(SmolVLMModel, "get_placeholder_mask"):  # else refused: see test_family_idefics3.py
    ROW = FamilyRow(
        "smolvlm", build, images, [(90, 100), (56, 110), (100, 50), (40, 50)], joined=joined, needs_ids=True
    )
