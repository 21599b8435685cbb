"""Step 3 of `compress`: the tower, once per modality, or where images are scaled down once per grid."""

from collections.abc import Mapping
from typing import Any

from adafv.core import ImageLayout
from adafv.core.encoded import EncodedImage
from adafv.core.tokens import SALIENCY, Signal
from adafv.engines.transformers.call import Call, ImageJob
from adafv.engines.transformers.crops import chooses, decides, encode_chosen
from adafv.engines.transformers.encoded import encode_modality
from adafv.engines.transformers.remembered import encode_remembering
from adafv.errors import StaleImagesError, UnsupportedModelError


def encode_images(call: Call) -> None:
    """Give every image what the tower makes of it."""
    signals = frozenset[Signal]().union(
        *(job.method.of_tower for job in call.jobs if job.cuts or (job.plan is not None and job.plan.grid is None))
    )
    for modality in call.visuals:
        jobs = [job for job in call.jobs if job.image.modality == modality]
        choosing = [job for job in jobs if chooses(call, job)]
        whole = [job for job in jobs if job not in choosing]
        if call.encoded is not None:
            needed = signals | {SALIENCY} if any(decides(call, job) for job in choosing) else signals
            images = _encoded_before(call, modality, needed)
        else:
            images = _run(call, modality, jobs, whole, signals) if whole else {}
        for job in whole:
            job.encoded = images[job.image.number].part(job.image.part, job.layout)
        if choosing:
            visuals = call.visuals[modality]
            if whole and call.encoded is None:
                layouts = [job.image.layout for job in jobs]
                visuals = call.family.take(
                    call.model, modality, visuals, layouts, [jobs.index(job) for job in choosing]
                )
            encode_chosen(call, choosing, visuals, None if call.encoded is None else images, signals)


def _run(
    call: Call, modality: str, jobs: list[ImageJob], some_jobs: list[ImageJob], signals: frozenset[Signal]
) -> dict[int, EncodedImage]:
    """Encode the images of `some_jobs`, of all those of the call (`jobs`)."""
    model, family, inputs = call.model, call.family, call.visuals[modality]
    grids = {job.image.number: None if job.plan is None else job.plan.grid for job in some_jobs}
    # Frames of a video share its tower run; the layout of the video is not kept beside theirs.
    layouts = {job.image.number: job.layout for job in jobs}
    if any(job.image.frame is not None for job in jobs):
        whole = family.layouts(model, modality, inputs, call.prompt.runs(modality))
        layouts = dict(enumerate(whole))
    images: dict[int, EncodedImage] = {}
    for grid in set(grids.values()):
        wanted = [number for number in sorted(grids) if grids[number] == grid]
        some, lying = inputs, [layouts[number] for number in wanted]
        if len(wanted) < len(layouts):
            some = family.take(model, modality, inputs, [layouts[number] for number in sorted(layouts)], wanted)
        if grid is None:
            part = _encoded(call, modality, wanted, some, lying, signals)
        else:
            smaller = family.encode_smaller(model, some, lying, grid)
            if any(len(features) != grid[0] * grid[1] for features in smaller):
                raise UnsupportedModelError(
                    f"the family {family.name} gave {[len(features) for features in smaller]} tokens for images at "
                    f"{grid[0]} x {grid[1]}; give {grid[0] * grid[1]} for each"
                )
            part = [EncodedImage(features, {}, layout) for features, layout in zip(smaller, lying, strict=True)]
        images.update(zip(wanted, part, strict=True))
    return images


def _encoded(
    call: Call,
    modality: str,
    numbers: list[int],
    visuals: Mapping[str, Any],
    layouts: list[ImageLayout],
    signals: frozenset[Signal],
) -> list[EncodedImage]:
    """Images at full resolution, by the tower or from the store."""
    store = call.settings.store
    if store is None:
        return encode_modality(call.model, call.family, modality, visuals, layouts, signals)
    images, known = encode_remembering(store, call.model, call.family, modality, visuals, layouts, signals)
    call.remembered |= {(modality, number) for number, found in zip(numbers, known, strict=True) if found}
    return images


def _encoded_before(call: Call, modality: str, signals: frozenset[Signal]) -> dict[int, EncodedImage]:
    assert call.encoded is not None
    name, needed = call.settings.method.name, frozenset[Signal]().union(*(job.method.of_tower for job in call.jobs))
    for signal in sorted(signals - call.encoded.signals, key=str):
        what, given = (
            (f"the method {name}", repr(name)) if signal in needed else ("choosing crops", f"[{name!r}, 'saliency']")
        )
        raise StaleImagesError(
            f"these images were encoded without {signal}, which {what} needs; encode them for it: "
            f"adafv.encode(model, inputs, method={given})"
        )
    return dict(enumerate(call.encoded.take(modality, call.numbers[modality], call.device)))
