"""Mistral 3: a Pixtral tower for images of any size in one row, 2 x 2 patches to a token, a token at the end of each row."""

from typing import Any

import torch
from models import IMAGE, MARKERS, PATCH, FamilyRow, Visuals, finish, noise, text_config
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

ROW_END, IMAGE_END = MARKERS[0], MARKERS[1]
MERGE = 2


def vision_config() -> PixtralVisionConfig:
    return PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=8,
        image_size=20 * PATCH,
        patch_size=PATCH,
    )


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = Mistral3Config(
        **{
            "vision_config": vision_config(),
            "text_config": MistralConfig(**{**text_config().to_diff_dict(), "sliding_window": None}),
            "image_token_index": IMAGE,
            "spatial_merge_size": MERGE,
            **options,
        }
    )
    return finish(Mistral3ForConditionalGeneration(config), seed, dtype)


def pixels(sizes: list[tuple[int, int]], seed: int) -> dict[str, Any]:
    """Images in the upper left corner of a batch as large as the largest."""
    largest = [max(size[axis] for size in sizes) for axis in (0, 1)]
    batch = torch.zeros(len(sizes), 3, *largest)
    for number, (height, width) in enumerate(sizes):
        batch[number, :, :height, :width] = noise(seed + number, 3, height, width)
    return {"pixel_values": batch, "image_sizes": torch.tensor(sizes)}


def tokens(size: tuple[int, int], side: int) -> list[int]:
    rows, columns = size[0] // side, size[1] // side
    return [*([*[IMAGE] * columns, ROW_END] * rows)[:-1], IMAGE_END]


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    flat = [size for prompt in sizes for size in prompt]
    entries = pixels(flat, seed)
    entries["pixel_values"] = entries["pixel_values"].to(model.dtype)
    return entries, [tokens(size, MERGE * PATCH) for size in flat]


ROW = FamilyRow("mistral3", build, images, [(84, 112), (112, 84), (56, 168), (112, 112)])
