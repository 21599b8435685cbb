"""Idefics3 (`Idefics3ForConditionalGeneration`): tiles in a row and column each, and the whole image behind them.

The pixels of a prompt are a list of tiles, filled up with empty ones; the stock model leaves out the empty ones and reads
the others one after the other. Which of them make an image is known from the prompt alone. There every tile is a run of
placeholders behind a marker token and its place in words, and a marker ends the image too. So between tiles of one image
stands one marker, and between images stand two; a new line in front of the marker begins a new row of tiles. The marker
is not named in the config: it is what follows the last run of a prompt.

Squares of patches become one token (pixel shuffle), and the saliency goes through the model's own.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.patches import by_image, numbered, of_some_crops, square_side
from adafv.engines.transformers.families.base import Encoded, Family, Signals
from adafv.engines.transformers.families.internvl import thumbnail_last
from adafv.engines.transformers.towers import Tap, TowerShape, check_tower, patch_grid, with_tap
from adafv.errors import PromptError, UnsupportedCallError
from adafv.prompts.prompt import Run


class Idefics3(Family):
    name = "Idefics3"
    model_classes: ClassVar[tuple[str, ...]] = ("Idefics3ForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_attention_mask")
    saliency = "received"
    tower_name = "vision_model"
    tower_shape = TowerShape("encoder.layers", "self_attn", has_class_token=False)
    as_tensor = ("image",)
    chooses_crops = True
    limits = "refuses prompts as embeddings without input_ids, and tiles with padding inside"

    def check(self, model: Any) -> None:
        check_tower(model.model.vision_model, -1, "full")

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        side = self._tile_side(model, visuals)
        tiles = int(_is_real(visuals).sum())
        if len(runs) != tiles or any(run.length != side * side for run in runs):
            # Not the tiles of this prompt; whoever compares the numbers of tokens finds out.
            return [ImageLayout(torch.arange(side * side), 1, side, side)] * tiles
        layouts = []
        for image in _images(runs):
            source = thumbnail_last(len(image), side * side)
            layouts.append(ImageLayout(source, len(image), side, side, _tiling(image)))
        return layouts

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        numbers = torch.arange(sum(layout.crops for layout in layouts)).split([layout.crops for layout in layouts])
        tiles = torch.cat([numbers[i] for i in wanted])
        real = _is_real(visuals)
        return {name: values[real][tiles.to(values.device)].unsqueeze(0) for name, values in visuals.items()}

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        tap, features, numbers = self._run(model, visuals, sum(layout.crops for layout in layouts), signals)

        def joined(patches: Tensor) -> list[Tensor]:
            return by_image(numbered(patches, numbers), layouts)

        return Encoded(by_image(features, layouts), tap.read(joined))

    def encode_crops(
        self,
        model: Any,
        visuals: Mapping[str, Any],
        layouts: list[ImageLayout],
        wanted: list[tuple[int, ...]],
        signals: Signals,
    ) -> Encoded:
        real, first, tiles = _is_real(visuals), 0, []
        for layout, crops in zip(layouts, wanted, strict=True):
            tiles += [first + (crop - 1) % layout.crops for crop in crops]  # crop 0 is the last tile
            first += layout.crops
        place = torch.tensor(tiles)
        some = {name: values[real][place.to(values.device)].unsqueeze(0) for name, values in visuals.items()}
        tap, features, numbers = self._run(model, some, len(tiles), signals)

        def placed(tokens: Tensor) -> list[Tensor]:
            return of_some_crops(tokens, layouts, wanted)

        return Encoded(placed(features), tap.read(lambda patches: placed(numbered(patches, numbers))))

    def _run(self, model: Any, visuals: Mapping[str, Any], tiles: int, signals: Signals) -> tuple[Tap, Tensor, Tensor]:
        """The stock method on some tiles: (the tap, [all tokens, D], which patches make each token)."""
        twin, tap = with_tap(model.model, self.tower_name, self.tower_shape, signals)
        output = twin.get_image_features(**visuals, return_dict=True)
        # Newer releases give a tensor per prompt, older ones a tensor per tile.
        features = torch.cat([part.flatten(0, -2) for part in output.pooler_output])
        connector = model.model.connector
        rows, columns = patch_grid(model.model.vision_model, *visuals["pixel_values"].shape[-2:])
        patches = torch.arange(tiles * rows * columns).view(tiles, -1, 1)
        return tap, features, connector.pixel_shuffle(patches, connector.scale_factor)

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        tiles: Tensor = visuals["pixel_values"][_is_real(visuals)]
        return tiles[: layouts[0].crops].roll(1, dims=0)  # the whole image first

    def markers(self, runs: list[Run]) -> list[tuple[int, int, int]]:
        spans, markers = [], _markers(runs)
        for image in _images(runs):
            place = len(image[0].between) - 1 - image[0].between[::-1].index(markers[image[0].row])
            first = image[0].start - len(image[0].between) + place
            spans.append((image[0].row, first, image[-1].start + image[-1].length + 1))
        return spans

    @staticmethod
    def _tile_side(model: Any, visuals: Mapping[str, Any]) -> int:
        """Tokens along one side of a tile."""
        grid = patch_grid(model.model.vision_model, *visuals["pixel_values"].shape[-2:])
        side = square_side(grid, model.config.scale_factor)
        mask = visuals.get("pixel_attention_mask")
        if mask is not None and not bool((mask[_is_real(visuals)] != 0).all()):
            raise UnsupportedCallError(
                "pixel_attention_mask says that tiles are padded inside, which is not supported; let the processor scale the "
                "images (do_resize=True)"
            )
        return side


def _is_real(visuals: Mapping[str, Any]) -> Tensor:
    """[B, tiles] bool: not one of the empty tiles that prompts are filled up with, by the stock model's own rule."""
    return (visuals["pixel_values"] != 0).flatten(2).any(-1)  # type: ignore[no-any-return]


def _markers(runs: list[Run]) -> dict[int, int]:
    """Per prompt the token around images: what follows its last run."""
    return {run.row: run.after for run in runs}


def _images(runs: list[Run]) -> list[list[Run]]:
    """The runs of each image."""
    markers = _markers(runs)
    images: list[list[Run]] = []
    for number, run in enumerate(runs):
        begins_prompt = number == 0 or runs[number - 1].row != run.row
        marker = markers[run.row]
        if marker < 0:
            raise UnsupportedCallError(
                "which tiles make an image is known from the tokens between them, but only their embeddings are known, or "
                "the prompt ends in an image; pass input_ids, as the processor made them"
            )
        count = run.between.count(marker)
        if count == 0:
            raise PromptError(
                f"no token {marker} stands in front of an image in prompt {run.row}, though one stands behind it; build the "
                "prompt with the processor of this checkpoint"
            )
        if begins_prompt or count > 1:
            images.append([])
        images[-1].append(run)
    return images


def _tiling(image: list[Run]) -> tuple[int, int]:
    """(vertical, horizontal) arrangement of the tiles in front of the whole image."""
    tiles = image[:-1]
    if not tiles:
        return 1, 1
    marker = image[-1].after
    rows = 1 + sum(tile.between[0] != marker for tile in tiles[1:])
    return rows, len(tiles) // rows
