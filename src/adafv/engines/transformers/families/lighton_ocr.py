"""LightOnOCR (`LightOnOcrForConditionalGeneration`): Mistral 3's tower and patch merger, without a token at the row ends.

The placeholders of an image are one run, and the projector always reads the tower's last layer. It reads whole pages,
where much of the image is text: expect to need a larger share of the tokens than for photos.
"""

from collections.abc import Mapping
from typing import Any

from adafv.engines.transformers.families.mistral3 import Mistral3
from adafv.prompts.prompt import Run


class LightOnOcr(Mistral3):
    name = "LightOnOCR"
    model_classes = ("LightOnOcrForConditionalGeneration",)
    images = ("pixel_values", "image_sizes")
    tower_name = "vision_encoder"

    def feature_options(self, model: Any, visuals: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def markers(self, runs: list[Run]) -> list[tuple[int, int, int]]:
        return []
