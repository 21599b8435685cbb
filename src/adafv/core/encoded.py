"""Encoded images, so that one image with many questions goes through the tower once."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from adafv.core.layout import ImageLayout
from adafv.core.sending import sent
from adafv.core.tokens import SALIENCY, Signal


def alone(values: Tensor) -> Tensor:
    """The same values in memory that holds nothing else; as they are where that is so."""
    own = values.numel() * values.element_size()
    return values if values.untyped_storage().nbytes() == own else values.clone()


@dataclass(frozen=True)
class EncodedImage:
    """What tower and projector made of one image, or one video."""

    features: Tensor
    """[N, D] as the language model would read them."""
    signals: Mapping[Signal, Tensor]
    """What was asked for of the tower, [N, ...] each. What stands at tokens that show no patch does not matter."""
    layout: ImageLayout
    deepstack: Tensor | None = None
    """[N, L, D], what L of the language model's layers add to the tokens; None where the family has none, or has them in
    the features."""

    @property
    def saliency(self) -> Tensor | None:
        """[N] float32; None where it was not asked for."""
        return self.signals.get(SALIENCY)

    @property
    def bytes(self) -> int:
        """What it holds of the device's memory."""
        tensors = [self.features, *self.signals.values(), *([] if self.deepstack is None else [self.deepstack])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def copy(self) -> "EncodedImage":
        """The same in memory that nothing else is in: images that went through the tower together are views of one tensor."""
        return replace(
            self,
            features=alone(self.features),
            signals={signal: alone(values) for signal, values in self.signals.items()},
            deepstack=None if self.deepstack is None else alone(self.deepstack),
        )

    def part(self, tokens: Tensor | None, layout: ImageLayout) -> "EncodedImage":
        """Some of its tokens alone ([N'] long), laid out as `layout` says; None: all."""
        if tokens is None:
            return self if layout is self.layout else replace(self, layout=layout)
        tokens = sent(tokens, self.features.device)
        return EncodedImage(
            self.features[tokens],
            {signal: values[tokens] for signal, values in self.signals.items()},
            layout,
            None if self.deepstack is None else self.deepstack[tokens],
        )


class TowerCache:
    """The most recently used encoded images, as many as fit into so many bytes of a device. One thread at a time.

    In transformers, `ImageStore` holds one. In vLLM, whose encoder cache knows pruned images and so misses when the question
    is another, it is what depends on the image alone. It is bounded by bytes rather than by images because images differ in
    size by a factor of ten.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self._images: OrderedDict[Hashable, EncodedImage] = OrderedDict()

    def __len__(self) -> int:
        return len(self._images)

    def get(self, name: Hashable) -> EncodedImage | None:
        """The image of this name, which is then the most recently used one; or None."""
        image = self._images.get(name)
        if image is not None:
            self._images.move_to_end(name)
        return image

    def put(self, name: Hashable, image: EncodedImage) -> None:
        """Remember an image; forget the least recently used ones where there is no room. Too large a one is not kept."""
        if name in self._images:
            self.bytes -= self._images.pop(name).bytes
        if image.bytes > self.capacity:
            return
        while self.bytes + image.bytes > self.capacity:
            self.bytes -= self._images.popitem(last=False)[1].bytes
        self._images[name] = image
        self.bytes += image.bytes

    def drop(self, wanted: Callable[[Any], bool]) -> None:
        """Forget those of some names."""
        for name in [name for name in self._images if wanted(name)]:
            self.bytes -= self._images.pop(name).bytes

    def clear(self) -> None:
        """Forget all of them."""
        self._images.clear()
        self.bytes = 0
