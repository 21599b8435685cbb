"""VideoLLaMA3 (`VideoLlama3ForConditionalGeneration`): images and videos of any size, positions along the prompt.

As in Qwen2-VL the tower sees all images as one row of patches, with attention inside each frame only. How many patches
make a token is said per image (`image_merge_sizes`), and the saliency goes through the tower's own downsampling. Of a
video the processor leaves out tokens that look as they did a frame earlier (`video_compression_mask`), so the prompt has
fewer placeholders than the tower has tokens: what it left out is left out here, and the budget is of the rest. Between
the frames stand their times, so a video's placeholders are not neighbours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.patches import of_images
from adafv.engines.transformers.families.base import Encoded, Family, Signals, paired
from adafv.engines.transformers.towers import TowerShape, with_tap
from adafv.prompts.prompt import Run


class VideoLlama3(Family):
    name = "VideoLLaMA3"
    model_classes = ("VideoLlama3ForConditionalGeneration",)
    images = ("pixel_values", "image_grid_thw", "image_merge_sizes")
    videos = ("pixel_values_videos", "video_grid_thw", "video_merge_sizes", "video_compression_mask")
    saliency = "received"
    tower_name = "vision_model"
    tower_shape = TowerShape("encoder.layers", "self_attn", has_class_token=False)

    def check(self, model: Any) -> None:
        pass

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        kept = [part.nonzero().flatten() for part in self._kept(modality, visuals)]
        return [ImageLayout(source, *grid) for source, grid in zip(kept, self._grids(modality, visuals), strict=True)]

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        pixels, grid, merge, *_ = self.inputs(modality)
        taken = {pixels: of_images(visuals[pixels], visuals[grid].prod(-1).tolist(), wanted)}
        taken |= {name: visuals[name][wanted] for name in (grid, merge)}
        if "video_compression_mask" in visuals:
            kept = self._kept(modality, visuals)
            taken["video_compression_mask"] = torch.cat([kept[i] for i in wanted])
        return taken

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        pixels, sizes, merges = (visuals[name] for name in self.inputs(modality)[:3])
        twin, tap = with_tap(model.model, self.tower_name, self.tower_shape, signals)
        output = getattr(twin, f"get_{modality}_features")(pixels, sizes, merges, return_dict=True)
        kept = self._kept(modality, visuals)

        def in_prompt(parts: Sequence[Tensor]) -> list[Tensor]:
            return [part[mask.to(part.device)] for part, mask in zip(parts, kept, strict=True)]

        def merged(patches: Tensor) -> list[Tensor]:
            by_token = model.model.vision_model.pixel_unshuffle(patches, sizes, merges)
            return in_prompt(by_token.split([part.numel() for part in kept]))

        return Encoded(in_prompt(output.pooler_output), tap.read(merged))

    def _grids(self, modality: str, visuals: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """(frames, rows, columns) of tokens of every image or video, before any is left out."""
        _, grid, merge, *_ = self.inputs(modality)
        sizes = paired(grid, visuals[grid].tolist(), merge, visuals[merge].tolist())
        return [(frames, rows // side, columns // side) for (frames, rows, columns), side in sizes]

    def _kept(self, modality: str, visuals: Mapping[str, Any]) -> list[Tensor]:
        """Per image or video [frames * rows * columns] bool, the tokens for which the prompt has a placeholder."""
        counts = [frames * rows * columns for frames, rows, columns in self._grids(modality, visuals)]
        mask = visuals.get("video_compression_mask")
        mask = torch.ones(sum(counts), dtype=torch.bool) if mask is None else mask.cpu().bool()
        return list(mask.split(counts))
