"""LLaVA-1.5 (`LlavaForConditionalGeneration`): one crop per image, every patch a token."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from adafv.core import ImageLayout
from adafv.families.base import Encoded, Family, Run
from adafv.families.towers import TappedTower, check_tower, patch_grid, scale_down, twin_of


class Llava(Family):
    name = "LLaVA-1.5"
    model_classes = ("LlavaForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_sizes",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )
    downsamples = True

    def check(self, model: Any) -> None:
        check_tower(
            model.model.vision_tower, model.config.vision_feature_layer, model.config.vision_feature_select_strategy
        )

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        return {**visuals, "pixel_values": visuals["pixel_values"][wanted]}

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        rows, columns = patch_grid(model.model.vision_tower, *visuals["pixel_values"].shape[-2:])
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
        layer, strategy = feature_options(model, visuals)
        tower = TappedTower(model.model.vision_tower, layer, saliency)
        # The stock method of the stock class, on a twin whose only difference is the tower.
        twin = twin_of(model.model)
        twin.__dict__["vision_tower"] = tower
        pixel_values, options = visuals["pixel_values"], {}
        if grid is not None:
            pixel_values = scale_down(pixel_values, model.model.vision_tower, grid)
            options["interpolate_pos_encoding"] = True
        output = twin.get_image_features(
            pixel_values,
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            return_dict=True,
            **options,
        )
        return Encoded(list(output.pooler_output), list(tower.saliency) if saliency else None)


def feature_options(model: Any, visuals: Mapping[str, Any]) -> tuple[int | list[int], str]:
    """`vision_feature_layer` and `vision_feature_select_strategy`, of this call or of the model's config."""
    layer, strategy = visuals.get("vision_feature_layer"), visuals.get("vision_feature_select_strategy")
    layer = model.config.vision_feature_layer if layer is None else layer
    strategy = model.config.vision_feature_select_strategy if strategy is None else strategy
    check_tower(model.model.vision_tower, layer, strategy)
    return layer, strategy
