"""Command A Vision (`Cohere2VisionForConditionalGeneration`): tiles as Aya Vision has them, without names.

In the prompt every tile is a run of its own with one token behind it, and a token stands in front of an image and another
behind it. So within an image one token stands between two runs, and between images at least three. The projector reads
what the tower returns, after its last layer.
"""

from collections.abc import Mapping
from typing import Any

from adafv.families.aya_vision import AyaVision
from adafv.families.base import Run
from adafv.families.towers import check_tower


class Cohere2Vision(AyaVision):
    name = "Command A Vision"
    model_classes = ("Cohere2VisionForConditionalGeneration",)
    images = ("pixel_values",)
    limits = ""

    def check(self, model: Any) -> None:
        check_tower(model.model.vision_tower, -1, "full")

    def options(self, model: Any, visuals: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def runs_of_images(self, runs: list[Run]) -> list[list[Run]]:
        images: list[list[Run]] = []
        for number, run in enumerate(runs):
            before = runs[number - 1] if number else None
            if before is None or before.row != run.row or len(run.between) > 1:
                images.append([])
            images[-1].append(run)
        return images

    def markers(self, runs: list[Run]) -> list[tuple[int, int, int]]:
        spans = []
        for image in self.runs_of_images(runs):
            spans.append((image[0].row, max(image[0].start - 1, 0), image[-1].start + image[-1].length + 2))
        return spans
