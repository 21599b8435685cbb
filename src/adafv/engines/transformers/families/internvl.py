"""InternVL (`InternVLForConditionalGeneration`): tiles of one size, 2 x 2 patches to a token (pixel shuffle).

The processor cuts an image into up to twelve tiles and puts a thumbnail behind them; the model gets the tiles of all
images in one row. Which of them make an image is known from the prompt alone, where the tokens of an image are one run
of placeholders between two markers. How the tiles were arranged is known from nowhere, so the layout does not say it. The
saliency goes through the model's own pixel shuffle.

Videos come as images too, one run per frame: each frame is an image of its own, with a budget of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.crops import check_thumbnails
from adafv.core.patches import by_image, crops_in_a_row, numbered, of_images, of_some_crops, square_side
from adafv.core.tokens import Signal
from adafv.engines.transformers.families.base import Encoded, Family, Signals
from adafv.engines.transformers.families.llava import feature_options
from adafv.engines.transformers.towers import TappedTower, patch_grid, with_tower
from adafv.errors import UnsupportedModelError
from adafv.prompts.prompt import Run


class InternVL(Family):
    name = "InternVL"
    model_classes: ClassVar[tuple[str, ...]] = ("InternVLForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "image_sizes",
    )
    as_tensor = ("image",)
    knows_thumbnail = True
    limits = "a video is budgeted frame by frame, each frame as an image"

    def check(self, model: Any) -> None:
        self.options(model, {})

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        tiles, _, height, width = visuals["pixel_values"].shape
        rows = columns = square_side(patch_grid(model.model.vision_tower, height, width), self.patches_joined(model))
        counts = [1] * tiles
        if sum(run.length for run in runs) == tiles * rows * columns and not any(
            run.length % (rows * columns) for run in runs
        ):
            counts = [sum(run.length for run in image) // (rows * columns) for image in self.runs_of_images(runs)]
        # Else these are not the tiles of this prompt; whoever compares the numbers of tokens finds out.
        return [ImageLayout(thumbnail_last(count, rows * columns), count, rows, columns) for count in counts]

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        tiles = of_images(visuals["pixel_values"], [layout.crops for layout in layouts], wanted)
        return {**visuals, "pixel_values": tiles}

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        features, read = self._run(model, visuals, visuals["pixel_values"], signals)
        return Encoded(by_image(features, layouts), read(lambda tokens: by_image(tokens, layouts)))

    def encode_crops(
        self,
        model: Any,
        visuals: Mapping[str, Any],
        layouts: list[ImageLayout],
        wanted: list[tuple[int, ...]],
        signals: Signals,
    ) -> Encoded:
        tiles: Tensor = visuals["pixel_values"]
        images = [part.roll(1, dims=0) for part in tiles.split([layout.crops for layout in layouts])]
        features, read = self._run(model, visuals, chosen_tiles(images, wanted), signals)

        def placed(tokens: Tensor) -> list[Tensor]:
            return of_some_crops(tokens, layouts, wanted)

        return Encoded(placed(features), read(placed))

    def _run(
        self, model: Any, visuals: Mapping[str, Any], tiles: Tensor, signals: Signals
    ) -> tuple[Tensor, Callable[[Callable[[Tensor], list[Tensor]]], dict[Signal, list[Tensor]]]]:
        """The stock method on some tiles: ([all tokens, D], what reads the signals, given how tokens go to images)."""
        options = self.options(model, visuals)
        tower = TappedTower(model.model.vision_tower, options.get("vision_feature_layer", -1), signals)
        twin = with_tower(model.model, "vision_tower", tower)
        output = twin.get_image_features(tiles, return_dict=True, **options)

        def read(to_images: Callable[[Tensor], list[Tensor]]) -> dict[Signal, list[Tensor]]:
            def joined(patches: Tensor) -> list[Tensor]:
                numbers = torch.arange(len(patches)).view(len(tiles), -1, 1)
                return to_images(numbered(patches, self.shuffled(model, numbers)))

            return tower.read(joined)

        return output.pooler_output.flatten(0, 1), read

    def feature_layers(self, model: Any) -> int | list[int]:
        return self.options(model, {}).get("vision_feature_layer", -1)  # type: ignore[no-any-return]

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        return super().view(model, visuals, layouts).roll(1, dims=0)  # the thumbnail first

    def options(self, model: Any, visuals: Mapping[str, Any]) -> dict[str, Any]:
        """What `get_image_features` is told beside the pixels.

        Raises:
            UnsupportedModelError: the saliency cannot be read there, or tokens are not patches.
        """
        layer, strategy = feature_options(model, visuals)
        return {"vision_feature_layer": _one_layer(layer), "vision_feature_select_strategy": strategy}

    def patches_joined(self, model: Any) -> int:
        """Patches along each side of the square that becomes one token."""
        return int(1 / model.config.downsample_ratio)

    def shuffled(self, model: Any, patches: Tensor) -> Tensor:
        """The model's own pixel shuffle: [tiles, rows * columns, E] -> [tiles, fewer rows, fewer columns, more than E]."""
        side = int(patches.shape[1] ** 0.5)
        ratio = model.config.downsample_ratio
        return model.model.pixel_shuffle(patches.unflatten(1, (side, side)), scale_factor=ratio)  # type: ignore[no-any-return]

    def runs_of_images(self, runs: list[Run]) -> list[list[Run]]:
        """The runs of placeholders that make each image."""
        return [[run] for run in runs]

    def markers(self, runs: list[Run]) -> list[tuple[int, int, int]]:
        behind = [(run.row, run.start + run.length, run.start + run.length + 1) for run in runs]
        return behind + [(run.row, run.start - 1, run.start) for run in runs if run.start]


def chosen_tiles(images: Sequence[Tensor], wanted: Sequence[Sequence[int]]) -> Tensor:
    """[tiles, 3, H, W], of every image ([its tiles, 3, H, W], the thumbnail first) those that are wanted.

    Raises:
        UnsupportedCallError: the tile that would be a thumbnail shows something else.
    """
    check_thumbnails([image for image, tiles in zip(images, wanted, strict=True) if 0 in tiles])
    return crops_in_a_row(images, wanted)


def images_by_gap(runs: list[Run]) -> list[list[Run]]:
    """The runs of each image, where one token stands between two runs of an image and more between images."""
    images: list[list[Run]] = []
    for number, run in enumerate(runs):
        if number == 0 or runs[number - 1].row != run.row or len(run.between) > 1:
            images.append([])
        images[-1].append(run)
    return images


def thumbnail_last(tiles: int, tokens: int) -> Tensor:
    """[tiles * tokens] long, `ImageLayout.source` where the thumbnail, which is crop 0, comes behind the other tiles."""
    return torch.arange(tiles * tokens).roll(-tokens)


def _one_layer(layer: int | list[int]) -> int:
    if not isinstance(layer, int):
        raise UnsupportedModelError(
            f"vision_feature_layer={layer} names several layers, of which the stock InternVL reads none; name one"
        )
    return layer
