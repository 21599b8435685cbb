"""The interface of a model family, and how a model finds its family."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from adafv.core import ImageLayout
from adafv.discovery import concrete_subclasses
from adafv.errors import UnsupportedModelError


@dataclass
class Encoded:
    """What the tower and the projector made of the images: one entry per image, tokens numbered as `source` does."""

    features: list[Tensor]
    """Per image [C * rows * columns, D], what the language model would read."""
    saliency: list[Tensor] | None
    """Per image [C * rows * columns] float32, see `adafv.core.class_attention`; None where it was not asked for."""


class Family(ABC):
    """A class of models that take pre-encoded images through `mm_encoder_outputs`.

    `images` below are the entries of the model's inputs named in `image_inputs`.
    """

    name: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    """Names of the transformers classes; names, so that importing adafv does not import every model."""
    image_inputs: ClassVar[tuple[str, ...]]
    """Entries of the inputs that describe the images; they are replaced by the encoded images."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raise UnsupportedModelError where this checkpoint cannot be pruned correctly."""

    @abstractmethod
    def layouts(self, model: Any, images: Mapping[str, Any]) -> list[ImageLayout]:
        """Layout of every image, known before the tower runs."""

    def published_layouts(self, model: Any, images: Mapping[str, Any]) -> list[ImageLayout]:
        """Layout in which the published AdaFV code feeds the tokens, where it differs from the model's own."""
        return self.layouts(model, images)

    @abstractmethod
    def encode(
        self, model: Any, images: Mapping[str, Any], *, saliency: bool, grid: tuple[int, int] | None = None
    ) -> Encoded:
        """Run tower and projector, reading the saliency off the layer that the projector reads.

        With `grid` (rows, columns) the image is first scaled down so that the tower sees that many patches, in one
        crop.
        """

    @abstractmethod
    def take(self, model: Any, images: Mapping[str, Any], wanted: list[int]) -> dict[str, Any]:
        """The same entries for the images at the positions `wanted` alone."""

    def filler(self, model: Any) -> Tensor | None:
        """[D] embedding of tokens that show no patch (`source` -1), or None where the family has none."""
        return None


@cache
def known_families() -> tuple[Family, ...]:
    """One instance of every family in this package, by name."""
    families = (family() for family in concrete_subclasses("adafv.families", Family))
    return tuple(sorted(families, key=lambda family: family.name))


def family_of(model: Any) -> Family:
    """The family of `model`, checked against this very checkpoint.

    Raises:
        UnsupportedModelError: no family knows the model's class, or the family refuses the checkpoint.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    for family in known_families():
        if names.intersection(family.model_classes):
            family.check(model)
            return family
    known = ", ".join(name for family in known_families() for name in family.model_classes)
    hint = ""
    if "OptimizedModule" in names:
        hint = "; compile the language model instead: model.model.language_model.compile()"
    elif "PeftModel" in names:
        hint = "; wrap the model inside: AdaFV(...)(peft_model.get_base_model())"
    elif "DataParallel" in names or "DistributedDataParallel" in names:
        hint = "; wrap the model inside: AdaFV(...)(model.module)"
    raise UnsupportedModelError(f"{type(model).__name__} is not a supported model; supported are: {known}{hint}")
