"""What is image and what is text in a prompt: rows of tokens, one column per token, read on the host."""

from collections.abc import Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adafv.core import ImageLayout
from adafv.errors import PromptError


@dataclass(frozen=True)
class Run:
    """A run of neighbouring placeholders in a prompt; the only trace that some families leave of their tiles."""

    row: int
    """Prompt of the batch."""
    start: int
    """Column of its first placeholder."""
    length: int
    before: int
    """Token in front of it, -1 where there is none or only its embedding is known."""
    between: tuple[int, ...] = ()
    """All tokens between the run in front of it in its prompt, or the prompt's first token, and it."""
    after: int = -1
    """Token behind it, -1 as in `before`."""


@dataclass(frozen=True)
class Prompt:
    """Host copy of a prompt."""

    tokens: Tensor
    """[B, S] long; -1 where only an embedding is known."""
    attended: Tensor
    """[B, S] bool."""
    placeholders: dict[str, Tensor]
    """Per modality [B, S] bool, placeholders of visual tokens."""
    turn_ends: Tensor
    """[B, S] bool, tokens that end a turn (end-of-sequence tokens of the model)."""
    special: Tensor
    """[B, S] bool, begin, end and padding tokens, and what stands around images."""
    segments: Tensor | None = None
    """[B, S] long, which of the prompts packed into its row a column belongs to; None: every row is one prompt."""

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @cached_property
    def is_visual(self) -> Tensor:
        """[B, S] bool, placeholders of whatever modality."""
        marks = list(self.placeholders.values())
        return marks[0] if len(marks) == 1 else torch.stack(marks).any(0)

    @cached_property
    def arrays(self) -> "PromptArrays":
        """The same memory for NumPy: what is read bit by bit on the host costs a tenth there."""
        return PromptArrays(
            self.tokens.numpy(),
            self.attended.numpy(),
            self.is_visual.numpy(),
            self.turn_ends.numpy(),
            self.special.numpy(),
            None if self.segments is None else self.segments.numpy(),
        )

    def after(self, column: int) -> "Prompt":
        """The columns from `column` on."""
        marks = {modality: mark[:, column:] for modality, mark in self.placeholders.items()}
        tokens, attended, ends, special = (
            part[:, column:] for part in (self.tokens, self.attended, self.turn_ends, self.special)
        )
        segments = None if self.segments is None else self.segments[:, column:]
        return Prompt(tokens, attended, marks, ends, special, segments)

    def runs(self, modality: str) -> list[Run]:
        """The runs of neighbouring placeholders of one modality, in reading order."""
        found = []
        for row, mark in enumerate(self.placeholders[modality].numpy()):
            edges = np.flatnonzero(np.diff(mark, prepend=False, append=False)).tolist()
            starts, stops = edges[::2], edges[1::2]
            tokens = self.arrays.tokens[row].tolist() if starts else []
            for start, stop, last in zip(starts, stops, [0, *stops], strict=False):
                before = tokens[start - 1] if start else -1
                after = tokens[stop] if stop < len(tokens) else -1
                found.append(Run(row, start, stop - start, before, tuple(tokens[last:start]), after))
        return found


class PromptArrays(NamedTuple):
    """A prompt's tensors as arrays; see `Prompt`."""

    tokens: NDArray[np.int64]
    attended: NDArray[np.bool_]
    is_visual: NDArray[np.bool_]
    turn_ends: NDArray[np.bool_]
    special: NDArray[np.bool_]
    segments: NDArray[np.int64] | None

    def segment_of(self, row: int, column: int) -> NDArray[np.bool_]:
        """[S], the columns of the prompt that a column of a row belongs to."""
        if self.segments is None:
            return np.ones(self.tokens.shape[1], dtype=bool)
        return self.segments[row] == self.segments[row, column]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PlacedImage:
    """An image, a video or a frame of one in a prompt."""

    modality: str
    number: int
    """Which of the encoded images (or videos) it is, or is part of."""
    row: int
    columns: Tensor
    """[N] long, the columns of its placeholders, ascending."""
    layout: ImageLayout
    frame: int | None = None
    """Which frame of a video it is; None for an image, or a whole video."""
    part: Tensor | None = None
    """[N] long, which of the video's tokens are the frame's."""
    video: tuple[int, int] | None = None
    """First and last column of the video that it is a frame of."""

    @cached_property
    def first(self) -> int:
        """The column of its first placeholder."""
        return int(self.columns.numpy()[0])

    @cached_property
    def span(self) -> tuple[int, int]:
        """First and last column of the image, or of the whole video; what is between them is nobody's words."""
        return (self.first, int(self.columns.numpy()[-1])) if self.video is None else self.video


def special_tokens(config: Any, generation_config: Any, placeholders: set[int]) -> tuple[set[int], set[int]]:
    """(tokens that end a turn, all tokens that are nobody's words) by a model's configs, without `placeholders`.

    Nobody's words are begin, end and padding tokens, and those that models put around images: every config entry whose
    name says that it holds a token's id.
    """
    ends, others = set(), set()
    for each in (generation_config, config, config.get_text_config()):
        ends |= _ids(getattr(each, "eos_token_id", None))
        others |= _ids(getattr(each, "bos_token_id", None)) | _ids(getattr(each, "pad_token_id", None))
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")):
            others |= _ids(value)
    return ends - placeholders, (ends | others) - placeholders


def any_of(tokens: Tensor, ids: Set[int]) -> Tensor:
    """Which of the tokens are one of `ids`: bool, as `tokens` are shaped."""
    return torch.isin(tokens, torch.tensor(sorted(ids), dtype=torch.long))


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return {token for token in values if isinstance(token, int) and token >= 0}


def place_images(modality: str, placeholders: Tensor, layouts: list[ImageLayout]) -> list[PlacedImage]:
    """Assign the placeholders ([B, S] bool) to the images (or videos), in reading order.

    Raises:
        PromptError: the placeholders are not exactly those of the images.
    """
    mend = "build the prompt with the processor of this checkpoint, and do not truncate it"
    rows, columns = placeholders.numpy().nonzero()
    counts = [layout.tokens for layout in layouts]
    if len(rows) != sum(counts):
        raise PromptError(
            f"the prompt has {len(rows)} {modality} placeholders, but its {len(layouts)} {modality}(s) make "
            f"{sum(counts)} visual tokens; {mend}"
        )
    placed = []
    ends = np.cumsum(counts).tolist()
    parts = torch.from_numpy(columns).split(counts)
    for number, (layout, end, part) in enumerate(zip(layouts, ends, parts, strict=True)):
        row = int(rows[end - layout.tokens])
        if row != rows[end - 1]:
            raise PromptError(
                f"the placeholders of {modality} {number} are spread over two prompts of the batch; {mend}"
            )
        if modality == "video":
            layout = replace(layout, frames=True)
        placed.append(PlacedImage(modality, number, row, part, layout))
    return placed


def frames_of(video: PlacedImage) -> list[PlacedImage]:
    """One entry per frame of a video.

    A token that shows no patch belongs to the frame in front of it, as a newline does; in a layout that begins with one,
    to the frame behind it, as a frame's [CLS] does.
    """
    layout = video.layout
    frame = layout.source // (layout.rows * layout.columns)
    if layout.shows_patch[0]:
        frame = frame.where(layout.shows_patch, -1).cummax(0).values
    else:
        frame = frame.where(layout.shows_patch, layout.crops - 1).flip(0).cummin(0).values.flip(0)
    frames = []
    for number in range(layout.crops):
        part = (frame == number).nonzero().flatten()
        source = layout.source[part]
        source = source.where(source < 0, source - number * layout.rows * layout.columns)
        own = ImageLayout(source, crops=1, rows=layout.rows, columns=layout.columns)
        columns = video.columns[part]
        frames.append(PlacedImage("video", video.number, video.row, columns, own, number, part, video.span))
    return frames
