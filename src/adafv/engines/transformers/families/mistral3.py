"""Mistral 3 (`Mistral3ForConditionalGeneration`): images of any size through a Pixtral tower, 2 x 2 patches to a token.

The tower sees the patches of all images as one row, kept apart by its mask (with flash attention, by lengths); so the
saliency is worked out image by image, whatever the mask. The patch merger joins squares of neighbouring patches, and the
saliency of a token is the mean over its square. In the prompt every row of an image ends with a token of its own, so the
placeholders of an image are no single run. These row ends are text to the model and stay, also where all of a row goes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from adafv.core import ImageLayout, patch_saliency
from adafv.core.patches import pooled
from adafv.engines.transformers.families.base import Encoded, Family, Signals, is_a
from adafv.engines.transformers.towers import Score, TappedTower, TowerShape, uncompiled, with_tower
from adafv.errors import UnsupportedModelError
from adafv.prompts.prompt import Run


@dataclass(frozen=True)
class PixtralShape(TowerShape):
    """A Pixtral tower in a call with images of so many patches, one behind the other."""

    lengths: tuple[int, ...] = ()

    @property
    def score(self) -> Score:
        def image_by_image(
            query: Tensor, key: Tensor, value: Tensor, features: Tensor, scaling: float, mask: Tensor | None
        ) -> Tensor:
            images = zip(*(part.split(self.lengths, dim=-2) for part in (query, key, value, features)), strict=True)
            return torch.cat([patch_saliency(q, k, v, f, scaling) for q, k, v, f in images], dim=-1)

        return image_by_image


class Mistral3(Family):
    name = "Mistral 3"
    model_classes = ("Mistral3ForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes", "vision_feature_layer")
    saliency = "received"
    tower_shape = PixtralShape("transformer.layers", "attention", has_class_token=False)

    def check(self, model: Any) -> None:
        tower = uncompiled(getattr(model.model, self.tower_name))
        if not is_a(tower, "PixtralVisionModel"):
            raise UnsupportedModelError(
                f"the vision tower {type(tower).__name__} is not supported in {type(model).__name__}; supported is "
                "PixtralVisionModel"
            )
        self.feature_options(model, {})

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        merge = self.merge(model)
        layouts = []
        for rows, columns in patch_grids(model, visuals):
            count = (rows // merge) * (columns // merge)
            layouts.append(ImageLayout(torch.arange(count), 1, rows // merge, columns // merge))
        return layouts

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        return {**visuals, "pixel_values": visuals["pixel_values"][wanted], "image_sizes": image_sizes(visuals)[wanted]}

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        grids = patch_grids(model, visuals)
        lengths = tuple(rows * columns for rows, columns in grids)
        shape = replace(self.tower_shape, lengths=lengths)
        options = self.feature_options(model, visuals)
        layer = options.get("vision_feature_layer", -1)
        tower = TappedTower(getattr(model.model, self.tower_name), layer, signals, shape)
        twin = with_tower(model.model, self.tower_name, tower)
        features = twin.get_image_features(
            pixel_values=visuals["pixel_values"], image_sizes=image_sizes(visuals), return_dict=True, **options
        ).pooler_output

        def merged(patches: Tensor) -> list[Tensor]:
            parts = zip(patches.split(lengths), grids, strict=True)
            return [pooled(part, grid, self.merge(model)) for part, grid in parts]

        return Encoded(list(features), tower.read(merged))

    def feature_layers(self, model: Any) -> int | list[int]:
        return self.feature_options(model, {}).get("vision_feature_layer", -1)  # type: ignore[no-any-return]

    def markers(self, runs: list[Run]) -> list[tuple[int, int, int]]:
        ends = [(run.row, run.start + run.length) for run in runs]  # of rows, the last of which ends the image
        return [(row, column, column + 1) for row, column in ends]

    def feature_options(self, model: Any, visuals: Mapping[str, Any]) -> dict[str, Any]:
        """What decides which features are read, of this call or of the model's config.

        Raises:
            UnsupportedModelError: several layers are, or one that there is not.
        """
        layer = visuals.get("vision_feature_layer")
        layer = model.config.vision_feature_layer if layer is None else layer
        count = model.config.vision_config.num_hidden_layers
        if not isinstance(layer, int) or not (-count <= layer < 0 or 0 < layer <= count):
            raise UnsupportedModelError(
                f"vision_feature_layer={layer} does not name the output of one of the tower's {count} layers"
            )
        return {"vision_feature_layer": layer}

    def merge(self, model: Any) -> int:
        """Patches along one side of the square that makes a token."""
        return int(model.config.spatial_merge_size)


def image_sizes(visuals: Mapping[str, Any]) -> Tensor:
    """[images, 2] (height, width) in pixels, where they are not given those of the whole batch."""
    pixels, sizes = visuals["pixel_values"], visuals.get("image_sizes")
    return torch.tensor([pixels.shape[-2:]] * len(pixels)) if sizes is None else torch.as_tensor(sizes)


def patch_grids(model: Any, visuals: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(rows, columns) of patches of every image."""
    side = model.config.vision_config.patch_size
    return [(height // side, width // side) for height, width in image_sizes(visuals).tolist()]
