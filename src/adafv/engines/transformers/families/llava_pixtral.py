"""LLaVA with a Pixtral tower (`LlavaForConditionalGeneration`, Pixtral 12B): Mistral 3 without the patch merger.

The class is that of LLaVA-1.5, but the images have any size, and their placeholders are rows with a token at the end of
each. So the family is told by the tower, and everything but the projector is as in Mistral 3: every patch is a token.
"""

from collections.abc import Mapping
from typing import Any

from adafv.engines.transformers.families.llava import has_pixtral_tower
from adafv.engines.transformers.families.mistral3 import Mistral3
from adafv.errors import UnsupportedModelError


class LlavaPixtral(Mistral3):
    name = "LLaVA with Pixtral"
    model_classes = ("LlavaForConditionalGeneration",)
    images = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")

    def owns(self, model: Any) -> bool:
        return super().owns(model) and has_pixtral_tower(model)

    def feature_options(self, model: Any, visuals: Mapping[str, Any]) -> dict[str, Any]:
        strategy = visuals.get("vision_feature_select_strategy")
        strategy = model.config.vision_feature_select_strategy if strategy is None else strategy
        if strategy != "full":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r} cuts off a patch of a tower that has no [CLS]; only 'full' is "
                "supported with PixtralVisionModel"
            )
        return {**super().feature_options(model, visuals), "vision_feature_select_strategy": strategy}

    def merge(self, model: Any) -> int:
        return 1
