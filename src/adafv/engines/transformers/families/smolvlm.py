"""SmolVLM (`SmolVLMForConditionalGeneration`): Idefics3 in small, and with videos.

A frame of a video is written like an image that is not cut into tiles, so each frame is an image of its own, with a
budget of its own. Releases of transformers before SmolVLM read its visual tokens in any number read them in blocks of one
length, which a batch of pruned prompts does not have; there the model is refused.
"""

from typing import Any

from adafv.engines.transformers.families.idefics3 import Idefics3
from adafv.engines.transformers.releases import check_any_number_of_tokens


class SmolVLM(Idefics3):
    name = "SmolVLM"
    model_classes = ("SmolVLMForConditionalGeneration",)
    limits = f"{Idefics3.limits}; a video is budgeted frame by frame, each frame as an image"

    def check(self, model: Any) -> None:
        super().check(model)
        check_any_number_of_tokens(model.model, self.name)
