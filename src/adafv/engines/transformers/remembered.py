"""Encoded images that the wrapper keeps by itself: `AdaFV(keep=64, remember="512MB")`.

`adafv.encode` is for callers who know which picture is asked about again. This is for those who do not, or do not want to
say: a server, a loop over a benchmark with several questions per picture, a chat window. What is found here is what the
model would make of the same pixels now: the name of an entry holds all that this depends on, and where that cannot be
known (gradients, dropout) nothing is looked up or kept.
"""

import itertools
import re
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.crops import joined, of_some_crops
from adafv.core.encoded import EncodedImage, TowerCache
from adafv.core.tokens import Signal
from adafv.engines.transformers.devices import spread_over_processes
from adafv.engines.transformers.encoded import (
    Fingerprint,
    digest_of,
    encode_modality,
    encoded_parts,
    outside_the_language_model,
    settings_of,
)
from adafv.engines.transformers.families import Family
from adafv.errors import OptionError, UnsupportedCallError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*")
_VERSIONS = itertools.count()

Name = tuple[Any, ...]


class ImageStore:
    """The most recently used encoded images, as many as fit into so many bytes of the device. Threads may share it.

        store = ImageStore("2GB")
        with AdaFV(keep=64, remember=store)(model), AdaFV(keep=64, remember=store)(other_model):
            ...
        store.hits, store.misses, store.bytes

    Several pruners and models can share one: an image is known to the model that encoded it alone. A copy (deepcopy, pickle)
    has the same size and is empty.

    Args:
        capacity: bytes, as a number or as text with a unit: "512MB" (10^6 each), "1GiB" (2^30).

    Raises:
        OptionError: it is no such size.
    """

    def __init__(self, capacity: int | float | str) -> None:
        self._images = TowerCache(bytes_of(capacity))
        self._versions: dict[int, _Version] = {}
        self._gone: deque[int] = deque()
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self.hits = 0
        """Images that did not have to go through the tower: kept ones, and repeated ones within a call."""
        self.misses = 0
        """Images that had to."""

    @classmethod
    def of(cls, remember: "ImageStore | int | float | str | None") -> "ImageStore | None":
        """What `remember=` says; None: nothing is kept."""
        return remember if remember is None or isinstance(remember, ImageStore) else cls(remember)

    @property
    def capacity(self) -> int:
        """Bytes that it holds at most."""
        return self._images.capacity

    @property
    def bytes(self) -> int:
        """What it holds now: features, signals and what deeper layers add."""
        return self._images.bytes

    def __len__(self) -> int:
        """Images and videos that it holds now, and crops that it holds by themselves (`crops=`)."""
        return len(self._images)

    def __repr__(self) -> str:
        counts = f"{self.hits} hits, {self.misses} misses"
        return f"{type(self).__name__}({len(self)} images, {self.bytes} of {self.capacity} bytes, {counts})"

    def __reduce__(self) -> Any:
        return type(self), (self.capacity,)

    def clear(self) -> None:
        """Forget all images. Counts go on."""
        with self._lock:
            self._images.clear()

    def version_of(self, model: Any) -> int:
        """A number that no other model has, and this one never again once anything that its tower depends on has changed."""
        now = Fingerprint.of(model, names=False), _circumstances(model)
        base = model.model  # which holds the tower; the wrapper calls the stock model by another object around it
        with self._lock:
            self._sweep()
            known = self._versions.get(id(base))
            if known is None or not known.still(base, now):
                if known is not None:
                    self._forget(known.number)
                number = next(_VERSIONS)
                reference = weakref.ref(base, partial(_model_is_gone, weakref.ref(self), number))
                known = self._versions[id(base)] = _Version(number, reference, *now)
            return known.number

    def get(self, names: Sequence[Name]) -> list[EncodedImage | None]:
        """What is known under these names."""
        with self._lock:
            return [self._images.get(name) for name in names]

    def put(self, made: Mapping[Name, EncodedImage]) -> None:
        """Keep copies of these images, in place of what was kept under their names."""
        # Normal tensors, wherever they are made: those of torch.inference_mode() could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            copies = {name: image.copy() for name, image in made.items() if image.bytes <= self.capacity}
        with self._lock:
            self._sweep()
            current = {known.number for known in self._versions.values()}
            for name, image in copies.items():
                if name[0] in current:  # else the model has changed while the tower ran
                    self._images.put(name, image)
        if len(copies) < len(made):
            largest = max(image.bytes for image in made.values())
            self.tell(
                "size",
                f"an encoded image has {largest} bytes and remember= leaves room for {self.capacity}, so it is not kept; "
                'give a size with its unit, such as remember="512MB"',
            )

    def tell(self, kind: str, why: str) -> None:
        """Say why nothing is kept, each kind of reason once."""
        with self._lock:
            told = kind in self._told
            self._told.add(kind)
        if not told:
            warnings.warn(why, stacklevel=2)

    def count(self, hits: int, misses: int) -> None:
        """Add to the counts."""
        with self._lock:
            self.hits += hits
            self.misses += misses

    def _sweep(self) -> None:
        while self._gone:
            number = self._gone.popleft()
            self._forget(number)
            self._versions = {place: known for place, known in self._versions.items() if known.number != number}

    def _forget(self, number: int) -> None:
        self._images.drop(lambda name: name[0] == number)


def _model_is_gone(reference: "weakref.ref[ImageStore]", number: int, _: Any) -> None:
    store = reference()
    if store is None:
        return
    store._gone.append(number)
    # The garbage collector may come while this very thread holds the lock: then the next call sweeps.
    if store._lock.acquire(blocking=False):
        try:
            store._sweep()
        finally:
            store._lock.release()


@dataclass(frozen=True)
class _Version:
    """A model, as long as nothing changes that its tower depends on."""

    number: int
    base: "weakref.ref[Any]"
    weights: Fingerprint
    circumstances: list[Any]

    def still(self, base: Any, now: tuple[Fingerprint, list[Any]]) -> bool:
        weights, circumstances = now
        if self.base() is not base or self.circumstances != circumstances:
            return False
        return self.weights.difference(weights) is None


def bytes_of(size: int | float | str) -> int:
    """A size in bytes, given as a number of them or as text with a unit.

    Raises:
        OptionError: it is neither.
    """
    mend = 'give bytes with their unit, such as "512MB" or "2GiB", or a number of bytes'
    if isinstance(size, str):
        found = _SIZE.fullmatch(size)
        unit = UNITS.get(found[2].upper()) if found else None
        if found is None or unit is None:
            raise OptionError(f"remember={size!r} is no size; {mend}")
        count = float(found[1]) * unit
    elif isinstance(size, bool) or not isinstance(size, (int, float)) or size != size or size in (float("inf"),):
        raise OptionError(f"remember={size!r} is no size; {mend}")
    else:
        count = size
    if count < 1 or count != int(count):
        raise OptionError(f"remember={size!r} is no size; {mend}, or leave it out to keep nothing")
    return int(count)


def encode_remembering(
    store: ImageStore,
    model: Any,
    family: Family,
    modality: str,
    visuals: Mapping[str, Any],
    layouts: list[ImageLayout],
    signals: frozenset[Signal],
) -> tuple[list[EncodedImage], list[bool]]:
    """Run the tower on those images of a call alone that are not known yet, and on each of these once.

    Returns:
        The images, and which of them were known, or stand in the call twice.
    """
    if not _known_to_be_the_same(store, model, visuals):
        return encode_modality(model, family, modality, visuals, layouts, signals), [False] * len(layouts)
    version = store.version_of(model)
    shown, one_by_one = _digests(model, family, modality, visuals, layouts)
    around = _around()
    names: list[Name] = [(version, around, modality, digest) for digest in shown]
    known = store.get(names)
    images = dict(zip(names, known, strict=True))
    missing = [i for i, image in enumerate(known) if image is None or not signals <= image.signals.keys()]
    if missing:
        # With what was read for other methods, or two methods in turn would never find anything.
        signals = signals.union(*(image.signals.keys() for i in missing if (image := known[i]) is not None))
        run = list(range(len(names)))
        if one_by_one:
            first: dict[Name, int] = {}
            for i in missing:
                first.setdefault(names[i], i)
            run = list(first.values())
        some = visuals if len(run) == len(names) else family.take(model, modality, visuals, layouts, run)
        made = encode_modality(model, family, modality, some, [layouts[i] for i in run], signals)
        fresh = {names[i]: image for i, image in zip(run, made, strict=True)}
        store.put(fresh)
        images |= fresh
        ran = set(run)
    else:
        ran = set()
    store.count(len(names) - len(ran), len(ran))
    return [image for name in names if (image := images[name]) is not None], [i not in ran for i in range(len(names))]


class RememberedCrops:
    """Crops of the images of one call, from the store or the tower; each is kept by itself.

    So a question that wants other crops of a picture finds those that it shares with earlier ones, and all of them where the
    picture was encoded whole. No part is ever taken for the whole.
    """

    def __init__(
        self, store: ImageStore, model: Any, family: Family, visuals: Mapping[str, Any], layouts: list[ImageLayout]
    ) -> None:
        self._store, self._model, self._family = store, model, family
        self._visuals, self._layouts = visuals, layouts
        self._names: list[Name] | None = None
        self.ran: set[int] = set()
        """Images of which something went through the tower."""
        if _known_to_be_the_same(store, model, visuals):
            shown, _ = _digests(model, family, "image", visuals, layouts)
            version, around = store.version_of(model), _around()
            self._names = [(version, around, "image", digest) for digest in shown]

    def encode(self, wanted: Sequence[tuple[int, ...]], signals: frozenset[Signal]) -> list[EncodedImage | None]:
        """What `Family.encode_crops` gives, image by image, laid out as the crops that are wanted; None where none are."""
        if self._names is None:
            self.ran |= {i for i, crops in enumerate(wanted) if crops}
            return self._run(list(wanted), signals)
        pairs = [(i, crop) for i, crops in enumerate(wanted) for crop in crops]
        names = {(i, crop): (*self._names[i], crop) for i, crop in pairs}
        known: dict[Name, EncodedImage] = {}
        missing: dict[Name, tuple[int, int]] = {}
        for (i, crop), name in names.items():
            if name not in known and name not in missing:
                found = self._found(i, crop, name)
                if found is not None and signals <= found.signals.keys():
                    known[name] = found
                else:
                    missing[name] = i, crop
                    # With what was read for other methods, or two methods in turn would never find anything.
                    signals = signals if found is None else signals | found.signals.keys()
        if missing:
            run: list[list[int]] = [[] for _ in self._layouts]
            for i, crop in missing.values():
                run[i].append(crop)
                self.ran.add(i)
            made = self._run([tuple(sorted(crops)) for crops in run], signals)
            fresh = {
                name: image.part(*of_some_crops(image.layout, (crop,)))
                for name, (i, crop) in missing.items()
                if (image := made[i]) is not None
            }
            self._store.put(fresh)
            known |= fresh
        images: list[EncodedImage | None] = []
        for i, (layout, crops) in enumerate(zip(self._layouts, wanted, strict=True)):
            parts = [(known[names[i, crop]], (crop,)) for crop in crops]
            images.append(joined(layout, parts, of_some_crops(layout, crops)[1]) if parts else None)
        return images

    def _found(self, image: int, crop: int, name: Name) -> EncodedImage | None:
        """This crop of the image, by itself or as a part of the whole."""
        own, whole = self._store.get([name, name[:-1]])
        if (
            own is not None or whole is None or self._family.knows_thumbnail
        ):  # of which the pixels have to be seen first
            return own
        return whole.part(*of_some_crops(self._layouts[image], (crop,)))

    def _run(self, wanted: list[tuple[int, ...]], signals: frozenset[Signal]) -> list[EncodedImage | None]:
        made = self._family.encode_crops(self._model, self._visuals, self._layouts, wanted, signals)
        parts = [of_some_crops(layout, crops)[1] for layout, crops in zip(self._layouts, wanted, strict=True)]
        return [*encoded_parts(self._family, made, parts)]


def _known_to_be_the_same(store: ImageStore, model: Any, visuals: Mapping[str, Any]) -> bool:
    """Whether the same pixels are known to give the same features, and no gradient is to flow through them.

    Raises:
        UnsupportedCallError: the model is sharded: where one process finds an image and another does not, that one would wait
            for the first one's weights for ever.
    """
    if torch.compiler.is_compiling() or any(value.is_meta for value in _tensors(visuals)):
        return False
    learning = torch.is_grad_enabled()
    if learning and any(value.requires_grad for value in _tensors(visuals)):
        return False
    for _, module in outside_the_language_model(model, names=False):
        if spread_over_processes(module):
            raise UnsupportedCallError(
                "remember= cannot be used with a model that is sharded (FSDP, ZeRO-3): a process that knows an image would "
                "not take part when others gather the tower's weights, and they would wait for ever; leave it out"
            )
        if module is model or module is model.model:
            continue  # they hold the language model, and say nothing about the tower
        if module.training:
            store.tell(
                "training",
                "remember= keeps nothing while tower or projector drop out as in training; call model.eval()",
            )
            return False
        if learning and _learns(module):
            store.tell("gradients", LEARNING)
            return False
    if learning and (_learns(model) or _learns(model.model)):  # as the newline of LLaVA-NeXT
        store.tell("gradients", LEARNING)
        return False
    return True


LEARNING = (
    "remember= keeps nothing while tower or projector get gradients; run under torch.no_grad(), or freeze both where the "
    "language model alone is to learn"
)


def _learns(module: Any) -> bool:
    """Whether a parameter of this very module does."""
    return any(weight is not None and weight.requires_grad for weight in module._parameters.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(_tensors, value.values()))
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(map(_tensors, value))


def _digests(
    model: Any, family: Family, modality: str, visuals: Mapping[str, Any], layouts: list[ImageLayout]
) -> tuple[list[str], bool]:
    """(per image a hash of all that the call says about it, whether each can be encoded without the others)."""
    try:
        each = [family.take(model, modality, visuals, layouts, [i]) for i in range(len(layouts))]
    except UnsupportedCallError:  # OneVision reads an image alone in another way than several
        whole = digest_of([visuals, [_lying(layout) for layout in layouts]])
        return [f"{whole} {i}" for i in range(len(layouts))], False
    return [
        digest_of([_unpadded(modality, own), _lying(layout)]) for own, layout in zip(each, layouts, strict=True)
    ], True


def _lying(layout: ImageLayout) -> tuple[Any, ...]:
    return layout.source, layout.crops, layout.rows, layout.columns, layout.tiling, layout.frames


def _unpadded(modality: str, visuals: Mapping[str, Any]) -> dict[str, Any]:
    """Without what fills an image up to the largest of its batch: tiles, or rows and columns. The layout and the sizes beside
    it say what is real."""
    found = dict(visuals)
    for name, value in visuals.items():
        if modality != "image" or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if value.dim() == 5:
            found[name] = _ends(value, 1)
        elif value.dim() == 4 and "image_sizes" in visuals:
            found[name] = _ends(_ends(value, 2), 3)
    return found


def _ends(value: Tensor, axis: int) -> Tensor:
    """Up to the last place along an axis that is not all zero."""
    if value.shape[axis] and not value.select(axis, -1).any():
        there = (value != 0).movedim(axis, 0).flatten(1).any(1).nonzero()
        value = value.narrow(axis, 0, int(there[-1]) + 1 if len(there) else 0)
    return value


def _around() -> tuple[Any, ...]:
    """What a call of the tower stands in: autocast, and the stream of the accelerator. What one stream writes is not there
    yet for another."""
    kinds, stream = ["cpu"], None
    if torch.accelerator.is_available():
        kinds.append(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]
        stream = torch.accelerator.current_stream().stream_id
    return stream, *(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)


def _circumstances(model: Any) -> list[Any]:
    """What the tower may depend on beside what a fingerprint knows: hooks, and the whole configuration."""
    found: list[Any] = []
    for _, module in outside_the_language_model(model, names=False):
        inside = module.__dict__
        if module is not model and module is not model.model:
            hooks = {**inside["_forward_hooks"], **inside["_forward_pre_hooks"]}  # numbered through
            found.append(tuple(number for number in hooks if _changes(hooks[number])))
    settings = settings_of(model.config, model.config.get_text_config())
    return [*found, *(f"{path}={value!r}" for path, value in settings)]


def _changes(hook: Any) -> bool:
    """Whether a hook may change something: those that transformers adds when a model is called first do not."""
    return not (getattr(hook, "__module__", None) or "").startswith("transformers.")
