"""Qwen2.5-Omni (`Qwen2_5OmniThinkerForConditionalGeneration`): Qwen2.5-VL that also hears.

The part that sees is the thinker, so wrap `model.thinker`. Its tower is Qwen2.5-VL's. Positions are worked out from the
tokens alone: an image is what follows the token that begins one. Audio beside images has positions like text, so its
tokens are passed as text to the stock method, which would otherwise ask for lengths that say the same. Where the tracks
of a video are told in turns (`use_audio_in_video`), positions depend on both; that is refused. Without an attention mask
the stock `forward` counts images along the prompt; here they have their place in the picture also then.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.engines.transformers.families.base import CallWithImages
from adafv.engines.transformers.families.qwen2_5_vl import Qwen25VL
from adafv.engines.transformers.families.qwen2_vl import Qwen2VL
from adafv.engines.transformers.releases import check_tower_in_base
from adafv.errors import UnsupportedCallError


class Thinker(Qwen2VL):
    """What the thinkers of both generations have in common; no family itself, as it has no name of its own."""

    videos: ClassVar[tuple[str, ...]] = ("pixel_values_videos", "video_grid_thw", "video_second_per_grid")
    limits = "wrap `model.thinker`; refuses use_audio_in_video"

    def check(self, model: Any) -> None:
        check_tower_in_base(model.model, type(model).__name__)
        super().check(model)

    def check_call(self, model: Any, call: CallWithImages) -> None:
        if call.inputs.get("use_audio_in_video"):
            raise UnsupportedCallError(
                "use_audio_in_video is not supported with pruned tokens, as positions then depend on the sound; pass the "
                "sound as an audio of its own, beside the video"
            )

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        taken = super().take(model, modality, visuals, layouts, wanted)
        if visuals.get("video_second_per_grid") is not None:
            taken["video_second_per_grid"] = torch.as_tensor(visuals["video_second_per_grid"])[wanted]
        return taken

    def positions(
        self, model: Any, tokens: Tensor, attended: Tensor, visuals: Mapping[str, Mapping[str, Any]]
    ) -> Tensor:
        if not visuals:
            return super().positions(model, tokens, attended, visuals)
        config, video = model.config, visuals.get("video", {})
        sound = (tokens == config.audio_token_id) | (tokens == config.audio_start_token_id)
        seconds = video.get("video_second_per_grid")
        positions, _ = model.model.get_rope_index(
            tokens.masked_fill(sound, -1),  # any text
            image_grid_thw=visuals.get("image", {}).get("image_grid_thw"),
            video_grid_thw=video.get("video_grid_thw"),
            attention_mask=attended,
            second_per_grids=None if seconds is None else torch.as_tensor(seconds),
        )
        return positions  # type: ignore[no-any-return]


class Qwen25Omni(Thinker, Qwen25VL):
    name = "Qwen2.5-Omni"
    model_classes = ("Qwen2_5OmniThinkerForConditionalGeneration",)
