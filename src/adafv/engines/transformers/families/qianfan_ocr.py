"""Qianfan-OCR (`QianfanOCRForConditionalGeneration`): InternVL with a tower of its own, and without videos.

The prompt is InternVL's: the tokens of an image are one run of placeholders between two markers, its thumbnail last. The
tower differs in where it keeps its layers, and what it returns for its last layer has passed the norm behind it too.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from adafv.engines.transformers.families.internvl import InternVL


class QianfanOCR(InternVL):
    name = "Qianfan-OCR"
    model_classes: ClassVar[tuple[str, ...]] = ("QianfanOCRForConditionalGeneration",)
    limits = ""

    def options(self, model: Any, visuals: Mapping[str, Any]) -> dict[str, Any]:
        options = super().options(model, visuals)
        if options["vision_feature_layer"] == len(model.model.vision_tower.layers):
            options[
                "vision_feature_layer"
            ] = -1  # the same to the stock model; of -1 the tapped tower knows about the norm
        return options
