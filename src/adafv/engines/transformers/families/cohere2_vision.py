"""Command A Vision (`Cohere2VisionForConditionalGeneration`): tiles as Aya Vision has them, without names.

In the prompt every tile is a run of its own with one token behind it, and a token stands in front of an image and another
behind it. So within an image one token stands between two runs, and between images at least three. The projector reads
what the tower returns, after its last layer.
"""

from collections.abc import Mapping
from typing import Any

from adafv.engines.transformers.families.aya_vision import AyaVision
from adafv.engines.transformers.families.internvl import images_by_gap
from adafv.engines.transformers.towers import check_tower
from adafv.prompts.prompt import Run


class Cohere2Vision(AyaVision):
    name = "Command A Vision"
    model_classes = ("Cohere2VisionForConditionalGeneration",)
    images = ("pixel_values",)
    limits = ""

    def options(self, model: Any, visuals: Mapping[str, Any]) -> dict[str, Any]:
        check_tower(model.model.vision_tower, -1, "full")
        return {}

    def runs_of_images(self, runs: list[Run]) -> list[list[Run]]:
        return images_by_gap(runs)

    def markers(self, runs: list[Run]) -> list[tuple[int, int, int]]:
        spans = []
        for image in self.runs_of_images(runs):
            spans.append((image[0].row, max(image[0].start - 1, 0), image[-1].start + image[-1].length + 2))
        return spans
