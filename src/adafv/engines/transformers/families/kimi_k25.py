"""Kimi K2.5 (`Kimi_K25ForConditionalGeneration`): images of any size, a packed tower, positions along the prompt.

The tower leaves the patches of an image in rows from left to right and joins them (2 x 2) behind its last layer, as
PaddleOCR-VL does, so the saliency of a token is the mean over the patches that are joined there. Videos are refused: the
stock model makes one token of a place in several frames and then splits its tokens as if each frame had its own, which
fails.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.patches import blocks, of_images
from adafv.engines.transformers.families.base import Encoded, Family, Signals
from adafv.engines.transformers.families.paddleocr_vl import raster_view
from adafv.engines.transformers.towers import TowerShape, with_tap
from adafv.prompts.prompt import Run


class KimiK25(Family):
    name = "Kimi K2.5"
    model_classes = ("Kimi_K25ForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    saliency = "received"
    tower_shape = TowerShape("layers", "attn", has_class_token=False)
    limits = "refuses videos"

    def check(self, model: Any) -> None:
        pass

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        height, width = model.config.vision_config.merge_kernel_size
        grids = [(rows // height, columns // width) for _, rows, columns in visuals["image_grid_thw"].tolist()]
        return [ImageLayout(torch.arange(rows * columns), 1, rows, columns) for rows, columns in grids]

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        pixels = of_images(visuals["pixel_values"], visuals["image_grid_thw"].prod(-1).tolist(), wanted)
        return {"pixel_values": pixels, "image_grid_thw": visuals["image_grid_thw"][wanted]}

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        twin, tap = with_tap(model.model, self.tower_name, self.tower_shape, signals)
        output = twin.get_image_features(visuals["pixel_values"], visuals["image_grid_thw"], return_dict=True)
        height, width = model.config.vision_config.merge_kernel_size
        return Encoded(list(output.pooler_output), tap.read(lambda patches: blocks(patches, layouts, (height, width))))

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        return raster_view(visuals)
