"""The interface of a model family, and how a model finds its family."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adafv.core import ImageLayout
from adafv.core.select import MIX_TOKENS
from adafv.core.tokens import READ, SALIENCY, Signal
from adafv.engines.transformers.releases import one_by_one
from adafv.engines.transformers.towers import TowerShape, shape_of
from adafv.errors import PromptError, UnsupportedModelError
from adafv.prompts.prompt import Run
from adafv.registry import Found, cause, find

MODALITIES = ("image", "video")

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


@dataclass(frozen=True)
class CallWithImages:
    """A call that brings new images or videos, as a family may have to refuse it."""

    inputs: Mapping[str, Any]
    """Of the call, less the images."""
    modalities: tuple[str, ...]
    """Of what is new: "image", "video" or both."""
    cache: Any
    """The key/value cache of the call, or None."""
    cached: bool
    """Whether the new images follow tokens that are cached."""
    generates: bool
    """A call of `generate`, not of `forward`."""
    packed: bool
    """Whether several prompts stand in one row, and some of their tokens are dropped."""


class Family(ABC):
    """A class of models that take pre-encoded images through `mm_encoder_outputs`.

    `modality` is "image" or "video"; a video is one visual input whose crops are its frames. `visuals` are the entries of
    the model's inputs that describe the images, or the videos: those named in `images`, or `videos`.
    """

    name: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    """Names of the transformers classes; names, so that importing adafv does not import every model."""
    images: ClassVar[tuple[str, ...]]
    """Entries of the inputs that describe the images, the pixels first; the encoded images replace them."""
    videos: ClassVar[tuple[str, ...]] = ()
    """The same for videos; empty where the family has none, or they are not supported."""
    saliency: ClassVar[str] = "[CLS]"
    """What the saliency is: the attention of "[CLS]", or the attention "received" where the tower has no [CLS]."""
    tower_name: ClassVar[str] = "vision_tower"
    """Attribute of the base model that holds the tower."""
    tower_shape: ClassVar[TowerShape | None] = None
    """Where the tower keeps its layers, and which of them look at the whole image; None: as `towers.TOWERS` says."""
    downsamples: ClassVar[bool] = False
    """Whether images can be scaled down; such a family has `encode_smaller`."""
    arranges: ClassVar[bool] = False
    """Whether `encode` takes layouts other than the model's own: its patches in any order, padding included."""
    chooses_crops: ClassVar[bool] = False
    """Whether some crops of an image can be encoded without the others; such a family has `encode_crops`, and its layouts
    say how crops lie (`tiling`)."""
    knows_thumbnail: ClassVar[bool] = False
    """Whether the thumbnail, crop 0, can be encoded without the others where nothing says how those lie. `encode_crops` makes
    sure by the pixels that it is one."""
    as_tensor: ClassVar[tuple[str, ...]] = ()
    """Modalities whose encoded features the stock model reads as one tensor; the others it reads as a list."""
    rotary_axes: ClassVar[int] = 0
    """Rows of the positions in a family that gives a visual token a position in time, height and width (M-RoPE); 0 where
    positions are counted along the prompt. Such a family has `positions`."""
    prompt: ClassVar[str] = "USER: {image}\n{question} ASSISTANT:"
    """How a question is put where the processor has no chat template."""
    limits: ClassVar[str] = ""
    """One line on what is refused or different, for the catalogue; empty where nothing is."""

    @property
    def spares_crops(self) -> bool:
        """Whether crops of an image need not all be encoded."""
        return self.chooses_crops or self.knows_thumbnail

    def owns(self, model: Any) -> bool:
        """Whether a model is of this family: of one of its classes, or of one derived from it.

        Of several, the family of the nearest class is the model's; two for one class are refused.
        """
        return any(is_a(model, name) for name in self.model_classes)

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raise UnsupportedModelError where this checkpoint cannot be pruned correctly."""

    def check_call(self, model: Any, call: CallWithImages) -> None:
        """Raise UnsupportedCallError where the stock model would read the new images of a call wrongly."""
        return

    def check_generate(self, asked: Callable[[str], Any]) -> None:
        """Raise UnsupportedCallError for a way of generating that the stock model gets wrong where images are passed.

        Args:
            asked: name of a generation setting -> its value, from the call or the model's own.
        """
        return

    def check_signals(self, model: Any, signals: Iterable[Signal]) -> None:
        """Raise UnsupportedModelError where one of these signals cannot be read off this model's tower."""
        signals = list(signals)
        if READ in signals and not self.projects(model):
            raise UnsupportedModelError(
                f"what the projector reads cannot be mixed in {self.name}, whose tokens are not made one by one, or not in a "
                f"way that adafv knows: {MIX_TOKENS}"
            )
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

    @abstractmethod
    def encode(
        self, model: Any, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout], signals: Signals
    ) -> Encoded:
        """Run tower and projector, reading the signals (those `of_tower` alone) off the tower.

        Raises:
            UnsupportedModelError: one cannot be read, see `check_signals`.
        """

    def projects(self, model: Any) -> bool:
        """Whether the model projects what the projector reads token by token, so that mixes can be projected: then `encode`
        gives the signal READ (as `TappedTower` does), and there is `project`."""
        return False

    def project(self, model: Any, rows: Tensor) -> Tensor:
        """[..., E], of what the projector reads -> [..., D], what the language model reads. Asked for where `projects`."""
        raise NotImplementedError

    def encode_crops(
        self,
        model: Any,
        visuals: Mapping[str, Any],
        layouts: list[ImageLayout],
        wanted: list[tuple[int, ...]],
        signals: Signals,
    ) -> Encoded:
        """Run tower and projector on some crops of the images alone, all in one run.

        Asked for where `spares_crops`.

        Args:
            wanted: per image the numbers of the crops, ascending; of an image maybe none, of all at least one.

        Returns:
            Per image, the tokens that show a patch of these crops: they are those of the whole image, to rounding.
        """
        raise NotImplementedError

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

    def named(self, name: str) -> str:
        """An entry's name in `images` or `videos`, where processors or callers have a further name for it."""
        return name

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

    def places(self, columns: Tensor) -> Tensor:
        """Columns of the prompt -> the positions that the stock `forward` gives them where it is given none."""
        return columns

    def since_the_cache_began(self, name: str, values: Tensor, cached: int) -> Tensor:
        """An entry that runs along the new columns ([B, new]), as the stock model reads it behind `cached` columns."""
        return values

    def handed_as(self, modality: str) -> str:
        """The modality under which the stock model takes what `hand_over` returns."""
        return modality

    def hand_over(
        self, model: Any, modality: str, features: list[Tensor], deepstack: list[Tensor]
    ) -> BaseModelOutputWithPooling:
        """The kept features ([K, D] per prompt that has any) in the shape that the stock model reads them in."""
        if modality not in self.as_tensor:
            return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]
        if len({len(part) for part in features}) == 1:
            return BaseModelOutputWithPooling(pooler_output=torch.stack(features))  # type: ignore[arg-type]
        # A tensor has one length: then every token goes as an image of its own. They are read one after the other.
        return BaseModelOutputWithPooling(pooler_output=one_by_one(torch.cat(features)))  # type: ignore[arg-type]


def paired(one: str, of_one: Sequence[Any], two: str, of_two: Sequence[Any]) -> list[tuple[Any, Any]]:
    """What two inputs say of each image.

    Raises:
        PromptError: they speak of different numbers of images.
    """
    if len(of_one) != len(of_two):
        raise PromptError(
            f"{one} speaks of {len(of_one)} and {two} of {len(of_two)}; pass both as the processor returned them for these "
            "prompts"
        )
    return list(zip(of_one, of_two, strict=True))


def in_order(patches: Tensor, layout: ImageLayout, filler: Tensor | None = None) -> Tensor:
    """Values per patch ([C * rows * columns, ...]) -> per token ([N, ...]); `filler` where a token shows no patch."""
    source = layout.source.to(patches.device)
    if filler is not None:
        patches = torch.cat((patches, filler.to(patches).unsqueeze(0)))
        source = source.where(source >= 0, patches.shape[0] - 1)
    return patches.index_select(0, source.clamp_min(0))


@cache
def found_families() -> Found[Family]:
    """The families of this package and of the entry points `adafv.families`, and what could not be loaded."""
    return find("adafv.engines.transformers.families", "adafv.families", Family, _fault)  # type: ignore[type-abstract]


@cache
def known_families() -> tuple[Family, ...]:
    """One instance of every family that could be loaded, by name."""
    return tuple(family() for family in found_families().classes.values())


def _fault(family: type[Family]) -> str | None:
    """Why a class cannot be a family."""
    for entry in ("model_classes", "images"):
        names = getattr(family, entry, None)
        if not (isinstance(names, tuple) and names and all(isinstance(name, str) for name in names)):
            return f"has no {entry}: set it to a tuple of names"
    try:
        family()
    except Exception as error:
        return f"cannot be made without arguments: {cause(error)}"
    return None


def is_a(value: Any, name: str) -> bool:
    """Whether `value` is an instance of a class of that name, or of one derived from it; nothing is imported for it."""
    return any(cls.__name__ == name for cls in type(value).__mro__)


def stock_model(model: Any) -> Any:
    """The model inside a `PeftModel`, whose `forward` and `generate` that one calls; any other model is its own."""
    return model.get_base_model() if is_a(model, "PeftModel") else model


def family_of(model: Any) -> Family:
    """The family of `model`, checked against this very checkpoint.

    Raises:
        UnsupportedModelError: no family knows the model's class, or the family refuses the checkpoint.
    """
    if type(getattr(model, "model", None)).__name__ == "OptimizedModule":
        raise UnsupportedModelError(
            "model.model was replaced by torch.compile(model.model), and what is inside cannot be run in parts; compile it "
            "in place instead: model.model.compile(), or its language model alone: model.model.language_model.compile()"
        )
    owners: dict[int, list[Family]] = {}
    for family in known_families():
        if family.owns(model):
            owners.setdefault(_distance(model, family), []).append(family)
    nearest = owners[min(owners)] if owners else []
    if len(nearest) > 1:
        homes = " and ".join(f"{family.name} ({found_families().homes[family.name]})" for family in nearest)
        raise UnsupportedModelError(
            f"{type(model).__name__} is claimed by {homes}, and only one can be right; uninstall the other"
        )
    if nearest:
        [family] = nearest
        family.check(model)
        return family
    hint = ""
    if is_a(model, "OptimizedModule"):
        hint = "; compile the language model instead: model.model.language_model.compile()"
    elif is_a(model, "DataParallel") or is_a(model, "DistributedDataParallel"):
        hint = "; wrap the model inside: AdaFV(...)(model.module)"
    raise unsupported(type(model).__name__, hint)


def _distance(model: Any, family: Family) -> int:
    """How many classes the model's own is derived away from the family's."""
    classes = type(model).__mro__
    return next((i for i, cls in enumerate(classes) if cls.__name__ in family.model_classes), len(classes))


def unsupported(model_class: str, hint: str = "") -> UnsupportedModelError:
    """The error for a class of models that no family knows. It names the families that could not be loaded, too."""
    known = ", ".join(dict.fromkeys(name for family in known_families() for name in family.model_classes))
    return UnsupportedModelError(
        f"{model_class} is not a supported model; supported are: {known}{hint}{found_families().lacking()}"
    )
