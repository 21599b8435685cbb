"""PaddleOCR-VL (`PaddleOCRVLForConditionalGeneration`): images of any size, a SigLIP tower, positions in three axes.

Inputs and positions are those of Qwen2-VL's images, but the tower leaves the patches of an image in rows from left to
right; the projector behind it picks the 2 x 2 that make a token. So the saliency of a token is the mean over the four
that the projector picks, not over four neighbours in the tower's output. The stock class has no videos.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.families.base import Encoded
from adafv.families.qwen2_vl import Qwen2VL
from adafv.families.towers import Tap, patch_score, twin_of


class PaddleOcrVL(Qwen2VL):
    name = "PaddleOCR-VL"
    model_classes = ("PaddleOCRVLForConditionalGeneration",)
    videos = ()

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], saliency: bool
    ) -> Encoded:
        tower = model.model.visual
        last = len(tower.vision_model.encoder.layers) - 1
        tap = Tap(tower, f"vision_model.encoder.layers.{last}.self_attn", patch_score) if saliency else None
        twin = twin_of(model.model) if tap is None else twin_of(model.model, visual=tap.tower)
        # The stock method of the stock class, on a twin whose only difference is the tower.
        output = twin.get_image_features(visuals["pixel_values"], visuals["image_grid_thw"], return_dict=True)
        if tap is None:
            return Encoded(list(output.pooler_output), None)
        merge = model.config.vision_config.spatial_merge_size
        return Encoded(list(output.pooler_output), merged_rows(tap.scores, layouts, (merge, merge)))

    def positions(
        self, model: Any, tokens: Tensor, attended: Tensor, visuals: Mapping[str, Mapping[str, Any]]
    ) -> Tensor:
        if not visuals:
            return super().positions(model, tokens, attended, visuals)
        kinds = self.placeholders(model, tokens)["image"].long()
        sizes = visuals["image"]["image_grid_thw"]
        positions, _ = model.model.get_rope_index(
            tokens, mm_token_type_ids=kinds, image_grid_thw=sizes, attention_mask=attended
        )
        return positions  # type: ignore[no-any-return]

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        config, layout = model.config.vision_config, layouts[0]
        rows, columns = layout.rows * config.spatial_merge_size, layout.columns * config.spatial_merge_size
        patches = visuals["pixel_values"][: rows * columns].unflatten(0, (rows, columns))
        height, width = rows * config.patch_size, columns * config.patch_size
        return patches.permute(2, 0, 3, 1, 4).reshape(1, -1, height, width)  # type: ignore[no-any-return]


def merged_rows(scores: list[Tensor], layouts: list[ImageLayout], block: tuple[int, int]) -> list[Tensor]:
    """Per image [tokens], the mean over the `block` of patches (rows, columns) that make a token.

    Args:
        scores: of the patches, image after image and frame after frame, each in rows from left to right.
    """
    height, width = block
    by_image = torch.cat([score.flatten() for score in scores]).split(
        [layout.tokens * height * width for layout in layouts]
    )
    return [
        patches.view(layout.crops, layout.rows, height, layout.columns, width).mean((2, 4)).flatten()
        for patches, layout in zip(by_image, layouts, strict=True)
    ]
