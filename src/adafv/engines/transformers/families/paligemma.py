"""PaliGemma and PaliGemma 2 (`PaliGemmaForConditionalGeneration`): every patch a token, a prompt that looks ahead.

Images and prompt are one prefix, in which every token looks at every other; only the answer is written from left to
right. Which is which stands in `token_type_ids` (0: prefix), which the processor always returns. Without them the stock
model reads a prompt as a prefix or from left to right depending on whether its batch is padded, and pruning would decide
which; so images without them are refused. A prefix cannot grow once it is cached, so an image behind cached tokens is
refused too.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.engines.transformers.families.base import CallWithImages
from adafv.engines.transformers.families.gemma3 import Gemma3
from adafv.engines.transformers.releases import KEEPS_PACKED_PREFIXES_APART
from adafv.engines.transformers.settings import setting
from adafv.engines.transformers.towers import patch_grid
from adafv.errors import UnsupportedCallError
from adafv.prompts.prompt import Run


class PaliGemma(Gemma3):
    name = "PaliGemma"
    model_classes = ("PaliGemmaForConditionalGeneration",)
    packed_apart = KEEPS_PACKED_PREFIXES_APART
    prompt = "{image}{question}"
    limits = (
        "refuses images without token_type_ids, chunked prefill, images behind a cache; a static cache in PaliGemma 2"
    )

    def places(self, columns: Tensor) -> Tensor:
        return columns + 1

    def check_call(self, model: Any, call: CallWithImages) -> None:
        if call.inputs.get("token_type_ids") is None:
            raise UnsupportedCallError(
                "without token_type_ids it depends on the padding whether a prompt of PaliGemma looks ahead; pass the "
                "token_type_ids that the processor returned"
            )
        if call.cached:
            raise UnsupportedCallError(
                "an image of PaliGemma is read together with its whole prompt, and cannot follow cached tokens; pass the "
                "whole prompt without a cache"
            )
        if call.generates and model.config.text_config.model_type == "gemma2" and _is_static(model, call):
            raise UnsupportedCallError(
                "PaliGemma 2 fails with a static cache in stock transformers; leave cache_implementation out"
            )
        self.check_packed(call)

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        rows, columns = patch_grid(model.model.vision_tower, *visuals["pixel_values"].shape[-2:])
        layout = ImageLayout(torch.arange(rows * columns), crops=1, rows=rows, columns=columns)
        return [layout] * len(visuals["pixel_values"])

    def pooled(self, model: Any, patches: Tensor) -> Tensor:
        return patches


def _is_static(model: Any, call: CallWithImages) -> bool:
    implementation = setting(model, call.inputs, "cache_implementation")
    return "static" in str(implementation) or bool(getattr(call.cache, "is_compileable", False))
