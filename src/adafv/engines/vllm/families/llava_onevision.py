"""LLaVA-OneVision: a thumbnail and up to dozens of crops per image, scaled down to as many tokens as nine crops have.

vLLM cuts every image of a prompt into crops. So does transformers for a list of images; if they come as a list of one
prompt's images, as from its chat templates, it cuts none of several. What is kept is compared with the former.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from adafv.core import ImageLayout
from adafv.engines.vllm.families.llava_next import PrunedAnyres, anyres_layout_of
from adafv.engines.vllm.processor import PrunedInfo, PrunedProcessor
from adafv.errors import UnsupportedModelError

PACKING = "anyres_max_9"
"""The only `vision_aspect_ratio` that vLLM (0.31, 0.32) packs by, whatever a checkpoint says."""


def packed(config: Any, crops: Tensor, size: Tensor) -> Tensor:
    """By LLaVA-OneVision's own method."""
    model: Any = SimpleNamespace(config=config)
    newline = crops.new_full(crops.shape[-1:], -1.0)
    return LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings(
        model, size, crops, image_newline=newline, vision_aspect_ratio=PACKING, strategy="spatial_unpad"
    )


class _Info(PrunedInfo, LlavaOnevisionProcessingInfo):
    def layout(self, image: Mapping[str, Any]) -> ImageLayout:
        return anyres_layout_of(self.get_hf_config(), packed, image["image_sizes"])


class _Processor(PrunedProcessor, LlavaOnevisionMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=LlavaOnevisionDummyInputsBuilder)
class AdaFVLlavaOnevisionForConditionalGeneration(PrunedAnyres, LlavaOnevisionForConditionalGeneration):
    projects = False  # a token is made of several patches after the projector

    @classmethod
    def check_config(cls, config: Any) -> None:
        super().check_config(config)
        if config.vision_aspect_ratio != PACKING:
            raise UnsupportedModelError(
                f"vision_aspect_ratio={config.vision_aspect_ratio!r}, but vLLM packs images as {PACKING!r} alone"
            )

    packing = staticmethod(packed)
