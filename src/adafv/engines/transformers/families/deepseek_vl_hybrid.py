"""DeepSeek-VL 7B (`DeepseekVLHybridForConditionalGeneration`): DeepSeek-VL with a SAM tower beside the SigLIP tower.

Both towers see the whole image, SAM at a higher resolution, and SAM's output is scaled to SigLIP's grid; so a token is a
patch of SigLIP with what SAM sees at that place. The saliency is SigLIP's alone: most layers of SAM attend in windows, and
its attention does not run through transformers' attention interface. Images cannot be scaled down for the one tower while
the other keeps its grid.
"""

from collections.abc import Mapping
from typing import Any

from adafv.core import ImageLayout
from adafv.core.tokens import Signal
from adafv.engines.transformers.families.base import Encoded
from adafv.engines.transformers.families.deepseek_vl import DeepseekVL
from adafv.errors import PromptError


class DeepseekVLHybrid(DeepseekVL):
    name = "DeepSeek-VL Hybrid"
    model_classes = ("DeepseekVLHybridForConditionalGeneration",)
    images = ("pixel_values", "high_res_pixel_values")
    downsamples = False

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        return {name: pixels[wanted] for name, pixels in visuals.items()}

    def encode(
        self,
        model: Any,
        modality: str,
        visuals: Mapping[str, Any],
        layouts: list[ImageLayout],
        signals: frozenset[Signal],
    ) -> Encoded:
        low, high = visuals["pixel_values"], visuals.get("high_res_pixel_values")
        if high is None or len(high) != len(low):
            raise PromptError(
                f"high_res_pixel_values has {0 if high is None else len(high)} images, but pixel_values has {len(low)}; pass "
                "both as the processor returns them"
            )
        return self._encoded(model, visuals, low, layouts, signals, high_res_pixel_values=high)
