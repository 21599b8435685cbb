"""Aya Vision (`AyaVisionForConditionalGeneration`): tiles as InternVL has them, from a SigLIP tower without [CLS].

In the prompt every tile is a run of its own behind the name of the tile, and the thumbnail comes last; one token stands
in front of an image and another behind it. Neither is named in the config: the one behind is what follows the last run of
a prompt, and where it stands between two runs, they belong to two images. So the tokens must be known.

Most layers of the language model look back over a sliding window, counted in tokens of the prompt that the model sees: in
a pruned prompt they look further back.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from adafv.engines.transformers.families.internvl import InternVL
from adafv.engines.transformers.families.llava import feature_options
from adafv.errors import UnsupportedCallError
from adafv.prompts.prompt import Run


class AyaVision(InternVL):
    name = "Aya Vision"
    model_classes: ClassVar[tuple[str, ...]] = ("AyaVisionForConditionalGeneration",)
    images: ClassVar[tuple[str, ...]] = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")
    saliency = "received"
    limits = "refuses prompts as embeddings without input_ids"

    def options(self, model: Any, visuals: Mapping[str, Any]) -> dict[str, Any]:
        layer, strategy = feature_options(model, visuals)
        return {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}

    def patches_joined(self, model: Any) -> int:
        return int(model.config.downsample_factor)

    def shuffled(self, model: Any, patches: Tensor) -> Tensor:
        return model.model.multi_modal_projector.pixel_shuffle(patches)  # type: ignore[no-any-return]

    def runs_of_images(self, runs: list[Run]) -> list[list[Run]]:
        ends = {run.row: run.after for run in runs}  # of the last run in each prompt
        images: list[list[Run]] = []
        for number, run in enumerate(runs):
            if ends[run.row] < 0:
                raise UnsupportedCallError(
                    "which tiles make an image is known from the tokens between them, but only their embeddings are known, "
                    "or the prompt ends in an image; pass input_ids, as the processor made them"
                )
            begins_prompt = number == 0 or runs[number - 1].row != run.row
            if begins_prompt or ends[run.row] in run.between:
                images.append([])
            images[-1].append(run)
        return images

    def markers(self, runs: list[Run]) -> list[tuple[int, int, int]]:
        spans = []
        for image in self.runs_of_images(runs):
            name = len(image[1].between) if len(image) > 1 else 1  # tokens that name a tile
            first, last = image[0].start - 1 - name, image[-1].start + image[-1].length
            spans.append((image[0].row, max(first, 0), last + 1))
        return spans
