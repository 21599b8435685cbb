"""Ovis2 (`Ovis2ForConditionalGeneration`): tiles of one size, each token a mixture of a visual vocabulary's embeddings.

Squares of patches become one token, whose saliency is the mean over them. The whole image comes first, then its tiles row
by row. In the prompt every tile is a run of placeholders; one token stands in front of an image, one between two runs of
it, two behind an image of one tile and one behind any other. So within an image one token stands between two runs, and
between images at least two.

The model reads the embeddings of these marker tokens from the encoded images too, so they are handed over with the kept
tokens. They are rows of a table, which tokens were kept does not matter to them. Chunked prefill loses them.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adafv.core import ImageLayout
from adafv.core.patches import by_image, of_images, of_some_crops, pooled, square_side
from adafv.engines.transformers.families.base import Encoded, Family, Signals
from adafv.engines.transformers.families.internvl import chosen_tiles, images_by_gap
from adafv.engines.transformers.towers import TowerShape, patch_grid, with_tap
from adafv.errors import UnsupportedCallError, UnsupportedModelError
from adafv.prompts.prompt import Run


class Ovis2(Family):
    name = "Ovis2"
    model_classes = ("Ovis2ForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values",)
    saliency = "received"
    tower_shape = TowerShape("transformer.encoder.layers", "attention", has_class_token=False)
    as_tensor = ("image",)
    knows_thumbnail = True
    limits = "refuses chunked prefill, and checkpoints whose visual tokens are drawn at random"

    def check(self, model: Any) -> None:
        if model.config.vision_config.tokenize_function == "gumbel_argmax":
            raise UnsupportedModelError(
                "tokenize_function='gumbel_argmax' draws the visual tokens at random, so no two calls see the same image; "
                "set model.config.vision_config.tokenize_function to 'softmax' or 'st_argmax'"
            )

    def check_generate(self, asked: Callable[[str], Any]) -> None:
        if asked("prefill_chunk_size"):
            raise UnsupportedCallError(
                f"chunked prefill fails in stock transformers with images of {self.name}; leave prefill_chunk_size out"
            )

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        pixels = visuals["pixel_values"]
        grid = patch_grid(model.model.vision_tower, *pixels.shape[-2:])
        side = square_side(grid, model.config.vision_config.hidden_stride)
        counts = [1] * len(pixels)
        if len(runs) == len(pixels) and all(run.length == side * side for run in runs):
            counts = [len(image) for image in images_by_gap(runs)]
        # Else these are not the tiles of this prompt; whoever compares the numbers of tokens finds out.
        return [ImageLayout(torch.arange(count * side * side), count, side, side) for count in counts]

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        return {"pixel_values": of_images(visuals["pixel_values"], [layout.crops for layout in layouts], wanted)}

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        return self._run(model, visuals["pixel_values"], signals, lambda tokens: by_image(tokens, layouts))

    def encode_crops(
        self,
        model: Any,
        visuals: Mapping[str, Any],
        layouts: list[ImageLayout],
        wanted: list[tuple[int, ...]],
        signals: Signals,
    ) -> Encoded:
        images = visuals["pixel_values"].split([layout.crops for layout in layouts])
        return self._run(
            model, chosen_tiles(images, wanted), signals, lambda tokens: of_some_crops(tokens, layouts, wanted)
        )

    def _run(
        self, model: Any, pixels: Tensor, signals: Signals, to_images: Callable[[Tensor], list[Tensor]]
    ) -> Encoded:
        """The stock method on some tiles."""
        stride = model.config.vision_config.hidden_stride
        twin, tap = with_tap(model.model, self.tower_name, self.tower_shape, signals)
        output = twin.get_image_features(pixels, return_dict=True)
        grid = patch_grid(model.model.vision_tower, *pixels.shape[-2:])
        read = tap.read(lambda patches: to_images(pooled(patches, grid, stride)))
        return Encoded(to_images(output.pooler_output.flatten(0, 1)), read)

    def hand_over(
        self, model: Any, modality: str, features: list[Tensor], deepstack: list[Tensor]
    ) -> BaseModelOutputWithPooling:
        tokens = super().hand_over(model, modality, features, deepstack).pooler_output
        base = model.model
        stock = sys.modules[type(base).__module__]
        count = base.visual_vocab_size
        markers = torch.arange(count - base.vision_tower.num_visual_indicator_tokens, count, device=features[0].device)
        return stock.BaseModelOutputWithVisualIndicatorFeatures(  # type: ignore[no-any-return]
            pooler_output=tokens, visual_indicator_features=base.visual_embeddings_table(markers)
        )

    def markers(self, runs: list[Run]) -> list[tuple[int, int, int]]:
        spans = []
        for image in images_by_gap(runs):
            behind = 1 if len(image) > 1 else 2
            last = image[-1].start + image[-1].length
            spans.append((image[0].row, max(image[0].start - 1, 0), last + behind))
        return spans
