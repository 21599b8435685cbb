"""PaddleOCR-VL (`PaddleOCRVLForConditionalGeneration`): images of any size, a SigLIP tower, positions in three axes.

Inputs and positions are those of Qwen2-VL's images, but the tower leaves the patches of an image in rows from left to
right; the projector behind it picks the 2 x 2 that make a token. So the saliency of a token is the mean over the four
that the projector picks, not over four neighbours in the tower's output. The stock class has no videos.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.patches import blocks
from adafv.engines.transformers.families.qwen2_vl import Qwen2VL
from adafv.engines.transformers.towers import TowerShape


class PaddleOcrVL(Qwen2VL):
    name = "PaddleOCR-VL"
    model_classes = ("PaddleOCRVLForConditionalGeneration",)
    videos = ()
    tower_shape = TowerShape("vision_model.encoder.layers", "self_attn", has_class_token=False)

    def by_token(self, model: Any, sizes: Tensor, patches: Tensor, layouts: list[ImageLayout]) -> Tensor:
        return torch.cat(blocks(patches, layouts, (self.merge(model), self.merge(model))))

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        return raster_view(visuals)


def raster_view(visuals: Mapping[str, Any]) -> Tensor:
    """The first image, [1, 3, H, W], of patches in rows from left to right ([patches, 3, height, width])."""
    _, rows, columns = visuals["image_grid_thw"][0].tolist()
    patches = visuals["pixel_values"][: rows * columns].unflatten(0, (rows, columns))
    return patches.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3).unsqueeze(0)  # type: ignore[no-any-return]
