"""Qwen2-VL (`Qwen2VLForConditionalGeneration`): images and videos of any size, positions in time, height and width.

The tower sees all images as one row of patches, with attention inside each frame only. Patches that the merger will join
(2 x 2) are neighbours in that row, so the saliency of a token is the mean over its four.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.families.base import Encoded, Family, Run
from adafv.families.towers import Tap, patch_score, twin_of


class Qwen2VL(Family):
    name = "Qwen2-VL"
    model_classes: ClassVar[tuple[str, ...]] = ("Qwen2VLForConditionalGeneration",)
    images = ("pixel_values", "image_grid_thw")
    videos: ClassVar[tuple[str, ...]] = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    saliency = "received"
    rotary_axes = 3

    def check(self, model: Any) -> None:
        pass

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        merge = model.config.vision_config.spatial_merge_size
        layouts = []
        for frames, rows, columns in self.grids(modality, visuals):
            count = frames * (rows // merge) * (columns // merge)
            layouts.append(ImageLayout(torch.arange(count), frames, rows // merge, columns // merge))
        return layouts

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        pixels, grid, *_ = self.inputs(modality)
        parts = visuals[pixels].split([t * h * w for t, h, w in self.grids(modality, visuals)])
        taken = {pixels: torch.cat([parts[i] for i in wanted]), grid: visuals[grid][wanted]}
        if "second_per_grid_ts" in visuals:
            taken["second_per_grid_ts"] = torch.as_tensor(visuals["second_per_grid_ts"])[wanted]
        return taken

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], saliency: bool
    ) -> Encoded:
        pixels, sizes, *_ = self.inputs(modality)
        tower = model.model.visual
        tap = Tap(tower, f"blocks.{self.tapped_block(tower)}.attn", patch_score) if saliency else None
        twin = twin_of(model.model) if tap is None else twin_of(model.model, visual=tap.tower)
        # The stock method of the stock class, on a twin whose only difference is the tower.
        output = getattr(twin, f"get_{modality}_features")(visuals[pixels], visuals[sizes], return_dict=True)
        scores = None
        if tap is not None:
            merged = torch.cat([score.flatten() for score in tap.scores])
            merged = merged.unflatten(0, (-1, model.config.vision_config.spatial_merge_size**2)).mean(-1)
            scores = list(self.in_raster(model, visuals[sizes], merged).split([layout.tokens for layout in layouts]))
        return Encoded(list(output.pooler_output), scores, self.deepstack_of(output))

    def positions(
        self, model: Any, tokens: Tensor, attended: Tensor, visuals: Mapping[str, Mapping[str, Any]]
    ) -> Tensor:
        if not visuals:
            return (attended.cumsum(-1) - 1).clamp_min(0).expand(self.rotary_axes, *attended.shape)
        kinds = torch.zeros_like(tokens)
        sizes: dict[str, Any] = {}
        placeholders = self.placeholders(model, tokens)
        for number, modality in enumerate(("image", "video"), start=1):
            kinds[placeholders[modality]] = number
            sizes |= {name: value for name, value in visuals.get(modality, {}).items() if not name.startswith("pixel")}
        positions, _ = model.model.get_rope_index(tokens, mm_token_type_ids=kinds, attention_mask=attended, **sizes)
        return positions  # type: ignore[no-any-return]

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        config = model.config.vision_config
        merge, side, layout = config.spatial_merge_size, config.patch_size, layouts[0]
        patches = visuals["pixel_values"][: layout.tokens * merge**2]
        patches = patches.view(layout.rows, layout.columns, merge, merge, -1, config.temporal_patch_size, side, side)
        still = patches[..., 0, :, :]  # an image is repeated in time
        return still.permute(4, 0, 2, 5, 1, 3, 6).reshape(
            1, -1, layout.rows * merge * side, layout.columns * merge * side
        )

    def tapped_block(self, tower: Any) -> int:
        """The block whose attention is read: the last, from whose output the merger makes the tokens."""
        return len(tower.blocks) - 1

    def in_raster(self, model: Any, sizes: Tensor, merged: Tensor) -> Tensor:
        """Scores of merged patches ([tokens]) from the tower's order into that of the tokens."""
        return merged

    def deepstack_of(self, output: Any) -> list[Tensor]:
        """Per image [N, L, D], see `Encoded`."""
        return []

    def grids(self, modality: str, visuals: Mapping[str, Any]) -> list[list[int]]:
        """(frames, rows, columns) of patches of every image or video."""
        return torch.as_tensor(visuals[self.inputs(modality)[1]]).tolist()
