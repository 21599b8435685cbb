"""Gemma 4 (`Gemma4ForConditionalGeneration`): images of any size, padded to one length, squares of patches pooled to tokens.

The inputs say where each patch lies (`image_position_ids`), and -1 where a row of patches is padding. The tower averages
squares of patches (3 x 3 in the released models), and so is the saliency. Sound goes its own way, past the pruning. In
the larger models the tokens of an image look at each other both ways in the layers with a sliding window; these models
are refused for now, and so are videos. Windows are counted in tokens of the shortened prompt.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.tokens import Signal
from adafv.engines.transformers.families.base import CallWithImages, Encoded, Family
from adafv.engines.transformers.towers import TowerShape, with_tap
from adafv.errors import UnsupportedCallError, UnsupportedModelError
from adafv.prompts.prompt import Run


class Gemma4(Family):
    name = "Gemma 4"
    model_classes = ("Gemma4ForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values", "image_position_ids")
    saliency = "received"
    tower_shape = TowerShape("encoder.layers", "self_attn", has_class_token=False)
    limits = "refuses videos, prompts as embeddings, and models whose image tokens look at each other both ways"

    def check(self, model: Any) -> None:
        if model.model.vision_tower is None:
            raise UnsupportedModelError("this checkpoint has no vision tower, so there are no visual tokens")
        both_ways = getattr(model.config.get_text_config(), "use_bidirectional_attention", None)
        if both_ways is not None:
            raise UnsupportedModelError(
                f"use_bidirectional_attention={both_ways!r} lets tokens look ahead, which is not supported for {self.name}; "
                "supported are its models without it (E2B, E4B)"
            )

    def check_call(self, model: Any, call: CallWithImages) -> None:
        if call.inputs.get("inputs_embeds") is not None and model.config.get_text_config().hidden_size_per_layer_input:
            raise UnsupportedCallError(
                "this model looks up an input for every layer by the token's number, and stock transformers cannot find it "
                "from the embeddings of a prompt with images; pass input_ids"
            )

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        side = model.config.vision_config.pooling_kernel_size
        sizes = ((positions.amax(0) + 1) // side for positions in visuals["image_position_ids"].cpu())
        grids = [(int(rows), int(columns)) for columns, rows in sizes]
        return [ImageLayout(torch.arange(rows * columns), 1, rows, columns) for rows, columns in grids]

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        return {name: values[wanted] for name, values in visuals.items()}

    def encode(
        self,
        model: Any,
        modality: str,
        visuals: Mapping[str, Any],
        layouts: list[ImageLayout],
        signals: frozenset[Signal],
    ) -> Encoded:
        pixels, positions = visuals["pixel_values"], visuals["image_position_ids"]
        twin, tap = with_tap(model.model, self.tower_name, self.tower_shape, signals)
        output = twin.get_image_features(pixels, positions, return_dict=True)
        side = model.config.vision_config.pooling_kernel_size

        def averaged(patches: Tensor) -> list[Tensor]:
            tokens = []
            for part, places, layout in zip(patches.chunk(len(layouts)), positions, layouts, strict=True):
                column, row = (places // side).to(part.device).unbind(-1)
                shows = column >= 0
                sums = torch.zeros(layout.tokens, part.shape[-1], dtype=torch.float32, device=part.device)
                sums.index_add_(0, (row * layout.columns + column)[shows], part[shows].float())
                tokens.append((sums / side**2).to(part.dtype))
            return tokens

        return Encoded(list(output.pooler_output), tap.read(averaged))

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        config, layout = model.config.vision_config, layouts[0]
        rows, columns = (count * config.pooling_kernel_size for count in (layout.rows, layout.columns))
        side = config.patch_size
        patches = visuals["pixel_values"][0, : rows * columns].view(rows, columns, side, side, -1)
        return patches.permute(4, 0, 2, 1, 3).reshape(1, -1, rows * side, columns * side)
