"""Muse Glimmer (`MuseGlimmerForConditionalGeneration`): inputs like Qwen2.5-VL's, positions along the prompt.

The tower attends in windows, most of the time, and sorts the patches by window for that; the saliency is read off its
last layer that looks at the whole frame, sorted back, and goes through the tower's own pixel shuffle (2 x 2 patches to a
token). Outside the tower patches are in raster order, not in that of the tokens as in Qwen. Times and separators stand
between the frames of a video. Layers with a sliding window count its width in tokens of the shortened prompt.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.engines.transformers.families.qwen2_5_vl import window_order
from adafv.engines.transformers.families.qwen2_vl import Qwen2VL
from adafv.errors import UnsupportedModelError


class MuseGlimmer(Qwen2VL):
    name = "Muse Glimmer"
    model_classes = ("MuseGlimmerForConditionalGeneration",)
    videos = ("pixel_values_videos", "video_grid_thw")
    rotary_axes = 0
    tower_name = "vision_tower"

    def check(self, model: Any) -> None:
        if "full_attention" not in model.config.vision_config.layer_types:
            raise UnsupportedModelError(
                "no layer of this vision tower looks at a whole frame (layer_types has no full_attention), so nothing says "
                "which patches the frame attends to"
            )

    def merge(self, model: Any) -> int:
        return int(model.config.vision_config.merge_size)

    def attention(self, tower: Any) -> str:
        kinds = tower.config.layer_types
        return f"layers.{max(layer for layer, kind in enumerate(kinds) if kind == 'full_attention')}.attn"

    def by_token(self, model: Any, sizes: Tensor, scores: list[Tensor], layouts: list[ImageLayout]) -> list[Tensor]:
        tower = model.model.vision_tower
        by_window = torch.cat([score.flatten() for score in scores])
        in_raster = by_window.index_select(0, window_order(tower, sizes).to(by_window.device).argsort())
        by_token = tower.pixel_shuffle(in_raster.unsqueeze(-1), sizes).mean(-1)
        return list(by_token.split([layout.tokens for layout in layouts]))

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        config = model.config.vision_config
        side, [_, rows, columns] = config.patch_size, self.grids("image", visuals)[0]
        patches = visuals["pixel_values"][: rows * columns].view(rows, columns, config.patch_temporal, -1, side, side)
        still = patches[:, :, 0]  # an image is repeated in time
        return still.permute(2, 0, 3, 1, 4).reshape(1, -1, rows * side, columns * side)
