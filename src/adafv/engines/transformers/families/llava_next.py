"""LLaVA-NeXT (`LlavaNextForConditionalGeneration`): a thumbnail and several crops per image ("anyres").

The stock model joins the crops into one raster, cuts off the padding, and ends every row with a newline token. Where
each patch ends up is found by sending patch numbers instead of features through the model's own `pack_image_features`,
so the layout is right by construction, for every image size.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.patches import by_crops, crops_in_a_row, of_images, of_some_crops
from adafv.engines.transformers.families.base import Encoded, Signals, in_order
from adafv.engines.transformers.families.llava import Llava
from adafv.engines.transformers.releases import of_stock
from adafv.engines.transformers.towers import TappedTower, patch_grid, scale_down, with_tower
from adafv.errors import UnsupportedModelError
from adafv.prompts.prompt import Run


class LlavaNext(Llava):
    name = "LLaVA-NeXT"
    model_classes = ("LlavaNextForConditionalGeneration",)
    arranges = True
    chooses_crops = True

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        pixel_values, sizes = visuals["pixel_values"], torch.as_tensor(visuals["image_sizes"])
        if pixel_values.dim() == 4:  # the crops of all images in one row
            crops = of_images(pixel_values, [layout.crops for layout in layouts], wanted)
            return {**visuals, "pixel_values": crops, "image_sizes": sizes[wanted]}
        return {**visuals, "pixel_values": pixel_values[wanted], "image_sizes": sizes[wanted]}

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        sizes = [tuple(size) for size in _sizes(visuals)]
        known = {size: self._layout(model, visuals, size) for size in set(sizes)}  # once per size
        return [known[size] for size in sizes]

    def _layout(self, model: Any, visuals: Mapping[str, Any], size: tuple[int, ...]) -> ImageLayout:
        side = model.config.vision_config.image_size
        tiling, crops = (
            of_stock("llava_next.modeling_llava_next", name)(size, model.config.image_grid_pinpoints, side)
            for name in ("get_anyres_image_grid_shape", "image_size_to_num_patches")
        )
        rows, columns = patch_grid(model.model.vision_tower, *visuals["pixel_values"].shape[-2:])
        numbers = torch.arange(crops * rows * columns).view(crops, rows * columns)
        return ImageLayout(self._packed(model, numbers, size), crops, rows, columns, tiling)

    @staticmethod
    def _packed(model: Any, numbers: Tensor, size: tuple[int, ...]) -> Tensor:
        packed, _ = model.model.pack_image_features(
            [numbers.unsqueeze(-1).double()],
            torch.tensor([size]),
            vision_feature_select_strategy="default",
            image_newline=torch.tensor([-1.0], dtype=torch.double),
        )
        return packed[0].squeeze(-1).long()

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        layers, reading = self.reads(model, visuals)
        newline = newline_of(model)
        tower = TappedTower(model.model.vision_tower, layers, signals)
        twin = with_tower(model.model, "vision_tower", tower)
        # The stock method, stopped short of packing: where the tokens go is what the layouts say.
        crops: list[Tensor] = []

        def keep_unpacked(features: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
            crops.extend(features)
            return features, None

        twin.__dict__["pack_image_features"] = keep_unpacked
        twin.get_image_features(visuals["pixel_values"], visuals["image_sizes"], return_dict=True, **reading)

        def packed(parts: list[Tensor], filler: Tensor | None = None) -> list[Tensor]:
            return [in_order(part.flatten(0, 1), layout, filler) for part, layout in zip(parts, layouts, strict=True)]

        return Encoded(packed(crops, newline), tower.read(lambda patches: packed(by_crops(patches, layouts))))

    def encode_crops(
        self: Llava,
        model: Any,
        visuals: Mapping[str, Any],
        layouts: list[ImageLayout],
        wanted: list[tuple[int, ...]],
        signals: Signals,
    ) -> Encoded:
        """Of models whose projector makes a token of each patch: LLaVA-OneVision's, too.

        As the stock `get_image_features`, which counts crops by the sizes of images, and so cannot leave any out.
        """
        layers, reading = self.reads(model, visuals)
        tower = TappedTower(model.model.vision_tower, layers, signals)
        states = tower(some_crops(visuals["pixel_values"], layouts, wanted)).hidden_states
        assert states is not None
        read = torch.cat([states[index] for index in ([layers] if isinstance(layers, int) else layers)], dim=-1)
        if reading["vision_feature_select_strategy"] == "default":
            read = read[:, 1:]
        features = model.model.multi_modal_projector(read).flatten(0, 1)

        def placed(patches: Tensor) -> list[Tensor]:
            return of_some_crops(patches, layouts, wanted)

        return Encoded(placed(features), tower.read(placed))

    def encode_smaller(
        self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout], grid: tuple[int, int]
    ) -> list[Tensor]:
        """Of the thumbnail, which is the image at low resolution already."""
        layers, _ = self.reads(model, visuals)
        pixels = scale_down(_thumbnails(visuals, layouts), model.model.vision_tower, grid)
        states = TappedTower(model.model.vision_tower, layers, ())(pixels, interpolate_pos_encoding=True).hidden_states
        assert states is not None
        read = [states[index][:, 1:] for index in ([layers] if isinstance(layers, int) else layers)]
        return list(model.model.multi_modal_projector(torch.cat(read, dim=-1)))


def some_crops(pixel_values: Tensor, layouts: list[ImageLayout], wanted: list[tuple[int, ...]]) -> Tensor:
    """[crops, 3, H, W]: of each image those that are wanted, image by image.

    Args:
        pixel_values: [images, most crops, 3, H, W], or the crops of all images in one row.
    """
    images: Iterable[Tensor] = pixel_values
    if pixel_values.dim() == 4:
        images = pixel_values.split([layout.crops for layout in layouts])
    return crops_in_a_row(images, wanted)


def newline_of(model: Any) -> Tensor:
    """[D] embedding that ends a row of patches."""
    newline: Tensor = model.model.image_newline
    if newline.is_meta:
        raise UnsupportedModelError(
            f"image_newline of {type(model).__name__} is offloaded, where the stock model cannot read it either; in "
            "device_map keep the base model itself on a device, and offload its language model or tower"
        )
    return newline


def _thumbnails(visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
    pixel_values = visuals["pixel_values"]
    if pixel_values.dim() == 5:
        return pixel_values[:, 0]
    return torch.stack([crops[0] for crops in pixel_values.split([layout.crops for layout in layouts])])


def _sizes(visuals: Mapping[str, Any]) -> list[list[int]]:
    """(height, width) of every image; a list on the host, as the stock model makes it."""
    return torch.as_tensor(visuals["image_sizes"]).tolist()
