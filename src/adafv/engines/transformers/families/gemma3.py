"""Gemma 3 (`Gemma3ForConditionalGeneration`): a SigLIP tower, pooled to 256 tokens an image that look at each other.

The projector averages squares of patches (4 x 4 in the released models), so the saliency goes through the projector's
own pooling. In the language model the tokens of one image look at each other both ways, which the stock model works out
from `token_type_ids`; the tokens that stay are still one run of their kind, so these need no more than shortening. Layers
with a sliding window count its width in tokens of the shortened prompt: a pruned prompt lets them look further back.

Pan and scan is off unless the processor is told otherwise. It adds up to four crops to an image, each with markers and
placeholders of its own, and nothing in the inputs says which belong together: for the model, and for `keep`, every crop
is an image.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from adafv.core import ImageLayout
from adafv.engines.transformers.families.base import Encoded, Family, Signals
from adafv.engines.transformers.patches import by_image, pooled
from adafv.engines.transformers.towers import TappedTower, check_tower, with_tower
from adafv.errors import UnsupportedCallError
from adafv.prompts.prompt import Run

READS_TYPES_FROM_THE_BEGINNING = Version(transformers.__version__).release >= (5, 23)
"""Whether `generate` hands over the `token_type_ids` of cached tokens too. They are looked up by place in the sequence;
older releases hand over those of the new tokens alone, which are then taken for the cached ones."""

MIXES_UP_PACKED_IMAGES = Version(transformers.__version__).release >= (5, 23)
"""Whether layers with a sliding window find the tokens of an image by positions, which start again at every packed prompt:
then tokens of one prompt look ahead where an image of another stands."""


class Gemma3(Family):
    name = "Gemma 3"
    model_classes = ("Gemma3ForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values",)
    saliency = "received"
    as_tensor = ("image",)
    looks_ahead = True
    packed_rows = not MIXES_UP_PACKED_IMAGES
    limits = "refuses chunked prefill, and new images behind a static cache"

    def check(self, model: Any) -> None:
        check_tower(model.model.vision_tower, -1, "full")

    def check_call(self, model: Any, inputs: Mapping[str, Any], cache: Any, cached: bool, generates: bool) -> None:
        if not (cached and generates):
            return
        mend = "pass the whole conversation without a cache"
        if not READS_TYPES_FROM_THE_BEGINNING:
            raise UnsupportedCallError(
                "this release of transformers forgets that the tokens of an image look at each other where the image follows "
                f"cached tokens; {mend}, or run: pip install --upgrade transformers"
            )
        if getattr(cache, "is_compileable", False):
            raise UnsupportedCallError(
                "with a static cache, stock transformers forgets that the tokens of an image look at each other where the "
                f"image follows cached tokens; use a DynamicCache, or {mend}"
            )

    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        projector = model.model.multi_modal_projector
        side = int(projector.patches_per_image) // int(projector.kernel_size)
        layout = ImageLayout(torch.arange(side * side), crops=1, rows=side, columns=side)
        return [layout] * len(visuals["pixel_values"])

    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        return {"pixel_values": visuals["pixel_values"][wanted]}

    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        tower = TappedTower(model.model.vision_tower, -1, signals)
        twin = with_tower(model.model, "vision_tower", tower)
        features = twin.get_image_features(visuals["pixel_values"], return_dict=True).pooler_output
        return Encoded(list(features), tower.read(lambda patches: by_image(self.pooled(model, patches), layouts)))

    def pooled(self, model: Any, patches: Tensor) -> Tensor:
        """Values per patch ([all patches, C]) -> per token ([all tokens, C]), averaged as the projector does."""
        projector = model.model.multi_modal_projector
        side = int(projector.patches_per_image)
        return pooled(patches, (side, side), projector.kernel_size)
