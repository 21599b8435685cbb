"""Command A Vision: tiles of a SigLIP tower, one token behind each."""

from typing import Any

import torch
from models import IMAGE, MARKERS, SIDE, FamilyRow, Visuals, finish, noise
from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

from rows.aya_vision import text, vision
from rows.internvl import TOKENS, tiles

BEGIN_IMAGE, END_IMAGE, BREAK = (MARKERS[number] for number in range(3))


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = Cohere2VisionConfig(
        vision_config=vision(),
        text_config=text(),
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
        tie_word_embeddings=False,
        **options,
    )
    # Other seeds than elsewhere: with those this model answers with padding, which `generate` then masks by itself.
    return finish(Cohere2VisionForConditionalGeneration(config), seed + 7, dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    counts = [tiles(size) for prompt in sizes for size in prompt]
    pixels = [noise(seed + number, count, 3, SIDE, SIDE) for number, count in enumerate(counts)]
    tokens = [[BEGIN_IMAGE, *[*[IMAGE] * TOKENS, BREAK] * count, END_IMAGE] for count in counts]
    return {"pixel_values": torch.cat(pixels).to(model.dtype)}, tokens


ROW = FamilyRow("cohere2-vision", build, images, [(90, 130), (170, 56), (120, 118), (64, 64)])
