"""DeepSeek-VL (`DeepseekVLForConditionalGeneration`): a SigLIP tower, one square crop per image, every patch a token.

The aligner reads the output of the whole tower, so the last layer is the one that is heard. The processor pads images to
a square; padding is patches like any other, for the model and for the selection.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from adafv.core import ImageLayout
from adafv.families.base import Encoded, Run
from adafv.families.llava import Llava
from adafv.families.towers import TappedTower, check_tower, patch_grid, scale_down, twin_of


class DeepseekVL(Llava):
    name = "DeepSeek-VL"
    model_classes = ("DeepseekVLForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values",)
    saliency = "received"
    as_tensor = ("image",)

    def check(self, model: Any) -> None:
        check_tower(model.model.vision_model, -1, "full")

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        rows, columns = patch_grid(model.model.vision_model, *visuals["pixel_values"].shape[-2:])
        layout = ImageLayout(torch.arange(rows * columns), crops=1, rows=rows, columns=columns)
        return [layout] * len(visuals["pixel_values"])

    def encode(
        self,
        model: Any,
        modality: str,
        visuals: Mapping[str, Any],
        layouts: list[ImageLayout],
        *,
        saliency: bool,
        grid: tuple[int, int] | None = None,
    ) -> Encoded:
        tower = TappedTower(model.model.vision_model, -1, saliency)
        twin = twin_of(model.model)
        twin.__dict__["vision_model"] = tower
        pixel_values, options = visuals["pixel_values"], {}
        if grid is not None:
            pixel_values = scale_down(pixel_values, model.model.vision_model, grid)
            options["interpolate_pos_encoding"] = True
        output = twin.get_image_features(pixel_values, return_dict=True, **options)
        return Encoded(list(output.pooler_output), list(tower.saliency) if saliency else None)
