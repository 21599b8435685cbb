"""DeepSeek-VL (`DeepseekVLForConditionalGeneration`): a SigLIP tower, one square crop per image, every patch a token.

The aligner reads the output of the whole tower, so the last layer is the one that is heard. The processor pads images to
a square; padding is patches like any other, for the model and for the selection.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from adafv.engines.transformers.families.llava import Llava
from adafv.engines.transformers.towers import check_tower


class DeepseekVL(Llava):
    name = "DeepSeek-VL"
    model_classes = ("DeepseekVLForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values",)
    saliency = "received"
    as_tensor = ("image",)
    tower_name = "vision_model"

    def reads(self, model: Any, visuals: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        check_tower(model.model.vision_model, -1, "full")
        return -1, {}
