"""Batches of scenes. Batch number n is always the same batch, so training can stop and go on anywhere."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from random import Random
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adafv.evaluation.world.details import render
from adafv.evaluation.world.scenes import Box, Scene, sample_scene
from training.architecture import DEVIATION, GRID, MEAN, SIDE


class Batches(Dataset):
    """Batch `number` holds the scenes number * size to number * size + size - 1 of training, made into tensors."""

    def __init__(self, make: Callable[[list[Scene], Random], Any], size: int, count: int, first: int = 0) -> None:
        self.make, self.size, self.count, self.first = make, size, count, first

    def __len__(self) -> int:
        return self.count - self.first

    def __getitem__(self, index: int) -> Any:
        number = self.first + index
        scenes = [sample_scene("train", number * self.size + place) for place in range(self.size)]
        return self.make(scenes, Random(f"adafv batch train {number}"))


def batches(
    make: Callable[[list[Scene], Random], Any], *, size: int, count: int, first: int = 0, workers: int = 1
) -> Iterator[Any]:
    """Batches number `first` to `count` - 1, in their order, drawn by `workers` processes beside the training."""
    loader = DataLoader(
        Batches(make, size, count, first),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers == 1 else 2,
        worker_init_fn=_one_thread,
    )
    return iter(loader)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def pixels(scenes: Sequence[Scene], random: Random, side: int = SIDE) -> tuple[Tensor, list[list[Box]]]:
    """[scenes, 3, side, side] uint8, and every scene's boxes in pixels.

    One picture in five is drawn larger and scaled down, as the processor does with a user's picture.
    """
    made, boxes = [], []
    for scene in scenes:
        factor = random.choice((1, 1, 1, 1, 2))
        picture, found = render(scene, side * factor)
        if factor > 1:
            picture = picture.reduce(factor)
            found = [tuple(edge // factor for edge in box) for box in found]  # type: ignore[misc]
        made.append(torch.from_numpy(numpy.array(picture)))
        boxes.append(found)
    return torch.stack(made).permute(0, 3, 1, 2).contiguous(), boxes


def normalised(images: Tensor) -> Tensor:
    """uint8 pictures as the processor would hand them to the tower."""
    mean, deviation = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it, and in the dataclasses in it, on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{field.name: moved(getattr(batch, field.name), device) for field in fields(batch)})
    return batch


def patches_in(box: Box, side: int = SIDE) -> Tensor:
    """[patches] bool: which patches have their middle in the box; at least the one at its own middle."""
    left, top, right, bottom = (edge / side * GRID for edge in box)
    inside = torch.zeros(GRID, GRID, dtype=torch.bool)
    inside[math.ceil(top - 0.5) : math.ceil(bottom - 0.5), math.ceil(left - 0.5) : math.ceil(right - 0.5)] = True
    inside[min(GRID - 1, int((top + bottom) / 2)), min(GRID - 1, int((left + right) / 2))] = True
    return inside.flatten()
