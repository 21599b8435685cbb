"""Qwen2-VL (`Qwen2VLForConditionalGeneration`): images and videos of any size, positions in time, height and width.

The tower sees all images as one row of patches, with attention inside each frame only. Patches that the merger will join
(2 x 2) are neighbours in that row, so the saliency of a token is the mean over its four.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.patches import by_image, neighbours, of_images
from adafv.engines.transformers.families.base import MODALITIES, Encoded, Family, Signals
from adafv.engines.transformers.towers import TowerShape, with_tap
from adafv.prompts.prompt import Run


class Qwen2VL(Family):
    name = "Qwen2-VL"
    model_classes: ClassVar[tuple[str, ...]] = ("Qwen2VLForConditionalGeneration",)
    images = ("pixel_values", "image_grid_thw")
    videos: ClassVar[tuple[str, ...]] = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    saliency = "received"
    rotary_axes = 3
    tower_name: ClassVar[str] = "visual"
    tower_shape = TowerShape("blocks", "attn", has_class_token=False)

    def check(self, model: Any) -> None:
        pass

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        merge = self.merge(model)
        layouts = []
        for frames, rows, columns in self.grids(modality, visuals):
            count = frames * (rows // merge) * (columns // merge)
            layouts.append(ImageLayout(torch.arange(count), frames, rows // merge, columns // merge))
        return layouts

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        pixels, grid, *_ = self.inputs(modality)
        counts = [t * h * w for t, h, w in self.grids(modality, visuals)]
        taken = {pixels: of_images(visuals[pixels], counts, wanted), grid: visuals[grid][wanted]}
        if "second_per_grid_ts" in visuals:
            taken["second_per_grid_ts"] = torch.as_tensor(visuals["second_per_grid_ts"])[wanted]
        return taken

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        pixels, sizes = (visuals[name] for name in self.inputs(modality)[:2])
        twin, tap = with_tap(model.model, self.tower_name, self.tower_shape, signals)
        output = self.stock_features(twin, modality, pixels, sizes)
        read = tap.read(lambda patches: by_image(self.by_token(model, sizes, patches, layouts), layouts))
        return Encoded(list(output.pooler_output), read, self.deepstack_of(output))

    def positions(
        self, model: Any, tokens: Tensor, attended: Tensor, visuals: Mapping[str, Mapping[str, Any]]
    ) -> Tensor:
        if not visuals:
            return (attended.cumsum(-1) - 1).clamp_min(0).expand(self.rotary_axes, *attended.shape)
        kinds = torch.zeros_like(tokens)
        sizes: dict[str, Any] = {}
        for modality, shown in self.placeholders(model, tokens).items():
            kinds[shown] = 1 + MODALITIES.index(modality)
            sizes |= {name: value for name, value in visuals.get(modality, {}).items() if not name.startswith("pixel")}
        positions, _ = model.model.get_rope_index(tokens, mm_token_type_ids=kinds, attention_mask=attended, **sizes)
        return positions  # type: ignore[no-any-return]

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        merge, side, layout = self.merge(model), model.config.vision_config.patch_size, layouts[0]
        patches = visuals["pixel_values"][: layout.tokens * merge**2]
        patches = patches.view(layout.rows, layout.columns, merge, merge, 3, -1, side, side)
        still = patches[..., 0, :, :]  # where a patch has several frames, an image is repeated in them
        height, width = layout.rows * merge * side, layout.columns * merge * side
        return still.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, -1, height, width)

    def merge(self, model: Any) -> int:
        """Patches along each side of the square that becomes one token."""
        return int(model.config.vision_config.spatial_merge_size)

    def stock_features(self, twin: Any, modality: str, pixels: Tensor, sizes: Tensor) -> Any:
        """What the stock method of the stock class gives."""
        return getattr(twin, f"get_{modality}_features")(pixels, sizes, return_dict=True)

    def by_token(self, model: Any, sizes: Tensor, patches: Tensor, layouts: list[ImageLayout]) -> Tensor:
        """Values per patch ([all patches, C]), frame after frame in the tower's own order -> [all tokens, C]."""
        return neighbours(patches, self.merge(model) ** 2)

    def deepstack_of(self, output: Any) -> list[Tensor]:
        """Per image [N, L, D], see `Encoded`."""
        return []

    def grids(self, modality: str, visuals: Mapping[str, Any]) -> list[list[int]]:
        """(frames, rows, columns) of patches of every image or video."""
        return torch.as_tensor(visuals[self.inputs(modality)[1]]).tolist()
