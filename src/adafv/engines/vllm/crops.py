"""In vLLM's worker: images whose crops are chosen, the thumbnails first, and of the other crops those that they ask for.

What is chosen, and by what, is `adafv.core.crops`, as in transformers. Two things differ. Each image is decided on by itself,
whatever it was scheduled with. And the cache knows every crop by itself: a question that asks for another crop of a picture
finds there what others have had encoded, and never takes a part for the whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from adafv.core.budget import Budget
from adafv.core.crops import (
    Crops,
    chosen_crops,
    decides,
    first_crops,
    joined,
    of_some_crops,
    shares_of_crops,
    tokens_of_crops,
)
from adafv.core.encoded import EncodedImage, TowerCache
from adafv.core.layout import ImageLayout
from adafv.core.tokens import Plan
from adafv.engines.serving.metrics import Meter


@dataclass
class ImageAsked:
    """One image of a step, and what is asked of it."""

    number: int
    """Among those of the step."""
    name: bytes
    """Which image it is, whatever is asked."""
    text: Tensor
    """[T] long, the words that count."""
    budget: Budget
    crops: Crops
    layout: ImageLayout | None = None
    """Of the whole image, once it is known."""
    plan: Plan | None = None
    """None: all of it stays."""
    seen: tuple[int, ...] | None = None
    """The crops that were encoded; None: all."""

    @property
    def whole(self) -> ImageLayout:
        assert self.layout is not None
        return self.layout


class CropEncoder(Protocol):
    """What is asked of a family's model class here."""

    adafv_cache: TowerCache
    adafv_meter: Meter
    adafv_encoder_tokens: int

    def encode_crops(
        self, images: dict[str, Any], layouts: Sequence[ImageLayout], wanted: Sequence[tuple[int, int]]
    ) -> list[EncodedImage]:
        """Run tower and projector on some crops alone.

        Args:
            images: what vLLM's own `embed_multimodal` takes.
            layouts: of the whole images.
            wanted: (number of the image, crop).

        Returns:
            Per crop its tokens that show a patch, laid out as these alone.
        """

    def words(self, asked: ImageAsked, device: torch.device) -> Tensor | None:
        """[T, D], what the words that count are embedded as; None where the method needs none."""

    def compared(self, features: Tensor) -> Tensor:
        """See `PrunedModel`."""


@dataclass
class _Parts:
    """Crops of some images, each encoded once, or found in the cache."""

    model: CropEncoder
    images: dict[str, Any]
    layouts: Sequence[ImageLayout]
    known: dict[tuple[bytes, int], EncodedImage] = field(default_factory=dict)
    runs: set[bytes] = field(default_factory=set)
    """Images of which something went through the tower."""

    def encode(self, wanted: Mapping[tuple[bytes, int], int]) -> None:
        """Crops of images (by the image's name), with the number of an image of this name."""
        missing = {}
        for (name, crop), number in wanted.items():
            if (name, crop) not in self.known:
                found = self._found(name, crop, number)
                if found is None:
                    missing[name, crop] = number
                else:
                    self.known[name, crop] = found
        if not missing:
            return
        self.runs |= {name for name, _ in missing}
        pairs = [(number, crop) for (_, crop), number in missing.items()]
        made = self.model.encode_crops(self.images, self.layouts, pairs)
        cache = self.model.adafv_cache
        for key, image in zip(missing, made, strict=True):
            if cache.capacity:
                cache.put(key, image.copy())
            self.known[key] = image

    def _found(self, name: bytes, crop: int, number: int) -> EncodedImage | None:
        """From the cache, where the whole image or this crop of it may be."""
        if (image := self.model.adafv_cache.get((name, crop))) is not None:
            return image
        if (whole := self.model.adafv_cache.get(name)) is not None:
            return whole.part(*of_some_crops(self.layouts[number], (crop,)))
        return None


def encode_chosen(
    model: CropEncoder,
    images: dict[str, Any],
    layouts: Sequence[ImageLayout],
    asked: Sequence[ImageAsked],
    agree: Callable[[Tensor], Tensor],
) -> Iterator[tuple[ImageAsked, EncodedImage]]:
    """What the tower makes of the crops that are worth it, image by image; `seen` says which they are.

    Args:
        layouts: of all images of the step.
        asked: those whose crops are chosen, with their plans.
        agree: what makes the workers of one model agree on values.
    """
    for part in _at_a_time(asked, model.adafv_encoder_tokens):
        parts = _Parts(model, images, layouts)
        parts.encode({(each.name, crop): each.number for each in part for crop in first_crops(each.plan)})
        chosen = _decided(model, parts, part, agree)
        parts.encode(
            {(each.name, crop): each.number for each, crops in zip(part, chosen, strict=True) for crop in crops}
        )
        model.adafv_meter.encoded(len(parts.runs), len(part) - len(parts.runs))
        for each, crops in zip(part, chosen, strict=True):
            each.seen = (*first_crops(each.plan), *crops)
            left = of_some_crops(each.whole, each.seen)[1]
            found = [(parts.known[each.name, crop], (crop,)) for crop in each.seen]
            yield each, joined(each.whole, found, left)


def _at_a_time(asked: Sequence[ImageAsked], room: int) -> list[list[ImageAsked]]:
    """In such parts that what is encoded never takes more memory at a time than without pruning; of one image together."""
    by_name: dict[bytes, list[ImageAsked]] = {}
    for each in asked:
        by_name.setdefault(each.name, []).append(each)
    parts: list[list[ImageAsked]] = []
    left = 0
    for same in by_name.values():
        counts = tokens_of_crops(same[0].whole)
        most = sum(len(first_crops(each.plan)) + (each.crops.most or 0) for each in same)
        needed = min(sum(counts), most * max(counts))
        if not parts or needed > left:
            parts.append([])
            left = room
        parts[-1] += same
        left -= needed
    return parts


def _decided(
    model: CropEncoder, parts: _Parts, asked: Sequence[ImageAsked], agree: Callable[[Tensor], Tensor]
) -> list[tuple[int, ...]]:
    """Per image the crops beside its thumbnail that are worth a run of the tower; one wait for the device."""
    deciding = [each for each in asked if decides(each.crops, each.plan)]
    if not deciding:
        return [()] * len(asked)
    shares = []
    for each in deciding:
        thumbnail = parts.known[each.name, 0]
        words = model.words(each, thumbnail.features.device)
        compared = EncodedImage(model.compared(thumbnail.features), thumbnail.signals, thumbnail.layout)
        shares.append(shares_of_crops(each.whole, [compared], [] if words is None else [words]).flatten())
    values = agree(torch.cat(shares)).tolist()
    decided: dict[int, tuple[int, ...]] = {}
    for each, own in zip(deciding, shares, strict=True):
        assert each.crops.most is not None  # without a number all are encoded
        decided[each.number] = chosen_crops(values[: len(own)], each.crops.most)
        values = values[len(own) :]
    return [decided.get(each.number, ()) for each in asked]
