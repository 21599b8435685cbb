"""Images that went through tower and projector once, for any number of questions: `adafv.encode`.

Why it looks like this. The tower is a step of its own in every engine; here its result gets a name, so that a caller can
keep it: a page of questions about one photo, a chat, a comparison of methods or budgets. It is passed where the pixels
would be, as `images=`, and everything else about a call stays as it is. vLLM's tower cache holds the same objects, one
per image (`adafv.core.encoded`).
"""

import copy
import hashlib
import uuid
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from adafv.core.encoded import EncodedImage
from adafv.core.layout import ImageLayout
from adafv.core.tokens import Signal
from adafv.engines.transformers.devices import host_by_default, sharded_parts_ready
from adafv.engines.transformers.families import Family, family_of
from adafv.engines.transformers.families.base import Encoded, stock_model
from adafv.engines.transformers.reading import ENCODE_AGAIN, WEIGHTS_CHANGED, read_prompt, visuals_of
from adafv.errors import PromptError, StaleImagesError, UnsupportedCallError, UnsupportedModelError
from adafv.methods import Method, method_named
from adafv.methods.base import LAYERS, TOKENS
from adafv.printable import shortened

HANDLE = "_adafv"
"""Attribute of a wrapped model that holds its wrapper, which alone reads encoded images in `generate` and `forward`."""
ENCODED = "images"
"""Name under which encoded images are passed to `generate`, `forward` and `compress`."""


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images and videos, in the order in which they were given; see `adafv.encode`."""

    images: dict[str, list[EncodedImage]]
    """Per modality."""
    visuals: dict[str, dict[str, Any]]
    """Per modality, the inputs that describe them; of the pixels, shapes alone."""
    signals: frozenset[Signal]
    """What was read off the tower."""
    family: str
    weights: "Fingerprint"
    """What tower and projector were like."""
    pixels: dict[str, str]
    """A hash of every input."""
    guard: Any = field(default=None, repr=False, compare=False)
    """See `_Guard`."""
    times: int = 1
    """How often one image is repeated."""

    def __len__(self) -> int:
        """Images and videos."""
        return sum(len(images) for images in self.images.values())

    @property
    def bytes(self) -> int:
        """What they hold of the device's memory."""
        return sum(image.bytes for images in self.images.values() for image in images)

    def to(self, device: Any) -> "EncodedImages":
        """The same on another device, to keep many of them on the CPU, say; they are moved back where they are used."""
        moved = {
            modality: [
                replace(
                    image,
                    features=image.features.to(device),
                    signals={signal: values.to(device) for signal, values in image.signals.items()},
                    deepstack=None if image.deepstack is None else image.deepstack.to(device),
                )
                for image in images
            ]
            for modality, images in self.images.items()
        }
        return replace(self, images=moved)

    def check(self, model: Any, family: Family, taken: Mapping[str, Any]) -> Tensor:
        """Raise where these images are not those that the model would make now.

        Args:
            taken: pixels and sizes that are passed beside them.

        Returns:
            One bool, on the device: whether those values of weights that are looked at are the same. To be read with what is
            read next, so that it takes no wait of its own; where it is False, raise `StaleImagesError`.

        Raises:
            StaleImagesError: weights, precision, device, adapters, configuration or pixels are others.
            UnsupportedCallError: the call asks for what encoded images do not have: gradients, or adapters for each prompt.
        """
        if family.name != self.family:
            raise StaleImagesError(
                f"these images were encoded for {self.family}, but the model is {family.name}; {ENCODE_AGAIN}"
            )
        now = Fingerprint.of(model, names=False)
        if any(flag == PER_PROMPT for flag, _ in now.flags):
            raise UnsupportedCallError(
                f"{PER_PROMPT}= gives each prompt adapters of its own, in the vision tower too, and {ENCODED}= went through "
                f"it with one; pass the pixels in place of {ENCODED}="
            )
        if difference := self.weights.difference_of_states(now):
            raise StaleImagesError(f"{difference}; {ENCODE_AGAIN}")
        for name, value in taken.items():
            if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                raise UnsupportedCallError(
                    f"{ENCODED}= has no gradients, and {name} asks for them; leave {ENCODED}= out"
                )
            if {self.pixels.get(name)} != {digest_of(part) for part in _parts(value, self.times)}:
                raise StaleImagesError(
                    f"{name} is passed beside images= and differs from what was encoded: another picture, or another setting "
                    f"of the processor; leave it out, or {ENCODE_AGAIN}"
                )
        options = [name for name in self.pixels if name.startswith("vision_") and name not in taken]
        if options and any(name.startswith("pixel") for name in taken):
            raise StaleImagesError(
                f"{options[0]} was given to adafv.encode, but not to this call, which passes the pixels too and would encode "
                f"them in another way; pass {options[0]} as well, or leave the pixels out"
            )
        return self.weights.same_samples(now)

    def holds(self, model: Any, inputs: Mapping[str, Any], *methods: Method) -> bool:
        """Whether these are the images of `inputs`, as the model would encode them now for all of these methods."""
        if not all(map(self.serves, methods)):
            return False
        family = family_of(model)
        _, taken = _visuals_of(family, inputs)
        try:
            same = self.check(model, family, taken)
        except (StaleImagesError, UnsupportedCallError):
            return False
        return taken.keys() == self.pixels.keys() and bool(same)

    def serves(self, method: Method) -> bool:
        """Whether a method, and what chooses in its place without words, can do with what was read off the tower."""
        needed = method.of_tower | method.without_text().of_tower
        return takes_encoded(method) and needed <= self.signals

    def take(self, modality: str, numbers: Sequence[int], device: torch.device) -> list[EncodedImage]:
        """Some of the images of one modality, on the device of the model."""
        found = [self.images[modality][number] for number in numbers]
        if all(image.features.device == device for image in found):
            return found
        moved = replace(self, images={modality: found}).to(device)
        return moved.images[modality]

    def showing(self, model: Any, inputs: Mapping[str, Any], images: Sequence[EncodedImage]) -> "EncodedImages":
        """Other images of the same model, in a batch that was never encoded together.

        Args:
            inputs: what the processor made of the batch.
            images: one for each image in it, in its order; one may be there several times. That they are what the model makes
                of those pixels is for the caller to know.

        Raises:
            PromptError: the batch has another number of images, or a video.
        """
        family = family_of(model)
        visuals, taken = _visuals_of(family, inputs)
        if set(visuals) != {"image"}:
            raise PromptError(
                "a batch of images is to be shown, and images alone; there are none, or videos beside them"
            )
        entries = visuals["image"]
        runs: list[Any] = []
        if inputs.get("input_ids") is not None:
            runs = read_prompt(model, family, {"input_ids": inputs["input_ids"]}).runs("image")
        count = len(family.layouts(model, "image", entries, runs))
        if count != len(images):
            raise PromptError(
                f"the batch shows {count} images, and {len(images)} encoded ones are given; give one for each"
            )
        described = {name: _described(name, value) for name, value in entries.items()}
        hashes = {name: digest_of(value) for name, value in taken.items()}
        return replace(self, images={"image": list(images)}, visuals={"image": described}, pixels=hashes, times=1)

    def repeated(self, times: int) -> "EncodedImages":
        """One image as often as a batch asks about it; without another copy of it.

        Raises:
            PromptError: there are several images, or a video.
        """
        if len(self) != 1 or "image" not in self.images:
            raise PromptError(
                f"only one image can be repeated, and these are {len(self)}; encode them as the batch shows them"
            )
        [image] = self.images["image"]
        visuals = {name: _rows(value, times) for name, value in self.visuals["image"].items()}
        return replace(self, images={"image": [image] * times}, visuals={"image": visuals}, times=times)


def encode(
    model: Any, inputs: Mapping[str, Any], *, method: str | Method | Iterable[str | Method] = "adafv"
) -> EncodedImages:
    """Run vision tower and projector once, for any number of questions, budgets and methods.

        encoded = adafv.encode(model, processor(images=photo, text=prompt, return_tensors="pt"))
        with AdaFV(keep=64)(model):
            for question in questions:
                inputs = processor(images=photo, text=question, return_tensors="pt")
                model.generate(**inputs, images=encoded)

    Args:
        model: a supported model, wrapped or not. As long as its encoded images live, a hook on it refuses them where nothing
            would read them.
        inputs: what the processor returned; its text does not matter.
        method: the methods that will choose, by name or as objects: what they need of the tower is read off it.

    Returns:
        The encoded images, to be passed as `images=` to `generate`, `forward` (inside `AdaFV`) or `compress`, with or without
        the pixels. They are refused once they are stale: other weights, precision, device, adapters, configuration or pixels.

    Raises:
        PromptError: there is no image in `inputs`.
        UnsupportedCallError: tower or projector would drop out at random.
    """
    model = stock_model(model)
    family = family_of(model)
    _refuse_dropout(model)
    listed = [method] if isinstance(method, (str, Method)) else list(method)
    methods = [method_named(each) if isinstance(each, str) else each for each in listed]
    signals = frozenset[Signal]().union(*(part.of_tower for each in methods for part in (each, each.without_text())))
    family.check_signals(model, signals)
    visuals, taken = _visuals_of(family, inputs)
    if not visuals:
        raise PromptError(f"there is no image to encode: give {family.images[0]}, as the processor returns it")
    images, described = {}, {}
    with torch.no_grad(), host_by_default(), sharded_parts_ready(model):
        for modality, entries in visuals.items():
            runs: list[Any] = []
            if inputs.get("input_ids") is not None:
                runs = read_prompt(model, family, {"input_ids": inputs["input_ids"]}).runs(modality)
            layouts = family.layouts(model, modality, entries, runs)
            images[modality] = [
                image.copy() for image in encode_modality(model, family, modality, entries, layouts, signals)
            ]
            described[modality] = {name: _described(name, value) for name, value in entries.items()}
    hashes = {name: digest_of(value) for name, value in taken.items()}
    return EncodedImages(images, described, signals, family.name, Fingerprint.of(model), hashes, _Guard.of(model))


def takes_encoded(method: Method) -> bool:
    """Whether a method can do with encoded images, if what it needs was read off the tower; others need the pixels."""
    return method.stages in ({TOKENS}, {LAYERS}) and not method.may_repeat


class _Guard:
    """Refuses encoded images where nothing reads them, as long as there are any of a model.

    The stock `forward` ignores arguments that it does not know, so outside `AdaFV` it would answer as if there were no
    image. (`generate` refuses them by itself.) It hands them on to the base model, which is guarded too: `forward` may be
    called by its name, where no hook of the model itself is asked.
    """

    _living: "weakref.WeakKeyDictionary[Any, weakref.ref[_Guard]]" = weakref.WeakKeyDictionary()

    def __init__(self, model: Any) -> None:
        for module in {id(part): part for part in (model, getattr(model, "model", model))}.values():
            weakref.finalize(self, module.register_forward_pre_hook(_refuse_unwrapped, with_kwargs=True).remove)

    @classmethod
    def of(cls, model: Any) -> "_Guard":
        """The one of this model."""
        there = cls._living.get(model)
        guard = None if there is None else there()
        if guard is None:
            guard = cls(model)
            cls._living[model] = weakref.ref(guard)
        return guard

    def __deepcopy__(self, memo: Any) -> "_Guard":
        return self

    def __reduce__(self) -> Any:
        return type(None), ()  # elsewhere the images are refused by the model that they are shown to


def encoded_in(arguments: Mapping[str, Any]) -> EncodedImages | None:
    """The encoded images of a call.

    Raises:
        UnsupportedCallError: some stand where nothing reads them: under another name, or in a list. The stock model ignores
            arguments that it does not know, and would answer as if there were no image.
    """
    for name, value in arguments.items():
        if _holds_encoded(value) and not (name == ENCODED and isinstance(value, EncodedImages)):
            raise UnsupportedCallError(
                f"encoded images are read as {ENCODED}= alone, all of a call in one object, not as {name}= or in a list: "
                "adafv.encode takes the images of a whole batch, and `repeated` one for several prompts"
            )
    found = arguments.get(ENCODED)
    return found if isinstance(found, EncodedImages) else None


def _holds_encoded(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_holds_encoded, value))
    return isinstance(value, (EncodedImages, EncodedImage))


def refuse_other_images(arguments: Mapping[str, Any]) -> None:
    """Raise UnsupportedCallError where pictures have the name of encoded ones: the stock model would ignore them."""
    found = arguments.get(ENCODED)
    if found is not None and not isinstance(found, EncodedImages):
        raise UnsupportedCallError(
            f"{ENCODED}= takes what adafv.encode returned, and this is a {type(found).__name__}; pass what the processor "
            "made of pictures under the names that it gave: model(**inputs)"
        )


def refuse_training(model: Any) -> None:
    """Raise UnsupportedCallError where tower or projector are to learn: encoded images have no gradients, so they cannot."""
    if not (model.training and torch.is_grad_enabled()):
        return
    for path, module in outside_the_language_model(model, names=True):
        for name, parameter in module.__dict__["_parameters"].items():
            if parameter is not None and parameter.requires_grad:
                raise UnsupportedCallError(
                    f"{ENCODED}= has no gradients, so {path}{name} would not be trained; pass the pixels, or freeze the "
                    "vision tower and the projector"
                )


def _refuse_dropout(model: Any) -> None:
    """Raise UnsupportedCallError where tower or projector drop out: one draw would stand for all calls, in evaluation too."""
    for path, module in outside_the_language_model(model, names=True):
        if path and module.training and (rate := _dropout(module)):
            raise UnsupportedCallError(
                f"{path.removesuffix('.')} is in training mode and drops out at random ({rate}), so images that are encoded "
                "now would be one draw for all calls; call model.eval() before adafv.encode"
            )


def _dropout(module: Any) -> str | None:
    """The setting by which a module drops something in training; None where there is none."""
    rates = {name: value for name, value in module.__dict__.items() if "drop" in name}
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        rates["p"] = module.p
    return next((f"{name}={value}" for name, value in rates.items() if isinstance(value, float) and value > 0), None)


def _refuse_unwrapped(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    # Without: another thread is just adding or removing this hook, so there are no encoded images yet, or no more.
    if kwargs is not None and encoded_in(kwargs) is not None and HANDLE not in model.__dict__:
        raise UnsupportedCallError(
            f"{ENCODED}= is read inside `with AdaFV(keep=...)(model):` and by compress() alone; the stock model would ignore "
            "it; pass the pixels, or wrap the model"
        )


def _visuals_of(family: Family, inputs: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    return visuals_of(family, {name: value for name, value in inputs.items() if value is not None})


def encode_modality(
    model: Any,
    family: Family,
    modality: str,
    visuals: Mapping[str, Any],
    layouts: list[Any],
    signals: frozenset[Signal],
) -> list[EncodedImage]:
    """Run the tower on all images, or all videos, of a call."""
    made = family.encode(model, modality, visuals, layouts, signals)
    return encoded_parts(family, made, layouts)


def encoded_parts(family: Family, made: Encoded, layouts: Sequence[ImageLayout]) -> list[EncodedImage]:
    """The images that a family encoded, or parts of them.

    Raises:
        UnsupportedModelError: they are not as many, or as long, as it said before. A [CLS] that was left in, say, would shift
            every token by one, and nothing behind this would notice.
    """
    given = [
        ("features", 2, made.features),
        *((str(each), _DIMENSIONS[each.kind], made.signals[each]) for each in made.signals),
    ]
    if made.deepstack:
        given.append(("deepstack rows", 3, made.deepstack))
    for what, dims, parts in given:
        if [(part.dim(), tuple(part.shape[:1])) for part in parts] != [(dims, (each.tokens,)) for each in layouts]:
            shapes = shortened([list(part.shape) for part in parts], 120)
            raise UnsupportedModelError(
                f"the family {family.name} says that these images have {[each.tokens for each in layouts]} tokens, but gave "
                f"{what} of {shapes}; give one tensor of {dims} dimension(s) for each image, one row for each token"
            )
    return [_encoded_part(made, i, layout) for i, layout in enumerate(layouts)]


_DIMENSIONS = {"saliency": 1, "keys": 3, "hidden": 2, "read": 2}


def _encoded_part(made: Encoded, number: int, layout: ImageLayout) -> EncodedImage:
    return EncodedImage(
        made.features[number],
        {signal: values[number] for signal, values in made.signals.items()},
        layout,
        made.deepstack[number] if made.deepstack else None,
    )


FLAGS = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
"""Attributes of PEFT's layers that change what a module makes, with the same parameters."""

PER_PROMPT = "adapter_names"
"""What PEFT hands to its layers, by a hook for as long as a call lasts, where each prompt has an adapter of its own."""

PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)

SAMPLED, SAMPLES = 64, 8
"""Tensors, and values of each, that are looked at."""
SCATTER = 7919
"""A prime, so that tensors of all kinds and layers are among them."""


_IDENTITIES: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()
"""Per base model a name that no other has, in no process."""


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What the model outside its language model was like.

    PyTorch counts a tensor's version up whenever it is written to, but not what is written through `.data`, as when PEFT
    merges an adapter or an average of weights is swapped in. So some values of 64 of them are compared as well: on the
    device, without reading the rest. What changes a few single values, or tensors, through `.data` alone goes unseen; so do
    hooks, of which nobody knows whether they change something.
    """

    model: str
    """Which it was: the next one may lie where this one lay, and share its tower."""
    names: tuple[str, ...]
    states: list[Any]
    """Per tensor: version, type, device, where it is, and shape."""
    flags: list[tuple[str, str]]
    """Of adapters."""
    built: list[tuple[str, int]]
    """Per module its class, and its `forward`: of the class, or what was put in its place."""
    settings: dict[str, str]
    """The configuration, less what does not concern images."""
    samples: list[Tensor]
    """Per device, the bytes of the sampled values: to compare them is one wait."""

    @classmethod
    def of(cls, model: Any, names: bool = True) -> "Fingerprint":
        """Names are made once: to compare, they are not needed."""
        found, tensors, flags, built = [], [], [], []
        base = getattr(model, "model", model)
        for path, module in outside_the_language_model(model, names):
            inside = module.__dict__
            flags += [(flag, repr(inside[flag])) for flag in FLAGS if flag in inside]
            for hook in list(inside["_forward_pre_hooks"].values()):  # another thread may drop its encoded images
                if PER_PROMPT in (getattr(hook, "keywords", None) or {}):
                    flags.append((PER_PROMPT, repr(hook.keywords[PER_PROMPT])))
            if module is not model and module is not base:  # which accelerate and the wrapper itself change
                built.append((type(module).__qualname__, id(inside.get("forward", type(module).forward))))
            for held in (inside["_parameters"], inside["_buffers"]):
                for name, tensor in held.items():
                    if tensor is not None:
                        tensors.append(tensor)
                        if names:
                            found.append(f"{path}{name}")
        samples: dict[Any, list[Tensor]] = defaultdict(list)
        with torch.no_grad():
            for number, tensor in enumerate(tensors):
                if number * SCATTER % len(tensors) < SAMPLED and (sampled := _sampled(tensor)) is not None:
                    samples[tensor.dtype, tensor.device].append(sampled)
            together: dict[torch.device, list[Tensor]] = defaultdict(list)
            for (_, device), parts in samples.items():
                together[device].append(torch.cat(parts).view(torch.uint8))
            held = [torch.cat(parts) for parts in together.values()]
        which = _IDENTITIES.setdefault(base, uuid.uuid4().hex)
        settings = {
            path: repr(value)
            for path, value in settings_of(model.config, model.config.get_text_config())
            if _may_concern_images(path.rpartition(".")[2])
        }
        return cls(which, tuple(found), list(map(_state, tensors)), flags, built, settings, held)

    def difference(self, now: "Fingerprint") -> str | None:
        """What is otherwise now, for a message; None: nothing."""
        return self.difference_of_states(now) or (None if self.same_samples(now) else WEIGHTS_CHANGED)

    def same_samples(self, now: "Fingerprint") -> Tensor:
        """Whether all sampled values are the same: one bool, on the device, that nobody waits for. For states that agree."""
        same = [(before == after).all() for before, after in zip(self.samples, now.samples, strict=True)]
        return torch.stack([each.to(same[0].device) for each in same]).all() if same else torch.tensor(True)

    def difference_of_states(self, now: "Fingerprint") -> str | None:
        """What the host can tell without reading values."""
        if self.model != now.model:
            return (
                "these images were encoded by another model, or by this one in another process or before it was copied"
            )
        if len(now.states) != len(self.states):
            return "the vision tower has other parameters or adapters than when these images were encoded"
        for number, (before, after) in enumerate(zip(self.states, now.states, strict=True)):
            if before != after:
                return (
                    f"{self.names[number] if self.names else 'a tensor'} of the model has changed since these images were "
                    "encoded (weights, precision or device)"
                )
        if self.flags != now.flags:
            return "adapters of the vision tower were switched or merged since these images were encoded"
        if self.built != now.built:
            return "a module or its forward was replaced in the vision tower or the projector since these images were encoded"
        for name, before in self.settings.items():  # what was added since, nothing of the model reads
            if now.settings.get(name) != before:
                return f"{name} of the model's configuration has changed since these images were encoded"
        return None

    def __reduce__(self) -> Any:
        # What is unpickled in another process is refused there; samples need not travel with their device.
        values = {**self.__dict__, "samples": [part.cpu() for part in self.samples]}
        return type(self), tuple(values[name] for name in self.__dataclass_fields__)


_ANY_MODEL = frozenset(vars(PreTrainedConfig())) | {"use_cache", "tie_word_embeddings"}
"""Settings that say nothing of how images are encoded."""


def _may_concern_images(setting: str) -> bool:
    """What begins with an underscore is the library's own; special tokens are aligned with a tokenizer's."""
    return not (setting.startswith("_") or setting in _ANY_MODEL or "token_id" in setting or "token_index" in setting)


def settings_of(config: Any, aside: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of all that a configuration says; `aside`, that of the language model, is left out."""
    for name, value in vars(config).items():
        if hasattr(value, "get_text_config"):
            if value is not aside:
                yield from settings_of(value, aside, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def outside_the_language_model(model: Any, names: bool) -> Iterator[tuple[str, Any]]:
    """(path, module) of all but the language model and its head."""
    base = getattr(model, "model", model)
    aside = {id(getattr(base, name, None)) for name in ("language_model", "text_model")}
    aside.add(id(model.get_output_embeddings()))
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        yield path, module
        for name, child in module.__dict__["_modules"].items():
            if child is not None and id(child) not in aside:
                waiting.append((f"{path}{name}." if names else "", child))


def _state(tensor: Tensor) -> tuple[Any, ...]:
    version = -1 if tensor.is_inference() else tensor._version
    # Quantised or distributed tensors have no memory of their own.
    place = tensor.data_ptr() if type(tensor) in PLAIN else id(tensor)
    return place, version, tensor.dtype, tensor.device, tensor.shape


def _sampled(tensor: Tensor) -> Tensor | None:
    """[at most SAMPLES], from all over the tensor; None where its values cannot be looked at just so."""
    count = tensor.numel()
    if type(tensor) not in PLAIN or not count or tensor.is_meta or not tensor.is_contiguous():
        return None
    size = SAMPLES if count > SAMPLES else count
    return tensor.as_strided((size,), (count // size,))


def _described(name: str, value: Any) -> Any:
    """Without the pixels, of which the shape says how images lie, and which tiles of a row that is filled up are there. Sizes
    on the host, where they are read, so that no call with these images waits for them."""
    if not name.startswith("pixel"):  # a copy: what is the caller's may be written to later
        return value.cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    if isinstance(value, Tensor) and value.is_floating_point():
        if value.dim() == 5:
            there = (value != 0).flatten(2).any(2).to(value.dtype)
            return there.view(*there.shape, 1, 1, 1).expand_as(value)
        return value.to("meta")
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value):
        return [_described(name, part) for part in value]
    return value


def digest_of(value: Any) -> str:
    """A hash of tensors, arrays, numbers and text, in lists and dictionaries of any depth."""
    digest = hashlib.sha256()
    _digest(value, digest)
    return digest.hexdigest()


def _digest(value: Any, digest: Any) -> None:
    if isinstance(value, (Tensor, np.ndarray)):
        held = torch.as_tensor(value).detach().cpu().contiguous()
        digest.update(repr((held.dtype, tuple(held.shape))).encode())
        digest.update(held.view(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(f"{len(value)} by name".encode())
        for name in sorted(value):
            _digest([name, value[name]], digest)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)} in a row".encode())
        for part in value:
            _digest(part, digest)
    else:
        digest.update(f"{value!r};".encode())  # so that [1, 23] is not [12, 3]


def _parts(value: Any, times: int) -> list[Any]:
    """What was repeated, as often as it was."""
    if times == 1 or (isinstance(value, Tensor) and not value.dim()):
        return [value]
    if isinstance(value, Tensor):
        return list(value.chunk(times))
    step = max(1, len(value) // times)
    return [value[start : start + step] for start in range(0, len(value), step)]


def _rows(value: Any, times: int) -> Any:
    if isinstance(value, Tensor):
        return value.repeat(times, *[1] * (value.dim() - 1)) if value.dim() else value
    return list(value) * times if isinstance(value, (list, tuple)) else value
