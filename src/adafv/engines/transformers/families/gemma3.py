"""Gemma 3 (`Gemma3ForConditionalGeneration`): a SigLIP tower, pooled to 256 tokens an image that look at each other.

The projector averages squares of patches (4 x 4 in the released models), so the saliency goes through the projector's
own pooling. In the language model the tokens of one image look at each other both ways, which the stock model works out
from `token_type_ids`; the tokens that stay are still one run of their kind, so these need no more than shortening. Layers
with a sliding window count its width in tokens of the shortened prompt: a pruned prompt lets them look further back.

Pan and scan is off unless the processor is told otherwise. It adds up to four crops to an image, each with markers and
placeholders of its own, and nothing in the inputs says which belong together: for the model, and for `keep`, every crop
is an image.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.patches import by_image, pooled
from adafv.engines.transformers.families.base import CallWithImages, Encoded, Family, Signals
from adafv.engines.transformers.releases import MIXES_UP_PACKED_IMAGES, READS_TYPES_FROM_THE_BEGINNING
from adafv.engines.transformers.towers import TappedTower, check_tower, with_tower
from adafv.errors import UnsupportedCallError
from adafv.prompts.prompt import Run


class Gemma3(Family):
    name = "Gemma 3"
    model_classes = ("Gemma3ForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values",)
    saliency = "received"
    as_tensor = ("image",)
    limits = "refuses chunked prefill, and new images behind a static cache"

    packed_apart: ClassVar[bool] = not MIXES_UP_PACKED_IMAGES
    """Whether the stock model keeps prompts packed into one row apart."""

    def check(self, model: Any) -> None:
        check_tower(model.model.vision_tower, -1, "full")

    def check_generate(self, asked: Callable[[str], Any]) -> None:
        if asked("prefill_chunk_size"):
            raise UnsupportedCallError(
                f"chunked prefill cuts apart images whose tokens look at each other, as those of {self.name} do, so that "
                "the answer is another one, pruned or not; leave prefill_chunk_size out"
            )

    def check_packed(self, call: CallWithImages) -> None:
        """Raise UnsupportedCallError where this release lets prompts in one row look at each other's images."""
        if call.packed and not self.packed_apart:
            raise UnsupportedCallError(
                f"this release of transformers mixes up prompts packed into one row with {self.name}; give one prompt per "
                "row"
            )

    def since_the_cache_began(self, name: str, values: Tensor, cached: int) -> Tensor:
        # Which tokens of an image look at each other is looked up by place in the whole sequence.
        return torch.nn.functional.pad(values, (cached, 0)) if name == "token_type_ids" else values

    def check_call(self, model: Any, call: CallWithImages) -> None:
        self.check_packed(call)
        if not (call.cached and call.generates):
            return
        mend = "pass the whole conversation without a cache"
        if not READS_TYPES_FROM_THE_BEGINNING:
            raise UnsupportedCallError(
                "this release of transformers forgets that the tokens of an image look at each other where the image follows "
                f"cached tokens; {mend}, or run: pip install --upgrade transformers"
            )
        if getattr(call.cache, "is_compileable", False):
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
