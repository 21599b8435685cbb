"""LLaVA-NeXT: a thumbnail and several crops per image ("anyres"), packed by vLLM's own method.

As in transformers, where each patch ends up is found by sending the places of patches through the packing, and the
signals are sent through it as well; see `adafv.engines.transformers.families.llava_onevision`, which shares this way of
seeing.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
    get_anyres_image_grid_shape,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from adafv.core import ImageLayout, anyres_layout, anyres_places
from adafv.core.crops import of_some_crops as layout_of_crops
from adafv.core.encoded import EncodedImage
from adafv.core.patches import by_crops, of_some_crops
from adafv.engines.vllm.families.llava import PrunedLlava, patch_grid
from adafv.engines.vllm.processor import PrunedInfo, PrunedProcessor
from adafv.engines.vllm.tap import encoded_images

Packing = Callable[[Any, Tensor, Tensor], Tensor]
"""From a model's config, values per crop and patch ([C, patches, E]) and an image's height and width ([2]) to where vLLM puts
the features: [N, E], -1 at newlines."""


class PrunedAnyres(PrunedLlava):
    """What the model classes that cut an image into crops share."""

    packing: Packing
    """Of the family."""

    def layouts(self, images: dict[str, Any]) -> list[ImageLayout]:
        return [anyres_layout_of(self.config, self.packing, size) for size in images["image_sizes"]]

    def encode(self, images: dict[str, Any]) -> list[EncodedImage]:
        sizes, layouts = images["image_sizes"], self.layouts(images)
        # An image comes with as many crops as the largest one of its request has; the rest are zeros.
        shown = [crops[: layout.crops] for crops, layout in zip(images["pixel_values"], layouts, strict=True)]

        def packed(patches: Tensor) -> list[Tensor]:
            crops = zip(by_crops(patches, layouts), sizes, strict=True)
            return [self.packing(self.config, part, size) for part, size in crops]

        return self.encoded({**images, "pixel_values": shown}, layouts, packed)

    def encode_crops(
        self, images: dict[str, Any], layouts: Sequence[ImageLayout], wanted: Sequence[tuple[int, int]]
    ) -> list[EncodedImage]:
        """As vLLM's own `_process_image_pixels`, whose packing cannot leave any out."""
        pixels = torch.stack([images["pixel_values"][number][crop] for number, crop in wanted])
        lying, crops = [layouts[number] for number, _ in wanted], [(crop,) for _, crop in wanted]

        def placed(patches: Tensor) -> list[Tensor]:
            return of_some_crops(patches, lying, crops)

        def run() -> list[Tensor]:
            read = self._image_pixels_to_features(self.vision_tower, pixels)  # type: ignore[attr-defined]
            return placed(self.multi_modal_projector(read).flatten(0, 1))

        features, signals = self.tapped(run, placed)
        left = [layout_of_crops(layout, own)[1] for layout, own in zip(lying, crops, strict=True)]
        return encoded_images(features, signals, left)


def anyres_layout_of(config: Any, packing: Packing, size: Tensor) -> ImageLayout:
    """Where the tokens of an image of this size ([2], height and width) come from."""
    rows, columns = patch_grid(config)
    tiling = get_anyres_image_grid_shape(
        tuple(size.tolist()), config.image_grid_pinpoints, config.vision_config.image_size
    )
    places = packing(config, anyres_places(tiling, rows, columns), size.cpu())
    return anyres_layout(places, tiling, rows, columns)


def packed(config: Any, crops: Tensor, size: Tensor) -> Tensor:
    """By LLaVA-NeXT's own method."""
    model: Any = SimpleNamespace(config=config, image_newline=crops.new_full(crops.shape[-1:], -1.0))
    return LlavaNextForConditionalGeneration._merge_image_patch_embeddings(model, size, crops, strategy="spatial_unpad")


class _Info(PrunedInfo, LlavaNextProcessingInfo):
    def layout(self, image: Mapping[str, Any]) -> ImageLayout:
        return anyres_layout_of(self.get_hf_config(), packed, image["image_sizes"])


class _Processor(PrunedProcessor, LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=LlavaDummyInputsBuilder)
class AdaFVLlavaNextForConditionalGeneration(PrunedAnyres, LlavaNextForConditionalGeneration):
    packing = staticmethod(packed)
