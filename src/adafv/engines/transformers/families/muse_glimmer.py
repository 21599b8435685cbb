"""Muse Glimmer (`MuseGlimmerForConditionalGeneration`): inputs like Qwen2.5-VL's, positions along the prompt.

The tower attends in windows, most of the time, and sorts the patches by window for that; the saliency is read off its
last layer that looks at the whole frame, sorted back, and goes through the tower's own pixel shuffle (2 x 2 patches to a
token). Outside the tower patches are in raster order, not in that of the tokens as in Qwen. Times and separators stand
between the frames of a video. Layers with a sliding window count its width in tokens of the shortened prompt.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.patches import numbered
from adafv.engines.transformers.families.qwen2_5_vl import window_order
from adafv.engines.transformers.families.qwen2_vl import Qwen2VL
from adafv.engines.transformers.towers import TowerShape
from adafv.errors import UnsupportedModelError


class MuseGlimmer(Qwen2VL):
    name = "Muse Glimmer"
    model_classes = ("MuseGlimmerForConditionalGeneration",)
    videos = ("pixel_values_videos", "video_grid_thw")
    rotary_axes = 0
    tower_name = "vision_tower"
    tower_shape = TowerShape(
        "layers",
        "attn",
        has_class_token=False,
        whole=lambda tower: [i for i, kind in enumerate(tower.config.layer_types) if kind == "full_attention"],
    )

    def check(self, model: Any) -> None:
        if "full_attention" not in model.config.vision_config.layer_types:
            raise UnsupportedModelError(
                "no layer of this vision tower looks at a whole frame (layer_types has no full_attention), so nothing says "
                "which patches the frame attends to"
            )

    def merge(self, model: Any) -> int:
        return int(model.config.vision_config.merge_size)

    def by_token(self, model: Any, sizes: Tensor, patches: Tensor, layouts: list[ImageLayout]) -> Tensor:
        # Of every patch of the raster, its place in the tower's order: so what the shuffle picks is found there.
        in_tower = window_order(model.model.vision_tower, sizes).argsort()
        return numbered(patches, model.model.vision_tower.pixel_shuffle(in_tower.unsqueeze(-1), sizes))

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        config = model.config.vision_config
        side, [_, rows, columns] = config.patch_size, self.grids("image", visuals)[0]
        patches = visuals["pixel_values"][: rows * columns].view(rows, columns, config.patch_temporal, -1, side, side)
        still = patches[:, :, 0]  # an image is repeated in time
        return still.permute(2, 0, 3, 1, 4).reshape(1, -1, rows * side, columns * side)
