"""What one run did, for whoever wants to look."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.stages import stage as entered
from adafv.core.tokens import Kept

if TYPE_CHECKING:
    from adafv.engines.transformers.call import Call


@dataclass
class ImageRecord:
    """What was done to one image (or video, or frame with a budget of its own). Read off the device when it is looked at."""

    number: int
    """Which of the call's images it is."""
    modality: str
    """"image" or "video"."""
    prompt: int
    """The prompt of the batch that it stands in."""
    frame: int | None
    """With a budget per frame: which frame of its video; else None."""
    method: str
    """The method that chose: another than the one asked for where that needs text and no word of the prompt counts."""
    layout: ImageLayout
    """Where each token of the image comes from, as the stock model would place them."""
    tokens_before: int
    """N, visual tokens."""
    tokens_after: int
    """K, visual tokens."""
    columns: Tensor = field(repr=False)
    """[N] long on the host: the columns of its placeholders in the prompt as given."""
    fed: ImageLayout = field(repr=False)
    """The layout in which the method saw them."""
    selected: Kept | None = field(repr=False)
    """Of all images that were chosen with it; None where all of it stayed."""
    scores: Tensor | None = field(repr=False)
    """[G, N] float32, saliency of those."""
    place: int = field(repr=False)
    """Which of those it is."""
    remembered: bool = False
    """Whether it did not go through the tower, as the store of `remember=` knew it, or as it stands in the call twice."""
    crops: tuple[int, ...] | None = None
    """The crops that went through the tower, the thumbnail (0) first, where not all did. Tokens of others could not stay,
    and their scores are NaN. None: all."""
    layers: dict[int, Tensor] | None = None
    """Of methods that act inside the language model: decoder layer -> [K] long, the tokens that stay from it on. `kept` are
    those of the last one. None for other methods."""

    @property
    def _restated(self) -> bool:
        return self.fed is not self.layout

    @cached_property
    def _indices(self) -> Tensor:
        if self.selected is None:
            return torch.arange(self.tokens_before)
        return self.selected.indices[self.place]

    @cached_property
    def kept(self) -> Tensor:
        """[K] long, ascending: indices into the image's own tokens as the stock model would place them. Merged tokens: the
        token in whose place they stand. In the published variant, tokens may repeat, and -1 is a patch that the stock model
        cuts off as padding."""
        if not self._restated:
            return self._indices
        return _restate(torch.arange(self.tokens_before), self.layout, self.fed, -1)[self._indices.cpu()]

    @property
    def merged(self) -> bool:
        """Whether the kept tokens are mixes; see `weights`."""
        return self.selected is not None and self.selected.weights is not None

    @property
    def weights(self) -> Tensor | None:
        """[K, N], of which tokens each kept one is a mix; None where they are tokens as they are."""
        return None if self.selected is None or self.selected.weights is None else self.selected.weights[self.place]

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.fed.place(self._indices)

    @property
    def crop(self) -> Tensor:
        """[K] long: crop (frame of a video) that the kept token shows, -1 where it shows none (newlines)."""
        return self._places[0]

    @property
    def row(self) -> Tensor:
        """[K] long: row inside the crop."""
        return self._places[1]

    @property
    def column(self) -> Tensor:
        """[K] long: column inside the crop."""
        return self._places[2]

    @cached_property
    def saliency(self) -> Tensor | None:
        """[N] float32 of each token; None where the method did not ask. NaN where no patch is shown."""
        return self._shown(self.scores)

    @cached_property
    def text_attention(self) -> Tensor | None:
        """[N] float32, text-to-image attention of each token; None where the method did not compute it."""
        return self._shown(None if self.selected is None else self.selected.text_attention)

    @cached_property
    def objective(self) -> float | None:
        """Geometric mean of the kept set; None for methods that do not maximise it, and where everything was kept."""
        return self._number(None if self.selected is None else self.selected.objective)

    @cached_property
    def certificate(self) -> float | None:
        """c: no set of K tokens has an objective above objective / (1 - c); None where that is unknown."""
        return self._number(None if self.selected is None else self.selected.certificate)

    def _number(self, values: Tensor | None) -> float | None:
        return None if values is None else float(values[self.place])

    def _shown(self, values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        shown = self.fed.shows_patch.to(values.device)
        scores = values[self.place].masked_fill(~shown, float("nan"))
        return _restate(scores, self.fed, self.layout, float("nan")) if self._restated else scores


@dataclass
class Record:
    """One run. `images` says what was done to each image; the lists beside it are the same, one entry per image each."""

    images: list[ImageRecord]
    """In the prompts' order."""
    prompt_length_before: int
    prompt_length_after: int
    """As the language model saw it; its last layer, where tokens go inside it."""
    columns: Tensor = field(repr=False)
    """[batch, length after] long: the column of the conversation that each column was; -1 for padding."""
    given: int = field(repr=False)
    """Columns that the call gave, the last ones of the conversation."""
    config: Any = field(repr=False)
    """Of the language model; what a cache holds is counted when somebody asks: it takes milliseconds."""
    element: int = field(repr=False)
    """Bytes of a number in the cache."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage: "tower" (with the projector), "selection", "compaction", "model" (the call of the stock
    model). On an accelerator work is queued, so without synchronising it is the time to queue it."""
    certainty: list[float] | None = None
    """With crops="auto": per prompt, the probability of the first token of its answer where the thumbnail alone was seen."""
    layer_lengths: list[int] | None = None
    """Of methods that act inside the language model: columns of the prompt that each decoder layer saw, and its cache holds.
    None for other methods: every layer sees `prompt_length_after`."""

    @cached_property
    def kv_bytes_before(self) -> int:
        """Bytes of keys and values for the prompts of the batch, as given."""
        return len(self.columns) * kv_bytes(self.config, self.element, self.prompt_length_before)

    @cached_property
    def kv_bytes_after(self) -> int:
        """... and as the language model saw them."""
        if self.layer_lengths is None:
            return len(self.columns) * kv_bytes(self.config, self.element, self.prompt_length_after)
        return kv_bytes(self.config, self.element, 1) * sum(self.layer_lengths) // len(self.layer_lengths)

    @cached_property
    def keep_mask(self) -> Tensor:
        """[batch, length] bool over the prompt as given: True where the token stayed. Of padding it says nothing."""
        whole, columns = self.prompt_length_before, self.columns
        mask = torch.zeros(len(columns), whole + 1, dtype=torch.bool, device=columns.device)
        mask = mask.scatter(1, columns.where(columns >= 0, whole), True)[:, :-1]
        for image in self.images:
            if image.selected is not None:  # its tokens may stand in other places than they come from
                stays = torch.zeros(image.tokens_before, dtype=torch.bool)
                kept = image.kept.cpu()
                stays[kept[kept >= 0]] = True
                mask[image.prompt, image.columns.to(mask.device)] = stays.to(mask.device)
        return mask[:, whole - self.given :]

    @property
    def kept(self) -> list[Tensor]:
        """Of every image; see `ImageRecord.kept`."""
        return [image.kept for image in self.images]

    @property
    def modalities(self) -> list[str]:
        """Of every image; see `ImageRecord.modality`."""
        return [image.modality for image in self.images]

    @property
    def frames(self) -> list[int | None]:
        """Of every image; see `ImageRecord.frame`."""
        return [image.frame for image in self.images]

    @property
    def layouts(self) -> list[ImageLayout]:
        """Of every image; see `ImageRecord.layout`."""
        return [image.layout for image in self.images]

    @property
    def crop(self) -> list[Tensor]:
        """Of every image; see `ImageRecord.crop`."""
        return [image.crop for image in self.images]

    @property
    def row(self) -> list[Tensor]:
        """Of every image; see `ImageRecord.row`."""
        return [image.row for image in self.images]

    @property
    def column(self) -> list[Tensor]:
        """Of every image; see `ImageRecord.column`."""
        return [image.column for image in self.images]

    @property
    def saliency(self) -> list[Tensor | None]:
        """Of every image; see `ImageRecord.saliency`."""
        return [image.saliency for image in self.images]

    @property
    def text_attention(self) -> list[Tensor | None]:
        """Of every image; see `ImageRecord.text_attention`."""
        return [image.text_attention for image in self.images]

    @property
    def objective(self) -> list[float | None]:
        """Of every image; see `ImageRecord.objective`."""
        return [image.objective for image in self.images]

    @property
    def certificate(self) -> list[float | None]:
        """Of every image; see `ImageRecord.certificate`."""
        return [image.certificate for image in self.images]

    @property
    def tokens_before(self) -> list[int]:
        """Of every image; see `ImageRecord.tokens_before`."""
        return [image.tokens_before for image in self.images]

    @property
    def tokens_after(self) -> list[int]:
        """Of every image; see `ImageRecord.tokens_after`."""
        return [image.tokens_after for image in self.images]

    @property
    def rows(self) -> list[int]:
        """Of every image; see `ImageRecord.prompt`."""
        return [image.prompt for image in self.images]

    @property
    def remembered(self) -> list[bool]:
        """Of every image; see `ImageRecord.remembered`."""
        return [image.remembered for image in self.images]

    @property
    def methods(self) -> list[str]:
        """Of every image; see `ImageRecord.method`."""
        return [image.method for image in self.images]


def record_of(call: "Call", seconds: dict[str, float]) -> Record:
    """What was done in a call. Nothing is read off the device before somebody looks."""
    columns, whole = call.inputs.compaction.columns, call.inputs.compaction.length
    first_new = whole - call.prompt.length
    images = []
    for number, job in enumerate(call.jobs):
        image, chosen = job.image, job.selected
        images.append(
            ImageRecord(
                number=number,
                modality=image.modality,
                prompt=image.row,
                frame=image.frame,
                method=job.method.name,
                layout=image.layout,
                tokens_before=image.layout.tokens,
                tokens_after=job.keep,
                columns=image.columns + first_new if first_new else image.columns,
                fed=job.layout,
                selected=None if chosen is None else chosen.kept,
                scores=None if chosen is None else chosen.saliency,
                place=job.place,
                remembered=(image.modality, image.number) in call.remembered,
                crops=job.crops,
            )
        )
    return Record(
        images=images,
        prompt_length_before=whole,
        prompt_length_after=columns.shape[1],
        columns=columns,
        given=call.given.length,
        config=call.model.config.get_text_config(),
        element=call.model.get_input_embeddings().weight.element_size(),
        seconds=seconds,
    )


def _restate(values: Tensor, own: ImageLayout, other: ImageLayout, missing: Any) -> Tensor:
    """Values per token of `own` ([N]), in the order of the tokens of `other`; `missing` where `own` lacks the patch."""
    by_patch = torch.full((own.crops * own.rows * own.columns,), missing, dtype=values.dtype, device=values.device)
    shows = own.shows_patch.to(values.device)
    by_patch = by_patch.scatter(0, own.source.to(values.device)[shows], values[shows])
    source = other.source.to(values.device)
    return by_patch[source.clamp_min(0)].masked_fill(source < 0, missing)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the block to `seconds[stage]`; see also `adafv.core.stages`."""
    start = time.perf_counter()
    try:
        with entered(stage):
            yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def kv_bytes(config: Any, element: int, tokens: int) -> int:
    """Bytes of keys and values that a prompt of so many tokens leaves in the cache, all layers together.

    Args:
        config: of the language model.
        element: bytes of a number.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    # A layer with a sliding window keeps what the next token may look at besides itself.
    window = (getattr(config, "sliding_window", None) or tokens + 1) - 1
    return element * sum(
        _numbers_kept(config, layer) * (min(tokens, window) if kinds[layer] == "sliding_attention" else tokens)
        for layer in _layers_that_keep(config, len(kinds))
    )


def _layers_that_keep(config: Any, layers: int) -> list[int]:
    """Those that do not read the keys and values of another layer."""
    sharing = getattr(config, "kv_sharing_modes", None)
    if sharing:
        return [layer for layer in range(layers) if not str(sharing[layer]).startswith("reuse")]
    return list(range(layers - (getattr(config, "num_kv_shared_layers", None) or 0)))


def _numbers_kept(config: Any, layer: int) -> int:
    """Of the keys and values of one token, in one layer."""
    rotates = getattr(config, "no_rope_layers", None)  # 1 where it does, whatever the name says
    config = config.per_layer_config[layer]
    latent = getattr(config, "kv_lora_rank", None)
    if latent:  # DeepSeek-V3 keeps one latent for all heads, and one rotated key
        return int(latent + (config.qk_rope_head_dim if not rotates or rotates[layer] else 0))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * heads * head_size)
