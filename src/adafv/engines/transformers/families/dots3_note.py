"""dots 3 note (`Dots3NoteForConditionalGeneration`): Qwen2-VL's inputs, positions along the prompt, sparse attention.

The tower packs images as Qwen2-VL's does: a row of patches, four neighbours to a token, attention inside a frame only.
Layers of the language model attend to the keys that an indexer scores highest, where a masked key counts as one that is
not there, or in windows counted in tokens of the shortened prompt. Sound goes its own way, past the pruning.
"""

from typing import Any

from torch import Tensor

from adafv.engines.transformers.families.qwen2_vl import Qwen2VL


class Dots3Note(Qwen2VL):
    name = "dots 3 note"
    model_classes = ("Dots3NoteForConditionalGeneration",)
    videos = ("pixel_values_videos", "video_grid_thw")
    rotary_axes = 0
    tower_name = "vision_tower"

    def stock_features(self, twin: Any, modality: str, pixels: Tensor, sizes: Tensor) -> Any:
        return twin.get_image_features(
            pixels, sizes, return_dict=True
        )  # that of videos passes return_dict on by itself
