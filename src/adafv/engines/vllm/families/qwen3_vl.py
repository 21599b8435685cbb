"""Qwen3-VL: features for several layers of the language model ("deepstack"), in one row per token.

All of a kept token is kept; the first part of its row, which is the input embedding, is compared with the text.
"""

from torch import Tensor
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from adafv.engines.vllm.families.qwen2_5_vl import PrunedQwen, QwenInfo, QwenProcessor


class _Info(QwenInfo, Qwen3VLProcessingInfo):
    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        # Qwen3-VL's own (since 0.32) adds to the options of videos, which are not there where videos are not.
        return super(Qwen3VLProcessingInfo, self).get_supported_mm_processor_kwargs()  # type: ignore[no-any-return]


class _Processor(QwenProcessor, Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=Qwen3VLDummyInputsBuilder)
class AdaFVQwen3VLForConditionalGeneration(PrunedQwen, Qwen3VLForConditionalGeneration):
    visual_dim: int

    def compared(self, features: Tensor) -> Tensor:
        return features[:, : self.visual_dim]
