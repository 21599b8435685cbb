"""LLaVA-1.5 (`LlavaForConditionalGeneration`): one crop per image, every patch a token."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.patches import by_image
from adafv.engines.transformers.families.base import Encoded, Family, Signals, is_a
from adafv.engines.transformers.towers import TappedTower, check_tower, patch_grid, scale_down, uncompiled, with_tower
from adafv.prompts.prompt import Run

PROJECTED = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
    "VideoLlavaForConditionalGeneration",
    "VipLlavaForConditionalGeneration",
)
"""Models whose `multi_modal_projector` maps what the tower says token by token."""


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

    def owns(self, model: Any) -> bool:
        return super().owns(model) and not has_pixtral_tower(model)  # else see llava_pixtral.py

    def check(self, model: Any) -> None:
        self.reads(model, {})

    def reads(self, model: Any, visuals: Mapping[str, Any]) -> tuple[int | list[int], dict[str, Any]]:
        """(hidden states of the tower that the projector reads, the options of `get_image_features` that say so).

        Raises:
            UnsupportedModelError: the saliency cannot be read there, or tokens are not patches.
        """
        layer, strategy = feature_options(model, visuals)
        return layer, {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}

    def feature_layers(self, model: Any) -> int | list[int]:
        return self.reads(model, {})[0]

    def projects(self, model: Any) -> bool:
        # By name: a family derived from this one may have another projector, and would be wrong without a word.
        return any(base.__name__ in PROJECTED for base in type(model).__mro__)

    def project(self, model: Any, rows: Tensor) -> Tensor:
        return model.model.multi_modal_projector(rows)  # type: ignore[no-any-return]

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        return {**visuals, "pixel_values": visuals["pixel_values"][wanted]}

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        rows, columns = patch_grid(getattr(model.model, self.tower_name), *visuals["pixel_values"].shape[-2:])
        layout = ImageLayout(torch.arange(rows * columns), crops=1, rows=rows, columns=columns)
        return [layout] * len(visuals["pixel_values"])

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        return self._encoded(model, visuals, visuals["pixel_values"], layouts, signals)

    def encode_smaller(
        self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout], grid: tuple[int, int]
    ) -> list[Tensor]:
        pixels = scale_down(visuals["pixel_values"], getattr(model.model, self.tower_name), grid)
        encoded = self._encoded(model, visuals, pixels, layouts, frozenset(), interpolate_pos_encoding=True)
        return encoded.features

    def _encoded(
        self,
        model: Any,
        visuals: Mapping[str, Any],
        pixel_values: Tensor,
        layouts: list[ImageLayout],
        signals: Signals,
        **options: Any,
    ) -> Encoded:
        layers, reading = self.reads(model, visuals)
        tower = TappedTower(getattr(model.model, self.tower_name), layers, signals)
        twin = with_tower(model.model, self.tower_name, tower)
        output = twin.get_image_features(pixel_values, return_dict=True, **reading, **options)
        return Encoded(list(output.pooler_output), tower.read(lambda patches: by_image(patches, layouts)))


def has_pixtral_tower(model: Any) -> bool:
    """Whether the tower is Pixtral's, whose images have any size."""
    tower: Any = getattr(model.model, "vision_tower", None)
    return is_a(uncompiled(tower), "PixtralVisionModel")


def feature_options(model: Any, visuals: Mapping[str, Any]) -> tuple[int | list[int], str]:
    """`vision_feature_layer` and `vision_feature_select_strategy`, of this call or of the model's config."""
    layer, strategy = visuals.get("vision_feature_layer"), visuals.get("vision_feature_select_strategy")
    layer = model.config.vision_feature_layer if layer is None else layer
    strategy = model.config.vision_feature_select_strategy if strategy is None else strategy
    check_tower(model.model.vision_tower, layer, strategy)
    return layer, strategy
