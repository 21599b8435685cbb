"""Idefics3: tiles between markers, whose place is written in several tokens, as the tokenizer of the checkpoint does."""

import math
from typing import Any

import torch
from models import IMAGE, MARKERS, PAD, PATCH, SIDE, TOWER, FamilyRow, Visuals, finish, noise, text_config
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

AROUND, OPEN, CLOSE, WHOLE, NEW_LINE, BLANK_LINE = (MARKERS[number] for number in range(6))
TOKENS = (SIDE // PATCH // 2) ** 2
"""Of one tile."""
VISION = {
    **TOWER,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = Idefics3Config(
        vision_config=VISION,
        text_config=text_config(),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        **options,
    )
    return finish(Idefics3ForConditionalGeneration(config), seed, dtype)


def grid(size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of tiles in front of the whole image; (0, 0) where that is all."""
    rows, columns = (math.ceil(length / SIDE) for length in size)
    return (0, 0) if rows * columns == 1 else (rows, columns)


def place_in_words(row: int, column: int) -> list[int]:
    return [OPEN, 3 + row, 13 + column, CLOSE]


def tokens_of(size: tuple[int, int], place: Any = place_in_words, whole: tuple[int, ...] = (OPEN, WHOLE, CLOSE)) -> Any:
    rows, columns = grid(size)
    tokens = []
    for row in range(rows):
        for column in range(columns):
            tokens += [AROUND, *place(row, column), *[IMAGE] * TOKENS]
        tokens.append(NEW_LINE)
    if rows:
        tokens[-1] = BLANK_LINE  # two new lines in a row
    return [*tokens, AROUND, *whole, *[IMAGE] * TOKENS, AROUND]


def tiles(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> dict[str, Any]:
    """As the processor fills them up: one list of tiles per prompt, empty where it has no image."""
    seeds = iter(range(seed, seed + 99))
    prompts = [
        torch.cat([noise(next(seeds), math.prod(grid(size)) + 1, 3, SIDE, SIDE) for size in prompt])
        if prompt
        else torch.zeros(0, 3, SIDE, SIDE)
        for prompt in sizes
    ]
    pixels = torch.zeros(len(prompts), max(map(len, prompts)), 3, SIDE, SIDE)
    mask = torch.zeros(*pixels.shape[:2], SIDE, SIDE, dtype=torch.long)
    for number, prompt in enumerate(prompts):
        pixels[number, : len(prompt)], mask[number, : len(prompt)] = prompt, 1
    return {"pixel_values": pixels.to(model.dtype), "pixel_attention_mask": mask}


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    return tiles(model, sizes, seed), [tokens_of(size) for prompt in sizes for size in prompt]


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.cat((first[name], second[name]), dim=1) for name in first}


ROW = FamilyRow(
    "idefics3",
    build,
    images,
    [(90, 130), (56, 150), (100, 100), (40, 50)],
    joined=joined,
    needs_ids=True,
    offloads=False,
)
