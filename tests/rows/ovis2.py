"""Ovis2: the whole image first, then its tiles; 2 x 2 patches to a token, markers whose embeddings come from the encoder."""

from typing import Any

import torch
from models import IMAGE, MARKERS, NO_CHUNKS, PATCH, SIDE, TOWER, FamilyRow, Visuals, finish, noise, text_config
from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Qwen2Config

START, GRID, COLUMN, ROW_END, END = MARKERS[:5]


def build(seed: int = 0, dtype: torch.dtype = torch.float32, vision: Any = None, **options: Any) -> Any:
    text = Qwen2Config(**text_config().to_diff_dict())
    config = Ovis2Config(
        vision_config={
            **TOWER,
            "image_size": SIDE,
            "patch_size": PATCH,
            "vocab_size": 40,
            "hidden_stride": 2,
            **(vision or {}),
        },
        text_config=text,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, GRID, COLUMN, ROW_END, END],
        tie_word_embeddings=False,
        **options,
    )
    model = finish(Ovis2ForConditionalGeneration(config), seed, dtype)
    with torch.no_grad():
        model.model.vision_tower.head_norm.weight *= 3  # tokens are mixtures: let them differ
        model.model.visual_embeddings_table.weight *= 8
        # Random models say anything. A marker that was said is a word to the cache, and a marker to who reads it anew.
        model.lm_head.weight[list(MARKERS[:5])] = 0
    return model


def grid(size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of tiles."""
    from transformers.models.ovis2.image_processing_pil_ovis2 import get_min_tile_covering_grid

    columns, rows = get_min_tile_covering_grid(size, target_patch_size=SIDE, max_image_tiles=6)
    return rows, columns


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    grids = [grid(size) for prompt in sizes for size in prompt]
    stride = model.config.vision_config.hidden_stride
    run = [IMAGE] * (SIDE // PATCH // stride) ** 2
    pixels, tokens = [], []
    for number, (rows, columns) in enumerate(grids):
        shown = [START, *run, GRID]
        count = rows * columns
        for tile in range(count if count > 1 else 0):
            ends_row = tile % columns == columns - 1
            shown += [*run, ROW_END if ends_row else COLUMN]
        if count > 1:
            shown.pop()  # nothing ends the last row
        tokens.append([*shown, END])
        pixels.append(noise(seed + number, count + (count > 1), 3, SIDE, SIDE))
    return {"pixel_values": torch.cat(pixels).to(model.dtype)}, tokens


ROW = FamilyRow(
    "ovis2", build, images, [(90, 130), (170, 56), (50, 50), (120, 118)], refuses={"chunked-prefill": NO_CHUNKS}
)
