"""LLaVA-1.5."""

from typing import Any

from models import IMAGE, FamilyRow, Visuals, llava, llava_images


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    flat = [size for prompt in sizes for size in prompt]
    return llava_images(model, flat, seed), [[IMAGE] * 16 for _ in flat]


ROW = FamilyRow("llava", llava, images, [(56, 56)] * 4, deep=True)
