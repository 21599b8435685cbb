"""ViP-LLaVA (`VipLlavaForConditionalGeneration`): LLaVA-1.5 whose projector reads several layers of the tower at once.

The saliency is that of the deepest of them, -2 in the released models. [CLS] is always cut off; there is no setting for
it. Older releases of transformers call the setting of the layers `vision_feature_layers`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from adafv.engines.transformers.families.llava import Llava
from adafv.engines.transformers.releases import layers_setting
from adafv.engines.transformers.towers import check_tower


class VipLlava(Llava):
    name = "ViP-LLaVA"
    model_classes = ("VipLlavaForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values", "vision_feature_layer")
    as_tensor = ("image",)

    def named(self, name: str) -> str:
        return "vision_feature_layer" if name == "vision_feature_layers" else name

    def reads(self, model: Any, visuals: Mapping[str, Any]) -> tuple[int | list[int], dict[str, Any]]:
        layers = visuals.get("vision_feature_layer")
        setting = layers_setting(model.config)
        layers = getattr(model.config, setting) if layers is None else layers
        layers = layers if isinstance(layers, int) else list(layers)
        check_tower(model.model.vision_tower, layers, "default")
        return layers, {setting: layers}
