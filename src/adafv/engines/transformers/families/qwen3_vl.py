"""Qwen3-VL (`Qwen3VLForConditionalGeneration`, also its mixture of experts): features for several language layers.

The tower hands over its tokens more than once ("deepstack"): the last block's as input embeddings, and earlier blocks'
to be added to the first layers of the language model, at the same placeholders. All of a kept token is kept. A video is
a row of frames with their times written between them, so its placeholders are not neighbours; their order is that of
the tokens all the same. The saliency is read off the last block, from which the input embeddings are made.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adafv.engines.transformers.families.qwen2_vl import Qwen2VL
from adafv.engines.transformers.releases import of_stock


class Qwen3VL(Qwen2VL):
    name = "Qwen3-VL"
    model_classes: ClassVar[tuple[str, ...]] = (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    )
    videos: ClassVar[tuple[str, ...]] = ("pixel_values_videos", "video_grid_thw")

    def deepstack_of(self, output: Any) -> list[Tensor]:
        return [torch.stack(layers, dim=1) for layers in zip(*output.deepstack_features, strict=True)]

    def hand_over(
        self, model: Any, modality: str, features: list[Tensor], deepstack: list[Tensor]
    ) -> BaseModelOutputWithPooling:
        layers = zip(*(part.unbind(1) for part in deepstack), strict=True)
        output = of_stock("qwen3_vl.modeling_qwen3_vl", "BaseModelOutputWithDeepstackFeatures")
        return output(  # type: ignore[no-any-return]
            pooler_output=features,
            deepstack_features=[list(layer) for layer in layers],
        )
