"""The interface of a model family, and how a model finds its family."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adafv.core import ImageLayout
from adafv.core.tokens import SALIENCY, Signal
from adafv.discovery import concrete_subclasses
from adafv.engines.transformers.towers import TowerShape, shape_of
from adafv.errors import UnsupportedModelError
from adafv.prompts.prompt import Run

MODALITIES = ("image", "video")

REPEATS_IMAGES_IN_ORDER = Version(transformers.__version__) >= Version("5.23")
"""Older releases repeat several entries of one prompt in the wrong order for beams and several return sequences."""

Signals = frozenset[Signal]
"""What is asked for of the tower: signals `of_tower`."""


@dataclass
class Encoded:
    """What the tower and the projector made of the images (or videos): one entry each, tokens in the layout's order."""

    features: list[Tensor]
    """Per image [N, D], what the language model would read."""
    signals: dict[Signal, list[Tensor]] = field(default_factory=dict)
    """What was asked for of the tower, per image [N, ...]: see `adafv.core.tokens`. What stands at tokens that show no
    patch does not matter."""
    deepstack: list[Tensor] = field(default_factory=list)
    """Per image [N, L, D], what L of the language model's layers add to the tokens; empty where the family has none."""

    @property
    def saliency(self) -> list[Tensor] | None:
        """Per image [N] float32, of the layer that the projector reads; None where it was not asked for."""
        return self.signals.get(SALIENCY)


class Family(ABC):
    """A class of models that take pre-encoded images through `mm_encoder_outputs`.

    `modality` is "image" or "video"; a video is one visual input whose crops are its frames. `visuals` are the entries of
    the model's inputs that describe the images, or the videos: those named in `images`, or `videos`.
    """

    name: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    """Names of the transformers classes; names, so that importing adafv does not import every model."""
    tower: ClassVar[str] = ""
    """Class of the vision tower, where that is what sets the family apart from others of the same model class."""
    images: ClassVar[tuple[str, ...]]
    """Entries of the inputs that describe the images, the pixels first; the encoded images replace them."""
    videos: ClassVar[tuple[str, ...]] = ()
    """The same for videos; empty where the family has none, or they are not supported."""
    other_names: ClassVar[Mapping[str, str]] = {}
    """Further names under which processors or callers pass an entry -> its name in `images` or `videos`."""
    saliency: ClassVar[str] = "[CLS]"
    """What the saliency is: the attention of "[CLS]", or the attention "received" where the tower has no [CLS]."""
    tower_name: ClassVar[str] = "vision_tower"
    """Attribute of the base model that holds the tower."""
    tower_shape: ClassVar[TowerShape | None] = None
    """Where the tower keeps its layers, and which of them look at the whole image; None: as `towers.TOWERS` says."""
    downsamples: ClassVar[bool] = False
    """Whether images can be scaled down; such a family has `encode_smaller`."""
    as_tensor: ClassVar[tuple[str, ...]] = ()
    """Modalities whose encoded features the stock model reads as one tensor; the others it reads as a list."""
    rotary_axes: ClassVar[int] = 0
    """Rows of the positions in a family that gives a visual token a position in time, height and width (M-RoPE); 0 where
    positions are counted along the prompt. Such a family has `positions`."""
    one_placeholder: ClassVar[bool] = False
    """Whether images and videos have the same placeholder. The encoded videos then go to the stock model as images, and a
    call with both is refused, as the stock model fails there."""
    looks_ahead: ClassVar[bool] = False
    """Whether a token may look at tokens behind it, as the tokens of an image look at each other in Gemma 3. The stock
    model reads from `token_type_ids` which do."""
    chunked_prefill: ClassVar[bool] = True
    """Whether the stock model takes encoded images in chunked prefill."""
    packed_rows: ClassVar[bool] = True
    """Whether the stock model keeps prompts packed into one row apart."""
    first_position: ClassVar[int] = 0
    """What `forward` counts positions from where it is given none."""
    prompt: ClassVar[str] = "USER: {image}\n{question} ASSISTANT:"
    """How a question is put where the processor has no chat template."""
    limits: ClassVar[str] = ""
    """One line on what is refused or different, for the catalogue; empty where nothing is."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raise UnsupportedModelError where this checkpoint cannot be pruned correctly."""

    def check_call(self, model: Any, inputs: Mapping[str, Any], cache: Any, cached: bool, generates: bool) -> None:
        """Raise UnsupportedCallError where the stock model would read the new images of a call wrongly.

        Args:
            inputs: of the call, less the images.
            cache: the key/value cache of the call, or None.
            cached: whether the new images follow tokens that are cached.
            generates: a call of `generate`, not of `forward`.
        """
        return

    def check_signals(self, model: Any, signals: Iterable[Signal]) -> None:
        """Raise UnsupportedModelError where one of these signals cannot be read off this model's tower."""
        for tower in self.towers(model):
            shape = shape_of(tower) if self.tower_shape is None else self.tower_shape
            layers = shape.numbered(tower, self.feature_layers(model))
            for signal in signals:
                if reason := layers.unreadable(signal):
                    raise UnsupportedModelError(f"the {signal} cannot be read in {self.name}: {reason}")

    def towers(self, model: Any) -> list[Any]:
        """The towers that signals are read off."""
        return [getattr(model.model, self.tower_name)]

    def feature_layers(self, model: Any) -> int | list[int]:
        """Which hidden states of the tower the projector reads; layers behind the deepest of them may not be run."""
        return -1

    @abstractmethod
    def layouts(self, model: Any, modality: str, visuals: Mapping[str, Any], runs: list[Run]) -> list[ImageLayout]:
        """Layout of every image, known before the tower runs.

        Args:
            runs: of the placeholders, in reading order; for families whose inputs do not tell which tiles make an image.
        """

    def published_layouts(
        self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]
    ) -> list[ImageLayout]:
        """Layouts in which the published AdaFV code feeds the tokens of images, where they differ from the model's own."""
        return layouts

    @abstractmethod
    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        """Run tower and projector, reading the signals (those `of_tower` alone) off the tower.

        Raises:
            UnsupportedModelError: one cannot be read, see `check_signals`.
        """

    def encode_smaller(
        self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout], grid: tuple[int, int]
    ) -> list[Tensor]:
        """[rows * columns, D] per image, scaled down so that the tower sees `grid` (rows, columns) patches in one crop.

        Asked for where `downsamples` says so.
        """
        raise NotImplementedError

    @abstractmethod
    def take(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], wanted: list[int]
    ) -> dict[str, Any]:
        """The same entries for the images at the positions `wanted` alone."""

    def view(self, model: Any, visuals: Mapping[str, Any], layouts: list[ImageLayout]) -> Tensor:
        """The first image as the tower sees it, [C, 3, H, W] in the order of the layout's crops, normalised."""
        pixels: Tensor = visuals[self.images[0]]
        return (pixels[0] if pixels.dim() == 5 else pixels)[: layouts[0].crops]

    def inputs(self, modality: str) -> tuple[str, ...]:
        """Names of the entries for one modality."""
        return self.images if modality == "image" else self.videos

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that it has, of "image" and "video"."""
        return tuple(modality for modality in MODALITIES if self.inputs(modality))

    def placeholder(self, model: Any, modality: str) -> int:
        """The token that stands for a visual token in the prompt."""
        return int(getattr(model.config, f"{modality}_token_id"))

    def placeholders(self, model: Any, tokens: Tensor) -> dict[str, Tensor]:
        """Per modality that the family has, which of the tokens ([B, S]) of a prompt stand for its visual tokens."""
        return {modality: tokens == self.placeholder(model, modality) for modality in self.modalities}

    def markers(self, runs: list[Run]) -> list[tuple[int, int, int]]:
        """(row, first column, one after the last) of what the processor puts around images and between their tiles.

        Nobody's words, so not compared with the image. For families whose config does not name these tokens.
        """
        return []

    def positions(
        self, model: Any, tokens: Tensor, attended: Tensor, visuals: Mapping[str, Mapping[str, Any]]
    ) -> Tensor:
        """[R, B, S] positions of a prompt that begins at zero; asked for where `rotary_axes` (R) is not 0.

        Args:
            tokens: [B, S] long.
            attended: [B, S] long, the attention mask.
            visuals: per modality.
        """
        raise NotImplementedError

    def hand_over(
        self, model: Any, modality: str, features: list[Tensor], deepstack: list[Tensor]
    ) -> BaseModelOutputWithPooling:
        """The kept features ([K, D] per prompt that has any) in the shape that the stock model reads them in."""
        if modality not in self.as_tensor:
            return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]
        if len({len(part) for part in features}) == 1:
            return BaseModelOutputWithPooling(pooler_output=torch.stack(features))  # type: ignore[arg-type]
        # A tensor has one length: then every token goes as an image of its own. They are read one after the other.
        # As [N, D, 1] they are read just so, but `generate` fails to repeat them, where it would mix them up.
        tokens = torch.cat(features).unsqueeze(1 if REPEATS_IMAGES_IN_ORDER else 2)
        return BaseModelOutputWithPooling(pooler_output=tokens)  # type: ignore[arg-type]


def in_order(patches: Tensor, layout: ImageLayout, filler: Tensor | None = None) -> Tensor:
    """Values per patch ([C * rows * columns, ...]) -> per token ([N, ...]); `filler` where a token shows no patch."""
    source = layout.source.to(patches.device)
    if filler is not None:
        patches = torch.cat((patches, filler.to(patches).unsqueeze(0)))
        source = source.where(source >= 0, patches.shape[0] - 1)
    return patches.index_select(0, source.clamp_min(0))


@cache
def known_families() -> tuple[Family, ...]:
    """One instance of every family in this package, by name."""
    families = (family() for family in concrete_subclasses("adafv.engines.transformers.families", Family))
    return tuple(sorted(families, key=lambda family: family.name))


def stock_model(model: Any) -> Any:
    """The model inside a `PeftModel`, whose `forward` and `generate` that one calls; any other model is its own."""
    return model.get_base_model() if any(cls.__name__ == "PeftModel" for cls in type(model).__mro__) else model


def family_of(model: Any) -> Family:
    """The family of `model`, checked against this very checkpoint.

    Raises:
        UnsupportedModelError: no family knows the model's class, or the family refuses the checkpoint.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if type(getattr(model, "model", None)).__name__ == "OptimizedModule":
        raise UnsupportedModelError(
            "model.model was replaced by torch.compile(model.model), and what is inside cannot be run in parts; compile it "
            "in place instead: model.model.compile(), or its language model alone: model.model.language_model.compile()"
        )
    towers = {cls.__name__ for cls in type(getattr(getattr(model, "model", None), "vision_tower", None)).__mro__}
    matching = [
        family
        for family in known_families()
        if names.intersection(family.model_classes) and family.tower in {"", *towers}
    ]
    if matching:
        family = max(matching, key=lambda family: len(family.tower))
        family.check(model)
        return family
    known = ", ".join(dict.fromkeys(name for family in known_families() for name in family.model_classes))
    hint = ""
    if "OptimizedModule" in names:
        hint = "; compile the language model instead: model.model.language_model.compile()"
    elif "DataParallel" in names or "DistributedDataParallel" in names:
        hint = "; wrap the model inside: AdaFV(...)(model.module)"
    raise UnsupportedModelError(f"{type(model).__name__} is not a supported model; supported are: {known}{hint}")
