"""LLaVA-NeXT: a thumbnail and several crops per image, packed by vLLM's own method.

As in transformers, where each patch ends up is found by sending patch numbers through the packing; see
`adafv.families.llava_next`.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from adafv.core import ImageLayout
from adafv.engines.vllm.families.llava import PrunedLlava
from adafv.engines.vllm.processor import PrunedInfo, PrunedProcessor
from adafv.engines.vllm.tower_cache import EncodedImage


class _Info(PrunedInfo, LlavaNextProcessingInfo):
    pass


class _Processor(PrunedProcessor, LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=LlavaDummyInputsBuilder)
class AdaFVLlavaNextForConditionalGeneration(PrunedLlava, LlavaNextForConditionalGeneration):
    def encode(self, images: dict[str, Any]) -> list[EncodedImage]:
        features, saliency = self.crops(images)
        counts = [len(crops) for crops in images["pixel_values"]]
        scores = [None] * len(counts) if saliency is None else saliency.split(counts)
        return [
            self._image(part, score, crops, size)
            for part, score, crops, size in zip(features, scores, counts, images["image_sizes"], strict=True)
        ]

    def _image(self, features: Tensor, saliency: Tensor | None, crops: int, size: Tensor) -> EncodedImage:
        rows, columns = self.patch_grid
        numbers = torch.arange(crops * rows * columns, dtype=torch.float64).view(crops, rows * columns, 1)
        packing = SimpleNamespace(config=self.config, image_newline=torch.tensor([-1.0], dtype=torch.float64))
        source = LlavaNextForConditionalGeneration._merge_image_patch_embeddings(
            packing,  # type: ignore[arg-type]
            size.cpu(),
            numbers,
            strategy="spatial_unpad",
        )
        layout = ImageLayout(source.squeeze(-1).long(), crops, rows, columns)
        if saliency is not None:
            saliency = saliency.flatten()[layout.source.clamp_min(0).to(saliency.device)]
        return EncodedImage(features, saliency, layout)
