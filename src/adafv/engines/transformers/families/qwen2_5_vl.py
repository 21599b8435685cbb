"""Qwen2.5-VL (`Qwen2_5_VLForConditionalGeneration`): Qwen2-VL with a tower that attends in windows, most of the time.

The tower sorts the patches by window; the saliency is read off its last block that looks at the whole frame, and sorted
back as the stock model does with the features.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.engines.transformers.families.qwen2_vl import Qwen2VL
from adafv.errors import UnsupportedModelError


class Qwen25VL(Qwen2VL):
    name = "Qwen2.5-VL"
    model_classes = ("Qwen2_5_VLForConditionalGeneration",)
    tower_shape = replace(Qwen2VL.tower_shape, whole=lambda tower: sorted(tower.fullatt_block_indexes))

    def check(self, model: Any) -> None:
        if not model.model.visual.fullatt_block_indexes:
            raise UnsupportedModelError(
                "no block of this vision tower looks at a whole frame (fullatt_block_indexes is empty), so nothing says "
                "which patches the frame attends to"
            )

    def by_token(self, model: Any, sizes: Tensor, patches: Tensor, layouts: list[ImageLayout]) -> Tensor:
        by_window = super().by_token(model, sizes, patches, layouts)
        order = window_order(model.model.visual, torch.as_tensor(sizes)).to(by_window.device)
        return by_window.index_select(0, order.argsort())


def window_order(tower: Any, sizes: Tensor) -> Tensor:
    """[tokens] long, the token of the raster at each place of the tower's own order."""
    side = tower.window_size // tower.spatial_merge_size // tower.patch_size  # of a window, in tokens
    order, first = [], 0
    for frames, height, width in sizes.tolist():
        rows, columns = height // tower.spatial_merge_size, width // tower.spatial_merge_size
        numbers = first + torch.arange(frames * rows * columns).view(frames, rows, columns)
        for frame in numbers:
            for band in frame.split(side, dim=0):
                order += [window.flatten() for window in band.split(side, dim=1)]
        first += frames * rows * columns
    return torch.cat(order)
