"""Video-LLaVA (`VideoLlavaForConditionalGeneration`): one tower for images, another of the same kind for videos.

An image is one crop, as in LLaVA-1.5. A video is not: the stock model cuts [CLS] off the patches of an image, but never
off those of a frame, so each frame begins with a visual token that shows no patch. Such a token is kept only when all
else is: the saliency is the attention of this very token, which says nothing of the token itself, and the language
model is used to images without it. In a budget per frame it counts as a token of the frame that it begins.
The processor calls the pixels of images `pixel_values_images`; newer releases of transformers know `pixel_values` too.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from adafv.core import ImageLayout
from adafv.core.patches import by_image
from adafv.engines.transformers.families.base import Encoded, Signals
from adafv.engines.transformers.families.llava import Llava
from adafv.engines.transformers.towers import TappedTower, check_tower, patch_grid, scale_down, shape_of, with_tower
from adafv.prompts.prompt import Run


class VideoLlava(Llava):
    name = "Video-LLaVA"
    model_classes = ("VideoLlavaForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")
    videos = ("pixel_values_videos", "vision_feature_layer")
    as_tensor = ("image", "video")

    def check(self, model: Any) -> None:
        for tower in (model.model.image_tower, model.model.video_tower):
            check_tower(tower, model.config.vision_feature_layer, model.config.vision_feature_select_strategy)

    def towers(self, model: Any) -> list[Any]:
        return [model.model.image_tower, model.model.video_tower]

    def feature_layers(self, model: Any) -> int | list[int]:
        return model.config.vision_feature_layer  # type: ignore[no-any-return]

    def named(self, name: str) -> str:
        return "pixel_values" if name == "pixel_values_images" else name

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        pixels: Tensor = visuals["pixel_values"]
        return pixels[:1]

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        pixels = self.inputs(modality)[0]
        return {**visuals, pixels: visuals[pixels][wanted]}

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        pixels = visuals[self.inputs(modality)[0]]
        tower = model.model.image_tower if modality == "image" else model.model.video_tower
        rows, columns = patch_grid(tower, *pixels.shape[-2:])
        if modality == "image":
            return [ImageLayout(torch.arange(rows * columns), 1, rows, columns)] * len(pixels)
        frames = pixels.shape[1]
        source = pad(torch.arange(frames * rows * columns).view(frames, -1), (_leading(tower), 0), value=-1)
        return [ImageLayout(source.flatten(), frames, rows, columns)] * len(pixels)

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        return self._run(model, modality, visuals, visuals[self.inputs(modality)[0]], layouts, signals)

    def encode_smaller(
        self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout], grid: tuple[int, int]
    ) -> list[Tensor]:
        pixels = scale_down(visuals["pixel_values"], model.model.image_tower, grid)
        options = {"interpolate_pos_encoding": True}
        return self._run(model, "image", visuals, pixels, layouts, frozenset(), **options).features

    def _run(
        self,
        model: Any,
        modality: str,
        visuals: Mapping[str, Any],
        pixels: Tensor,
        layouts: list[ImageLayout],
        signals: Signals,
        **options: Any,
    ) -> Encoded:
        name = f"{modality}_tower"
        stock = getattr(model.model, name)
        layer, strategy = (
            getattr(model.config, option) if visuals.get(option) is None else visuals[option]
            for option in ("vision_feature_layer", "vision_feature_select_strategy")
        )
        check_tower(stock, layer, strategy)
        tower = TappedTower(stock, layer, signals)
        twin = with_tower(model.model, name, tower)
        options |= {"vision_feature_layer": layer, "return_dict": True}
        if modality == "image":
            options["vision_feature_select_strategy"] = strategy
        output = getattr(twin, f"get_{modality}_features")(pixels, **options)
        # [images, tokens, D], or [frames of all videos, tokens of one, D]
        features = output.pooler_output.unflatten(0, (len(layouts), -1)).flatten(1, 2)

        def framed(patches: Tensor) -> list[Tensor]:
            if modality == "image":
                return by_image(patches, layouts)
            frames = patches.unflatten(0, (sum(layout.crops for layout in layouts), -1))
            return by_image(pad(frames, (0, 0, _leading(stock), 0)).flatten(0, 1), layouts)

        return Encoded(list(features), tower.read(framed))


def _leading(tower: Any) -> int:
    """Tokens in front of the patches of a frame: [CLS], if the tower has one."""
    return int(shape_of(tower).has_class_token)
