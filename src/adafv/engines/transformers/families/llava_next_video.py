"""LLaVA-NeXT-Video (`LlavaNextVideoForConditionalGeneration`): LLaVA-NeXT's images, and videos.

A video goes through the same tower, frame by frame; a resampler then joins stride x stride patches to one token by their
average, their maximum or a convolution, and drops what is left over at the right and the bottom. The saliency of a
token is the mean over its patches whatever the resampler does: a maximum would favour one loud patch, a convolution has
no meaning for it. A video has neither [CLS] nor newline tokens, so every token of it shows a part of a frame.
"""

from collections.abc import Mapping
from typing import Any

import torch

from adafv.core import ImageLayout
from adafv.core.patches import by_image, pooled
from adafv.engines.transformers.families.base import Encoded, Signals
from adafv.engines.transformers.families.llava import feature_options
from adafv.engines.transformers.families.llava_next import LlavaNext
from adafv.engines.transformers.towers import TappedTower, patch_grid, with_tower
from adafv.errors import UnsupportedCallError
from adafv.prompts.prompt import Run


class LlavaNextVideo(LlavaNext):
    name = "LLaVA-NeXT-Video"
    model_classes = ("LlavaNextVideoForConditionalGeneration",)
    videos = ("pixel_values_videos", "vision_feature_layer", "vision_feature_select_strategy")
    limits = "refuses frames that are not square, whose rows the stock model mixes up"

    def projects(self, model: Any) -> bool:
        # The resampler is in front of the projector, and READ the mean of the patches of a token.
        return super().projects(model) and bool(model.config.spatial_pool_mode == "average")

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        if modality == "image":
            return super().take(model, modality, visuals, layouts, wanted)
        return {**visuals, "pixel_values_videos": visuals["pixel_values_videos"][wanted]}

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        if modality == "image":
            return super().layouts(model, modality, visuals, runs)
        videos, frames, _, height, width = visuals["pixel_values_videos"].shape
        rows, columns = patch_grid(model.model.vision_tower, height, width)
        if rows != columns:
            raise UnsupportedCallError(
                f"the frames are {height} x {width} pixels, but {type(model).__name__} pools square frames only; scale "
                "or crop them as the processor of this checkpoint does"
            )
        side = rows // model.config.spatial_pool_stride
        return [ImageLayout(torch.arange(frames * side * side), frames, side, side)] * videos

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        if modality == "image":
            return super().encode(model, modality, visuals, layouts, signals)
        layer, strategy = feature_options(model, visuals)
        tower = TappedTower(model.model.vision_tower, layer, signals)
        twin = with_tower(model.model, "vision_tower", tower)
        output = twin.get_video_features(
            visuals["pixel_values_videos"],
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            return_dict=True,
        )
        # [frames * tokens, D] per video; older releases keep its frames apart.
        features = [video.flatten(0, -2) for video in output.pooler_output]
        grid = patch_grid(model.model.vision_tower, *visuals["pixel_values_videos"].shape[-2:])
        stride = model.config.spatial_pool_stride
        return Encoded(features, tower.read(lambda patches: by_image(pooled(patches, grid, stride), layouts)))
