"""dots 3 note (`Dots3NoteForConditionalGeneration`): Qwen2-VL's inputs, positions along the prompt, sparse attention.

The tower packs images as Qwen2-VL's does: a row of patches, four neighbours to a token, attention inside a frame only.
Layers of the language model attend to the keys that an indexer scores highest, where a masked key counts as one that is
not there, or in windows counted in tokens of the shortened prompt. Sound goes its own way, past the pruning.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.families.base import Encoded
from adafv.families.qwen2_vl import Qwen2VL
from adafv.families.towers import Tap, patch_score, twin_of


class Dots3Note(Qwen2VL):
    name = "dots 3 note"
    model_classes = ("Dots3NoteForConditionalGeneration",)
    videos = ("pixel_values_videos", "video_grid_thw")
    rotary_axes = 0

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], saliency: bool
    ) -> Encoded:
        pixels, sizes = (visuals[name] for name in self.inputs(modality))
        tower = model.model.vision_tower
        tap = Tap(tower, f"blocks.{self.tapped_block(tower)}.attn", patch_score) if saliency else None
        twin = twin_of(model.model) if tap is None else twin_of(model.model, vision_tower=tap.tower)
        # The stock method of the stock class, on a twin whose only difference is the tower. That of videos passes
        # return_dict on by itself.
        output = twin.get_image_features(pixels, sizes, return_dict=True)
        if tap is None:
            return Encoded(list(output.pooler_output), None)
        by_patch = torch.cat([score.flatten() for score in tap.scores])
        by_token = by_patch.unflatten(0, (-1, model.config.vision_config.spatial_merge_size**2)).mean(-1)
        return Encoded(list(output.pooler_output), list(by_token.split([layout.tokens for layout in layouts])))

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        config, layout = model.config.vision_config, layouts[0]
        merge, side = config.spatial_merge_size, config.patch_size
        patches = visuals["pixel_values"][: layout.tokens * merge**2]
        patches = patches.view(layout.rows, layout.columns, merge, merge, -1, side, side)
        return patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(
            1, -1, layout.rows * merge * side, layout.columns * merge * side
        )
