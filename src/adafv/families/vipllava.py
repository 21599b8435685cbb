"""ViP-LLaVA (`VipLlavaForConditionalGeneration`): LLaVA-1.5 whose projector reads several layers of the tower at once.

The saliency is that of the deepest of them, -2 in the released models. [CLS] is always cut off; there is no setting for
it. Older releases of transformers call the setting of the layers `vision_feature_layers`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from adafv.core import ImageLayout
from adafv.families.base import Encoded
from adafv.families.llava import Llava
from adafv.families.towers import TappedTower, check_tower, scale_down, twin_of


class VipLlava(Llava):
    name = "ViP-LLaVA"
    model_classes = ("VipLlavaForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values", "vision_feature_layer")
    other_names: ClassVar[Mapping[str, str]] = {"vision_feature_layers": "vision_feature_layer"}
    as_tensor = ("image",)

    def check(self, model: Any) -> None:
        _layers(model, {})

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
        layers = _layers(model, visuals)
        tower = TappedTower(model.model.vision_tower, layers, saliency)
        twin = twin_of(model.model)
        twin.__dict__["vision_tower"] = tower
        pixel_values, options = visuals["pixel_values"], {_setting(model): layers}
        if grid is not None:
            pixel_values = scale_down(pixel_values, model.model.vision_tower, grid)
            options["interpolate_pos_encoding"] = True
        output = twin.get_image_features(pixel_values, return_dict=True, **options)
        return Encoded(list(output.pooler_output), list(tower.saliency) if saliency else None)


def _layers(model: Any, visuals: Mapping[str, Any]) -> int | list[int]:
    """The layers that the projector reads, of this call or of the model's config."""
    layers = visuals.get("vision_feature_layer")
    layers = getattr(model.config, _setting(model)) if layers is None else layers
    layers = layers if isinstance(layers, int) else list(layers)
    check_tower(model.model.vision_tower, layers, "default")
    return layers


def _setting(model: Any) -> str:
    """What this release of transformers calls the setting."""
    return "vision_feature_layer" if hasattr(model.config, "vision_feature_layer") else "vision_feature_layers"
