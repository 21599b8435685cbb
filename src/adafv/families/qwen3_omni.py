"""Qwen3-Omni (`Qwen3OmniMoeThinkerForConditionalGeneration`): Qwen3-VL that also hears.

As with Qwen2.5-Omni the part that sees is the thinker, and what that file says about sound and attention masks holds
here. The tower is Qwen3-VL's, with features for several language layers; a video is one row of placeholders. Positions
are not whole numbers where the seconds between frames are not.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adafv.core import ImageLayout
from adafv.families.qwen2_5_omni import check_thinker, refuse_tracks_in_turns, seconds_of, thinker_positions
from adafv.families.qwen3_vl import Qwen3VL


class Qwen3Omni(Qwen3VL):
    name = "Qwen3-Omni"
    model_classes = ("Qwen3OmniMoeThinkerForConditionalGeneration",)
    videos = ("pixel_values_videos", "video_grid_thw", "video_second_per_grid")
    limits = "wrap `model.thinker`; refuses use_audio_in_video"

    def check(self, model: Any) -> None:
        check_thinker(model)

    def check_call(self, model: Any, inputs: Mapping[str, Any], cached: bool, generates: bool) -> None:
        refuse_tracks_in_turns(inputs)

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        return {**super().take(model, modality, visuals, layouts, wanted), **seconds_of(visuals, wanted)}

    def positions(
        self, model: Any, tokens: Tensor, attended: Tensor, visuals: Mapping[str, Mapping[str, Any]]
    ) -> Tensor:
        if not visuals:
            return super().positions(model, tokens, attended, visuals)
        return thinker_positions(model, tokens, attended, visuals)
