"""Qwen2.5-VL: images of any size in one row of patches, windows, positions in time, height and width.

As in transformers, the saliency is read off the tower's last block that looks at the whole image, patch by patch of each
image by itself; a token shows four patches, and gets their mean. See `adafv.engines.transformers.families.qwen2_5_vl`.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from adafv.core import Budget, ImageLayout, patch_saliency
from adafv.core.crops import Crops
from adafv.core.encoded import EncodedImage
from adafv.core.layers import TowerLayers
from adafv.core.patches import neighbours
from adafv.engines.serving.request import Wish
from adafv.engines.transformers.families.qwen2_5_vl import window_order
from adafv.engines.vllm.model import PrunedModel
from adafv.engines.vllm.processor import PrunedInfo, PrunedProcessor
from adafv.engines.vllm.rotary import ROTATIONS, RotaryPositions, place_channels
from adafv.engines.vllm.tap import Attended, Tap, encoded_images
from adafv.errors import UnsupportedCallError, UnsupportedModelError

LONGEST = 200
"""How many times longer than wide an image may be, for Qwen's image processor."""


class PrunedQwen(PrunedModel, RotaryPositions):
    """What the Qwen-like model classes of vLLM share."""

    visual: Any

    def tap(self) -> Tap:
        blocks = list(self.visual.blocks)
        return Tap(blocks, "attn.attn", TowerLayers(len(blocks), len(blocks), self.whole), self.adafv_signals)

    @property
    def whole(self) -> list[int] | None:
        """Layers that look at the whole image, counted from 1; None: all."""
        return None

    def take(self, images: dict[str, Any], wanted: Sequence[int]) -> dict[str, Any]:
        sizes = images["image_grid_thw"]
        parts = images["pixel_values"].split(sizes.prod(-1).tolist())
        return {"pixel_values": torch.cat([parts[i] for i in wanted]), "image_grid_thw": sizes[list(wanted)]}

    def encode(self, images: dict[str, Any]) -> list[EncodedImage]:
        image_input = self._parse_and_validate_image_input(**images)  # type: ignore[attr-defined]
        with self.adafv_tap as tap:
            features = self._process_image_input(image_input)  # type: ignore[attr-defined]
        sizes = images["image_grid_thw"]
        layouts = [layout_of(self.config, size) for size in sizes]
        counts = sizes.prod(-1).tolist()

        def score(run: Attended) -> Tensor:
            """Of a run over all images in a row ([1, H, patches, d]), image by image."""
            states = (part.squeeze(0).split(counts, dim=1) for part in (run.query, run.key, run.value))
            features = run.features.flatten(0, 1).split(counts)
            return torch.cat(
                [
                    patch_saliency(query, key, value, output, run.scaling)
                    for query, key, value, output in zip(*states, features, strict=True)
                ]
            )

        def joined(patches: Tensor) -> list[Tensor]:
            parts = zip(patches.split(counts), sizes, strict=True)
            return [self.by_token(part, size) for part, size in parts]

        return encoded_images(features, tap.read(score, joined), layouts)

    def by_token(self, patches: Tensor, size: Tensor) -> Tensor:
        """Values of one image's patches ([patches, C]), in the tower's own order -> [tokens, C]."""
        return neighbours(patches, self.visual.spatial_merge_unit)

    def hand_over(self, image: EncodedImage, kept: Tensor, features: Tensor) -> Tensor:
        return torch.cat((features, place_channels(image.layout, kept).to(features)), dim=1)


def layout_of(config: Any, size: Tensor) -> ImageLayout:
    """Of an image of so many patches ([3]: frames, rows, columns)."""
    _, rows, columns = (size // torch.tensor([1, *[config.vision_config.spatial_merge_size] * 2])).tolist()
    return ImageLayout(torch.arange(rows * columns), crops=1, rows=rows, columns=columns)


class QwenInfo(PrunedInfo):
    """In front of a Qwen-like `ProcessingInfo`."""

    def layout(self, image: Mapping[str, Any]) -> ImageLayout:
        return layout_of(self.get_hf_config(), image["image_grid_thw"])  # type: ignore[attr-defined]

    @cached_property
    def longest_side(self) -> int:
        """Of an image that the image processor does not refuse, in tokens."""
        return isqrt(LONGEST * self.get_max_image_tokens())  # type: ignore[attr-defined]


class QwenProcessor(PrunedProcessor):
    """In front of a Qwen-like processor: refuses what would go wrong in the worker, where nothing can be refused."""

    def _wishes(self, inputs: Any, budget: Budget, crops: Crops) -> list[Wish]:
        wishes = super()._wishes(inputs, budget, crops)
        # An image that keeps few tokens still takes as many positions as it is high or wide.
        model = self.info.ctx.model_config
        positions = model.max_model_len + len(wishes) * self.info.longest_side
        if positions > ROTATIONS * model.hf_text_config.max_position_embeddings:
            raise UnsupportedCallError(
                f"{len(wishes)} images in one prompt could take {positions} positions, more than vLLM prepares for this "
                "model; send fewer"
            )
        return wishes


class _Info(QwenInfo, Qwen2_5_VLProcessingInfo):
    pass


class _Processor(QwenProcessor, Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class AdaFVQwen2_5_VLForConditionalGeneration(PrunedQwen, Qwen2_5_VLForConditionalGeneration):
    @classmethod
    def check_config(cls, config: Any) -> None:
        if not config.vision_config.fullatt_block_indexes:
            raise UnsupportedModelError(
                "no block of this vision tower looks at a whole image (fullatt_block_indexes is empty), so nothing says "
                "which patches the image attends to"
            )

    @property
    def whole(self) -> list[int] | None:
        return [block + 1 for block in sorted(self.visual.fullatt_block_indexes)]

    def by_token(self, patches: Tensor, size: Tensor) -> Tensor:
        order = window_order(self.visual, size.unsqueeze(0)).to(patches.device)
        return super().by_token(patches, size).index_select(0, order.argsort())
