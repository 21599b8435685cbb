"""GLM-4.1V (`Glm4vForConditionalGeneration`), its mixture of experts (GLM-4.5V), and GLM-4.6V.

The tower packs images as Qwen2-VL's does: a row of patches, four neighbours to a token, attention inside a frame only.
The frames of a video are written as images, each with its time behind it, between tokens that begin and end the video;
these alone tell an image's placeholders from a video's. The stock model fails where a call has both, and looks for
another token when it repeats a video for beams; so the kept tokens of videos are handed over as images, and both at once
is refused.
"""

from typing import Any, ClassVar

from torch import Tensor

from adafv.engines.transformers.families.base import CallWithImages
from adafv.engines.transformers.families.qwen2_vl import Qwen2VL
from adafv.errors import UnsupportedCallError


class Glm4V(Qwen2VL):
    name = "GLM-4V"
    model_classes: ClassVar[tuple[str, ...]] = (
        "Glm4vForConditionalGeneration",
        "Glm4vMoeForConditionalGeneration",
        "Glm46VForConditionalGeneration",
    )
    videos = ("pixel_values_videos", "video_grid_thw")
    limits = "refuses images beside videos in one call"

    def check_call(self, model: Any, call: CallWithImages) -> None:
        if len(call.modalities) > 1:
            raise UnsupportedCallError(
                f"images beside videos in one call fail in stock transformers with {self.name}; pass the frames as images, "
                "or ask about them in turns"
            )

    def handed_as(self, modality: str) -> str:
        return "image"

    def placeholder(self, model: Any, modality: str) -> int:
        return int(model.config.image_token_id)

    def placeholders(self, model: Any, tokens: Tensor) -> dict[str, Tensor]:
        visual = tokens == self.placeholder(model, "image")
        # As the processor tells them apart: inside a video more have begun than ended.
        begun, ended = (
            (tokens == token).cumsum(-1)
            for token in (model.config.video_start_token_id, model.config.video_end_token_id)
        )
        return {"image": visual & (begun <= ended), "video": visual & (begun > ended)}
