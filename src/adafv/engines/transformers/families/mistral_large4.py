"""Mistral Large 4 (`MistralLarge4ForConditionalGeneration`): Mistral 3's tower and patch merger, sparse attention behind it.

The layers of the language model attend only to the keys that an indexer scores highest, 2048 in the released model. A
masked key is scored minus infinity, so a dropped token and a masked one are the same here too; and a pruned prompt that
is no longer than that is attended to in full. Queries grow with their position, so the answer depends on where a prompt
begins: `generate` begins at zero, but `forward` counts padding on the left unless it is given position_ids.
"""

from typing import ClassVar

from adafv.engines.transformers.families.mistral3 import Mistral3


class MistralLarge4(Mistral3):
    name = "Mistral Large 4"
    model_classes = ("MistralLarge4ForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
