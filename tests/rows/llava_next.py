"""LLaVA-NeXT."""

from typing import Any

from models import IMAGE, FamilyRow, Visuals, image_lengths, llava_next, llava_next_images


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    entries = llava_next_images(model, [size for prompt in sizes for size in prompt], seed)
    return entries, [[IMAGE] * length for length in image_lengths(model, entries)]


ROW = FamilyRow("llava-next", llava_next, images, [(90, 100), (56, 130), (120, 40), (64, 64)], deep=True)
