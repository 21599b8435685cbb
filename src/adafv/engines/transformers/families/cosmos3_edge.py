"""Cosmos 3 Edge (`Cosmos3EdgeForConditionalGeneration`, the reasoner of the edge checkpoints): inputs like Qwen3-VL's.

The tower is a SigLIP2 over one row of patches, the four that make a token side by side; behind its last layer there is a
norm and the projector. No deepstack features. A video is a row of frames with their times between them.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adafv.core import ImageLayout
from adafv.engines.transformers.families.qwen2_vl import Qwen2VL
from adafv.engines.transformers.releases import check_counts_along_prompt
from adafv.engines.transformers.towers import TowerShape


class Cosmos3Edge(Qwen2VL):
    name = "Cosmos 3 Edge"
    model_classes = ("Cosmos3EdgeForConditionalGeneration",)
    videos = ("pixel_values_videos", "video_grid_thw")
    tower_shape = TowerShape("encoder.layers", "self_attn", has_class_token=False)

    def check(self, model: Any) -> None:
        check_counts_along_prompt(self.name)

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        merge, side, layout = self.merge(model), model.config.vision_config.patch_size, layouts[0]
        patches = visuals["pixel_values"][: layout.tokens * merge**2]
        patches = patches.view(layout.rows, layout.columns, merge, merge, side, side, -1)  # colours last, unlike Qwen
        height, width = layout.rows * merge * side, layout.columns * merge * side
        return patches.permute(6, 0, 2, 4, 1, 3, 5).reshape(1, -1, height, width)
