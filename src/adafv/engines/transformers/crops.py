"""Step 3 where not all crops are worth a run of the tower: the thumbnails first, and of the other crops those that their
scores ask for.

What was not encoded is not there: a method sees the tokens of the crops that were, and what it keeps is written back as
places among all tokens of the image, so that nothing behind it knows the difference.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adafv.core.crops import (
    AUTO,
    MEND,
    THUMBNAIL,
    Crops,
    chosen_crops,
    first_crops,
    joined,
    of_some_crops,
    shares_of_crops,
)
from adafv.core.crops import chooses as need_not_all
from adafv.core.crops import decides as thumbnail_decides
from adafv.core.encoded import EncodedImage
from adafv.core.layout import ImageLayout
from adafv.core.tokens import SALIENCY, Signal
from adafv.engines.transformers.call import Call, ImageJob
from adafv.engines.transformers.devices import spread_over_processes
from adafv.engines.transformers.encoded import encoded_parts
from adafv.engines.transformers.families.base import Family
from adafv.engines.transformers.record import ImageRecord
from adafv.engines.transformers.releases import cache_of
from adafv.engines.transformers.remembered import RememberedCrops
from adafv.errors import UnsupportedCallError, UnsupportedModelError


def check_crops(crops: Crops, family: Family, model: Any) -> None:
    """The one place where a model is refused whose crops cannot be chosen from.

    Raises:
        UnsupportedModelError: the family shows one view of an image, or shows crops as images of their own, or mixes them.
    """
    if not crops.chosen:
        return
    if family.knows_thumbnail and crops.most != 0:
        raise UnsupportedModelError(
            f"crops={str(crops)!r}: in {family.name} nothing says which crop lies where, so the thumbnail cannot say which "
            f"of them are worth it; give crops={THUMBNAIL!r} or {AUTO!r}, or {MEND}"
        )
    if not family.spares_crops:
        raise UnsupportedModelError(
            f"crops={str(crops)!r}: in {family.name} images are not cut into a thumbnail and crops, or crops are images of "
            f"their own; {MEND}"
        )
    family.check_signals(model, [SALIENCY])


def chooses(call: Call, job: ImageJob) -> bool:
    """Whether some crops of an image need not be encoded."""
    if not call.family.spares_crops or job.image.modality != "image" or job.plan is None:
        return False
    layout, crops = job.image.layout, call.settings.crops_of(job.image.row)
    return need_not_all(crops, layout, job.plan, job.method, arranged=job.layout is not layout)


def decides(call: Call, job: ImageJob) -> bool:
    """Of an image whose crops are chosen, whether its thumbnail says which ones."""
    return thumbnail_decides(call.settings.crops_of(job.image.row), job.plan)


def check_training(call: Call) -> None:
    """Raise UnsupportedCallError where a model learns."""
    if call.settings.crops.chosen and call.model.training and torch.is_grad_enabled():
        raise UnsupportedCallError(
            f"crops={str(call.settings.crops)!r} runs the tower once or twice, by the picture, which processes that train "
            f"together would wait for in vain, and crops that were left out teach nothing; to train, {MEND}"
        )
    if call.settings.crops.chosen and any(spread_over_processes(part) for part in call.model.modules()):
        raise UnsupportedCallError(
            f"crops={str(call.settings.crops)!r} runs the tower once or twice, by the picture, and processes that share the "
            f"weights of a sharded model would wait for each other in vain; {MEND}"
        )


def encode_chosen(
    call: Call,
    jobs: Sequence[ImageJob],
    visuals: Mapping[str, Any],
    images: Mapping[int, EncodedImage] | None,
    signals: frozenset[Signal],
) -> None:
    """Give these images what the tower makes of the crops that are worth it, and what is left of their layouts.

    Args:
        visuals: of these images alone.
        images: by number; where they are encoded already, whole. The same crops are chosen then.
    """
    some = _SomeCrops(call, jobs, visuals, images)
    first = [first_crops(job.plan) for job in jobs]
    deciding = [job for job in jobs if decides(call, job)]
    found = some.encode(first, signals | {SALIENCY} if deciding else signals)
    others: list[tuple[int, ...]] = [()] * len(jobs)
    if deciding:
        thumbnails = {id(job): image for job, image in zip(jobs, found, strict=True) if image is not None}
        decided = decide(call, deciding, [thumbnails[id(job)] for job in deciding])
        chosen = {id(job): crops for job, crops in zip(deciding, decided, strict=True)}
        others = [chosen.get(id(job), ()) for job in jobs]
    more = some.encode(others, signals) if any(others) else [None] * len(jobs)
    for job, one, two, crops, rest in zip(jobs, found, more, first, others, strict=True):
        layout = job.image.layout
        job.crops = (*crops, *rest)
        job.places, left = some.once(of_some_crops, layout, job.crops)
        job.encoded = one if two is None or not rest else some.once(_joined, layout, one, crops, two, rest, left)
    some.count()


class _SomeCrops:
    """Some crops of the images of a call: as a store remembers them, as parts of whole encoded images, or from the tower."""

    def __init__(
        self,
        call: Call,
        jobs: Sequence[ImageJob],
        visuals: Mapping[str, Any],
        images: Mapping[int, EncodedImage] | None,
    ) -> None:
        """See `encode_chosen`.

        Raises:
            UnsupportedCallError: encoded images do not say whether their first crop is a thumbnail.
        """
        if images is not None and call.family.knows_thumbnail:
            raise UnsupportedCallError(
                f"crops={str(call.settings.crops)!r}: in {call.family.name} pixels alone say whether a crop is a thumbnail, "
                f"and these images are encoded already; pass the images themselves, or {MEND}"
            )
        self._call, self._jobs, self._visuals = call, jobs, visuals
        self._whole = None if images is None else [images[job.image.number] for job in jobs]
        self._layouts = [job.image.layout for job in jobs]
        self._known: dict[Any, Any] = {}
        self._store = call.settings.store if images is None else None
        self._remembered = (
            None
            if self._store is None
            else RememberedCrops(self._store, call.model, call.family, visuals, self._layouts)
        )

    def once(self, make: Callable[..., Any], *given: Any) -> Any:
        """`make(*given)`, made once: several prompts may show one image."""
        key = make, *(each if isinstance(each, tuple) else id(each) for each in given)
        if key not in self._known:
            self._known[key] = make(*given), given  # which stay alive, and so their ids their own
        return self._known[key][0]

    def encode(self, wanted: list[tuple[int, ...]], signals: frozenset[Signal]) -> Sequence[EncodedImage | None]:
        """Per image the crops that are wanted of it; None, perhaps, where that is none."""
        if self._remembered is not None:
            return self._remembered.encode(wanted, signals)
        parts = [self.once(of_some_crops, layout, crops) for layout, crops in zip(self._layouts, wanted, strict=True)]
        if self._whole is not None:
            return [
                self.once(EncodedImage.part, image, places, layout)
                for image, (places, layout) in zip(self._whole, parts, strict=True)
            ]
        made = self._call.family.encode_crops(self._call.model, self._visuals, self._layouts, wanted, signals)
        return encoded_parts(self._call.family, made, [layout for _, layout in parts])

    def count(self) -> None:
        """Tell the store, and the call, for which images the tower ran."""
        if self._store is None or self._remembered is None:
            return
        ran = self._remembered.ran
        self._store.count(len(self._jobs) - len(ran), len(ran))
        self._call.remembered |= {("image", job.image.number) for i, job in enumerate(self._jobs) if i not in ran}


def decide(call: Call, jobs: Sequence[ImageJob], thumbnails: Sequence[EncodedImage]) -> list[tuple[int, ...]]:
    """Per image the crops beside the thumbnail that are worth a run of the tower; one wait for the device."""
    embedded = call.embedded_words([job for job in jobs if job.text is not None], thumbnails[0].features.device)
    groups: dict[Any, list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault((id(job.image.layout), job.text is not None), []).append(i)
    shares: list[Tensor] = []
    for members in groups.values():
        texts = [found[0] for i in members if (found := embedded.get(id(jobs[i]))) is not None]
        shown = [thumbnails[i] for i in members]
        shares.append(shares_of_crops(jobs[members[0]].image.layout, shown, texts).flatten())
    values = torch.cat(shares).tolist()  # the one wait: which crops the tower sees next is for the host to know
    decided: list[tuple[int, ...]] = [()] * len(jobs)
    for members in groups.values():
        layout = jobs[members[0]].image.layout
        for i in members:
            own, values = values[: layout.crops - 1], values[layout.crops - 1 :]
            most = call.settings.crops_of(jobs[i].image.row).most
            assert most is not None  # without a number all are encoded
            decided[i] = chosen_crops(own, most)
    return decided


def _joined(
    layout: ImageLayout,
    one: EncodedImage,
    crops: tuple[int, ...],
    two: EncodedImage,
    rest: tuple[int, ...],
    left: ImageLayout,
) -> EncodedImage:
    return joined(layout, [(one, crops), (two, rest)], left)


def check_auto(crops: Crops) -> None:
    """Raise UnsupportedCallError where no answer is generated that could be more or less certain."""
    if crops.certain is not None:
        raise UnsupportedCallError(
            f"crops={AUTO!r} goes by how certain the first token of an answer is, which `generate` of a wrapped model alone "
            f"knows; give crops={THUMBNAIL!r} or a number here, or {MEND}"
        )


def check_twice(arguments: Mapping[str, Any]) -> None:
    """Raise UnsupportedCallError for a call of `generate` that cannot be made a second time as it was made first."""
    for name, why in (
        ("streamer", "has been told the prompt by then"),
        ("custom_generate", "may give back anything"),
        ("assistant_model", "guesses tokens ahead"),
        ("prompt_lookup_num_tokens", "guesses tokens ahead"),
    ):
        if arguments.get(name) is not None:
            raise UnsupportedCallError(
                f"crops={AUTO!r} may have to generate an answer twice, but {name} {why}; give crops={THUMBNAIL!r} or a "
                f"number, or {MEND}"
            )
    if cache_of(arguments) is not None:
        raise UnsupportedCallError(
            f"crops={AUTO!r} may have to generate an answer twice, but the prompt stays in the cache that was passed; "
            f"pass the whole conversation without one, give crops={THUMBNAIL!r} or a number, or {MEND}"
        )


def unsure_rows(
    crops: Crops, logits: Tensor, images: Sequence[ImageRecord], rows: int
) -> tuple[list[float], frozenset[int]]:
    """(how probable the first token of every answer is, prompts that are to be asked again with all crops).

    Args:
        logits: [rows * n, V] of the first token, n answers to each prompt.
        images: what became of them; prompts whose images show all that there is are not asked again.
    """
    assert crops.certain is not None
    first = logits[:: len(logits) // rows].float().softmax(-1).amax(-1).tolist()
    more = {image.prompt for image in images if image.crops is not None and len(image.crops) < image.layout.crops}
    return first, frozenset(row for row in more if not first[row] >= crops.certain)
