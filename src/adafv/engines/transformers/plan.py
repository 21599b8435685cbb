"""Step 2 of `compress`: what is to become of every image, decided on the host before the tower runs."""

import warnings

from adafv.core.select import check_method, cuts_of, plan_of
from adafv.core.tokens import STRINGS, WORD_ATTENTION, WORDS, Signal
from adafv.engines.transformers.call import Call, ImageJob
from adafv.engines.transformers.columns import refuse_unknown_columns
from adafv.engines.transformers.crops import check_training
from adafv.engines.transformers.families import CallWithImages
from adafv.engines.transformers.layers import check_call, decoder_of
from adafv.engines.transformers.releases import cache_of
from adafv.errors import MethodError, NoWordsError, UnsupportedCallError, UnsupportedModelError
from adafv.methods.base import IMAGE, LAYERS, TOKENS, TOWER
from adafv.prompts.text import text_columns


def plan_images(call: Call) -> None:
    """Give every image its budget, and those that lose tokens their words, their method and its plan."""
    for job in call.jobs:
        job.keep = call.settings.budget.tokens(job.image.layout.tokens)
        if job.image.modality == "image":
            job.keep = min(job.keep, call.settings.crops_of(job.image.row).tokens(job.image.layout))
    losing = [job for job in call.jobs if job.lost]
    if losing:
        check_training(call)
    if call.jobs:
        cached, packed = call.prefix.length > 0, bool(losing) and call.packed
        call.family.check_call(
            call.model,
            CallWithImages(call.inputs, tuple(call.visuals), cache_of(call.inputs), cached, call.generates, packed),
        )
    for job in losing:
        if call.settings.method.needs_words:
            _find_words(call, job)
        _check_method(call, job)
        if LAYERS in job.method.stages:
            _plan_cuts(call, job)
            continue
        job.plan = plan_of(job.method, job.image.layout, job.keep)
        job.keep = job.keep if job.plan.keep is None else job.plan.keep
        _follow(call, job)
    if any(job.cuts for job in losing):
        check_call(call)
    if losing or call.prefix.changed:
        refuse_unknown_columns(call.inputs, (call.prompt.length, call.prefix.length + call.prompt.length))


def _plan_cuts(call: Call, job: ImageJob) -> None:
    """Where the tokens of an image go inside the language model; in front of it all of them stay."""
    if job.method.stages != {LAYERS}:
        others = ", ".join(sorted(job.method.stages - {LAYERS}))
        raise MethodError(
            f"the method {job.method.name} acts inside the language model and elsewhere ({others}); one method acts in one "
            "place: make two of it"
        )
    if job.method.may_repeat:
        raise MethodError(
            f"the method {job.method.name} acts inside the language model, where a token cannot be repeated; leave "
            "may_repeat out"
        )
    depth = len(decoder_of(call.model).layers)
    job.cuts = cuts_of(job.method, depth, job.image.layout.tokens, job.keep)
    job.keep = job.image.layout.tokens


def _find_words(call: Call, job: ImageJob) -> None:
    """The columns of the text that counts for an image. Where no word does, another method chooses, and a warning says so:
    "hello" may be all template."""
    settings, image = call.settings, job.image
    try:
        job.text = text_columns(call.prompt, image, settings.scope, settings.template)
        if WORD_ATTENTION in settings.method.needs:
            job.text = job.text[job.text > int(image.columns[-1])]
            if not len(job.text):
                raise NoWordsError("no word that counts stands behind it, and words in front do not look at it")
    except NoWordsError as error:
        job.method = settings.method_without_text
        if job.method.needs_words:
            raise
        warnings.warn(
            f"no word of the prompt counts for {image.modality} {image.number}, so its tokens were chosen by "
            f"{job.method.name} alone ({error})",
            stacklevel=2,
        )


def _check_method(call: Call, job: ImageJob) -> None:
    """Refuse what this call, this family or this model cannot give the method."""

    def has(signal: Signal) -> bool:
        if signal == STRINGS:
            return call.settings.tokenizer is not None and _ids_known(call, job) and LAYERS not in job.method.stages
        return signal == WORDS or (signal.of_layers and LAYERS in job.method.stages)

    stages = {IMAGE, TOKENS, LAYERS} if call.wrapped else {IMAGE, TOKENS}  # `compress` makes inputs and no more
    check_method(job.method, "transformers", frozenset(stages), has, (TOKENS, TOWER))
    if job.method.may_repeat and call.family.rotary_axes:
        raise MethodError(
            f"the method {job.method.name} may repeat tokens, or turn their order, so they have no positions in time, height "
            f"and width, as {call.family.name} gives them; use another method, or another option of it"
        )
    try:
        call.family.check_signals(call.model, job.method.of_tower)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"the method {job.method.name} does not fit this model: {error}") from error


def _ids_known(call: Call, job: ImageJob) -> bool:
    """Whether the words of an image came as ids; in embeddings, special tokens alone are found."""
    return job.text is None or bool((call.prompt.tokens[job.image.row, job.text] >= 0).all())


def _follow(call: Call, job: ImageJob) -> None:
    """Lay the image out as the plan says, where the family can."""
    plan, family, modality = job.plan, call.family, job.image.modality
    assert plan is not None
    if plan.grid is not None and not (family.downsamples and modality == "image" and call.encoded is None):
        where = (
            f"for the {modality}s of {family.name}" if call.encoded is None else "for images that are encoded already"
        )
        raise UnsupportedCallError(
            f"images at lower resolution are not supported {where}; use another method, or scale the images before the "
            "processor"
        )
    if plan.arranged is not None and family.arranges and modality == "image":
        if call.encoded is not None:
            raise UnsupportedCallError(
                f"the method {job.method.name} lays tokens out in another way than encoded images hold them; pass the "
                "images themselves"
            )
        job.layout = plan.arranged
