"""LLaVA-OneVision (`LlavaOnevisionForConditionalGeneration`): anyres images, and videos of up to dozens of frames.

A large image's raster of crops is scaled down, features and all, until it has at most as many tokens as nine crops. So a
token is no longer one patch; its place is that of the nearest patch, found by sending coordinates through the model's
own `pack_image_features`. The saliency is sent through it too. In a video each frame is pooled, 2 x 2 patches to a token.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from adafv.core import ImageLayout, anyres_layout, anyres_places
from adafv.core.patches import by_crops, of_images
from adafv.engines.transformers.families.base import Encoded, Signals, paired
from adafv.engines.transformers.families.llava import Llava, feature_options
from adafv.engines.transformers.families.llava_next import LlavaNext, newline_of
from adafv.engines.transformers.towers import TappedTower, patch_grid, with_tower
from adafv.errors import UnsupportedCallError
from adafv.prompts.prompt import Run


class LlavaOnevision(Llava):
    name = "LLaVA-OneVision"
    model_classes = ("LlavaOnevisionForConditionalGeneration",)
    images = (
        "pixel_values",
        "image_sizes",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "vision_aspect_ratio",
        "batch_num_images",
    )
    videos = ("pixel_values_videos", "image_sizes_videos", "vision_feature_layer", "vision_feature_select_strategy")
    saliency = "received"
    downsamples = False
    chooses_crops = True
    encode_crops = LlavaNext.encode_crops
    as_tensor = ("video",)

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        pixels, sizes, *_ = self.inputs(modality)
        taken = dict(visuals)
        if visuals.get(sizes) is not None:
            taken[sizes] = torch.as_tensor(visuals[sizes])[wanted]
        if modality == "image" and visuals["pixel_values"].dim() == 4:  # the crops of all images in one row
            taken["pixel_values"] = of_images(visuals["pixel_values"], [layout.crops for layout in layouts], wanted)
        else:
            taken[pixels] = visuals[pixels][wanted]
        if taken.pop("batch_num_images", None) is not None:
            whole = {_in_crops(visuals)[i] for i in wanted}
            if whole == {False} and len(wanted) > 1:
                taken["batch_num_images"] = torch.tensor([len(wanted)])
            elif whole != {True}:
                raise UnsupportedCallError(
                    "of several images in one prompt, some are cached already: pass the new ones alone, as the stock model "
                    "wants them"
                )
        return taken

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        if modality == "video":
            return self._video_layouts(model, visuals)
        sizes = list(map(tuple, torch.as_tensor(visuals["image_sizes"]).tolist()))
        shown = paired("image_sizes", sizes, "batch_num_images", _in_crops(visuals))
        known = {each: self._layout(model, visuals, list(each[0]), each[1]) for each in set(shown)}  # once per size
        return [known[each] for each in shown]

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        layer, strategy = feature_options(model, visuals)
        newline_of(model)
        tower = TappedTower(model.model.vision_tower, layer, signals)
        twin = with_tower(model.model, "vision_tower", tower)
        given = {**visuals, "vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
        given.pop("image_sizes_videos", None)
        features = getattr(twin, f"get_{modality}_features")(**given, return_dict=True).pooler_output

        def packed(patches: Tensor) -> list[Tensor]:
            crops = by_crops(patches, layouts)
            if modality == "video":
                return [pad(model.model.apply_pooling(frames).flatten(0, 1), (0, 0, 0, 1)) for frames in crops]
            sizes = torch.as_tensor(visuals["image_sizes"]).tolist()
            return [self._packed(model, visuals, part, size) for part, size in zip(crops, sizes, strict=True)]

        return Encoded(list(features), tower.read(packed))

    def _layout(self, model: Any, visuals: Mapping[str, Any], size: list[int], in_crops: bool) -> ImageLayout:
        stock = sys.modules[type(model.model).__module__]
        side, pinpoints = model.config.vision_config.image_size, model.config.image_grid_pinpoints
        rows, columns = patch_grid(model.model.vision_tower, *visuals["pixel_values"].shape[-2:])
        if not in_crops:
            return ImageLayout(torch.cat((torch.arange(rows * columns), torch.tensor([-1]))), 1, rows, columns)
        tiling = stock.get_anyres_image_grid_shape(tuple(size), pinpoints, side)
        packed = self._packed(model, visuals, anyres_places(tiling, rows, columns), size)
        return anyres_layout(packed, tiling, rows, columns)

    @staticmethod
    def _packed(model: Any, visuals: Mapping[str, Any], crops: Tensor, size: list[int]) -> Tensor:
        """Values per crop and patch ([C, rows * columns, E]) where the stock model puts the features: [N, E]."""
        ratio = visuals.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
        filler = torch.full(crops.shape[-1:], -1.0, dtype=crops.dtype, device=crops.device)
        packed, _ = model.model.pack_image_features(
            [crops], torch.tensor([size]), image_newline=filler, vision_aspect_ratio=ratio
        )
        return packed[0]  # type: ignore[no-any-return]

    def _video_layouts(self, model: Any, visuals: Mapping[str, Any]) -> list[ImageLayout]:
        videos, frames, _, height, width = visuals["pixel_values_videos"].shape
        rows, columns = ((count + 1) // 2 for count in patch_grid(model.model.vision_tower, height, width))
        source = torch.cat((torch.arange(frames * rows * columns), torch.tensor([-1])))
        return [ImageLayout(source, frames, rows, columns)] * videos


def _in_crops(visuals: Mapping[str, Any]) -> list[bool]:
    """Per image whether it is cut into crops; the stock model does so with the only image of a prompt."""
    counts = visuals.get("batch_num_images")
    if counts is None:
        return [True] * len(visuals["image_sizes"])
    return [count == 1 for count in torch.as_tensor(counts).tolist() for _ in range(count)]
