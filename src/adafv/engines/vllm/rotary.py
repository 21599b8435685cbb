"""Positions in time, height and width (M-RoPE): a kept token stays at the row and column that it had in the whole image.

vLLM gives a prompt its positions before the tower runs, when nobody knows yet which tokens are kept. But only their rows
and columns are missing then: where an image begins, and where the text behind it goes on, follow from the image's size.
So the embeddings of kept tokens carry row and column along, as a few more channels. They come off again where the
embeddings of a step are put together (`embed_input_ids`), and are added to the step's positions where the language model
runs on them (`forward`), which vLLM calls one after the other. The channels are in vLLM's encoder cache with the
embeddings: whatever chunk of whatever request reads a token finds them.

vLLM has an interface for models that prune (`SupportsMultiModalPruning`), made for its pruning of videos. It is not used:
its runner for CPUs never calls it, and its own correction holds for whole images alone (it takes the first token of an
image for its corner, and the larger of the last token's row and column for its size).
"""

from typing import Any

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.engines.vllm.model import refuse_options
from adafv.errors import UnsupportedModelError

BASE = 256
"""Whole numbers below this are exact in every type that a model may have, bfloat16 included."""

CHANNELS = 4
"""Row and column, as two digits each: enough for images of 65,536 x 65,536 tokens."""

ROTATIONS = 4
"""vLLM's table of rotations has so many times `max_position_embeddings` entries, in a model that prunes."""


def place_channels(layout: ImageLayout, kept: Tensor) -> Tensor:
    """Row and column of the tokens at `kept` ([K] long) -> [K, CHANNELS] long, less than BASE each."""
    _, rows, columns = layout.place(kept)
    places = torch.stack((rows, columns), dim=1)
    return torch.cat((places // BASE, places % BASE), dim=1)


def places_from(channels: Tensor) -> Tensor:
    """The inverse of `place_channels`, from whatever type the embeddings have: -> [2, K] long, row and column."""
    high, low = channels.long().T.split(2)
    return high * BASE + low


class RotaryPositions:
    """Between `PrunedModel` and vLLM's model class: positions of prompts whose images have lost tokens."""

    config: Any
    adafv_places: Tensor
    """[2, tokens of a step] long, row and column of the kept tokens in their columns; zero, but from the time when a step's
    embeddings are put together to the time when they are read."""
    adafv_positions: Tensor
    """[3, tokens of a step + 1] long. At one place in memory, as CUDA graphs read them there; of one more column than is
    read, so that its slices look to torch.compile as those of vLLM's own positions do."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_positions(vllm_config)
        # A model that prunes has positions beyond its number of tokens, for which vLLM then prepares rotations.
        multimodal = vllm_config.model_config.multimodal_config
        multimodal.video_pruning_rate = 0.5
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        finally:
            multimodal.video_pruning_rate = None
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        for name, shape in (("adafv_places", (2, tokens + 1)), ("adafv_positions", (3, tokens + 1))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.long), persistent=False)  # type: ignore[attr-defined]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions before the tower runs: all but the rows and columns of the kept tokens.

        Args:
            input_tokens: of the prompt, S with the placeholders that stay.
            mm_features: the images, where they are among them, and their sizes.

        Returns:
            [3, S] long, and what the position of a token behind the prompt is more than its number.
        """
        merge = self.config.vision_config.spatial_merge_size
        positions = torch.empty(len(input_tokens), dtype=torch.long)
        column, position = 0, 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            start, kept = feature.mm_position.offset, feature.mm_position.length
            position = _count_up(positions[column:start], position)
            positions[start : start + kept] = position
            _, rows, columns = feature.data["image_grid_thw"].data.tolist()
            column, position = start + kept, position + max(rows, columns) // merge
        position = _count_up(positions[column:], position)
        return positions.repeat(3, 1), position - len(input_tokens)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None, **kwargs: Any
    ) -> Tensor:
        """Embeddings of a step. Those of kept tokens come with CHANNELS more channels, in the order of `is_multimodal`."""
        if multimodal_embeddings is not None and len(multimodal_embeddings) > 0:
            places = torch.cat([places_from(each[:, -CHANNELS:]) for each in multimodal_embeddings], dim=1)
            columns = is_multimodal.nonzero().squeeze(1).to(places.device)
            self.adafv_places.zero_().index_copy_(1, columns, places)
            multimodal_embeddings = [each[:, :-CHANNELS] for each in multimodal_embeddings]
        return super().embed_input_ids(  # type: ignore[misc,no-any-return]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal, **kwargs
        )

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's model, with the kept tokens of the step in their places. `positions` is [3, tokens], and not changed."""
        tokens = positions.shape[1]
        corrected, places = self.adafv_positions[:, :tokens], self.adafv_places[:, :tokens]
        corrected.copy_(positions)
        corrected[1:] += places
        places.zero_()
        return super().forward(input_ids, corrected, *args, **kwargs)  # type: ignore[misc]


def check_positions(vllm_config: Any) -> None:
    """Raise UnsupportedModelError where positions would not get their corrections."""
    parallel = vllm_config.parallel_config
    options = {
        "--pipeline-parallel-size above 1": parallel.pipeline_parallel_size > 1,
        "--prefill-context-parallel-size above 1": parallel.prefill_context_parallel_size > 1,
        "--enable-dbo": parallel.use_ubatching,
    }
    refuse_options(options, "with pruned images in a model with positions in height and width")
    if not vllm_config.model_config.uses_mrope:
        raise UnsupportedModelError(
            "the checkpoint has no positions in height and width (mrope_section), as its class has"
        )


def _count_up(positions: Tensor, first: int) -> int:
    """Number the positions of text from `first` on; the next free one."""
    after = first + len(positions)
    positions.copy_(torch.arange(first, after))
    return after
