"""`AdaFV` and `Pruner`: pruning around `generate` and `forward` of one model.

How a model is wrapped. While enabled, the model object (and no other) has a class of its own, derived from its stock
class, in which `generate` and `forward` are descriptors that lead here; PyTorch's own parametrisations and FSDP2 work
the same way. Compared with replacing the methods on the object this has three advantages: the object's dictionary stays
untouched, so disabling restores the model exactly; a replaced `forward` (accelerate's device hooks put one there) is
overruled but still called; and a copy of the model can be given the stock class back, instead of methods that are bound
to the original. Hooks on modules, which kvpress uses, see one forward pass; we must see the whole `generate`.

The stock methods are called on a second object of the stock class that shares the model's dictionary. So the decoding
loop never meets the wrapper again, and nothing of one call is stored on a module: two threads may call one model.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from adafv.core import Budget
from adafv.core.crops import Crops
from adafv.engines.transformers.cache import cached_length, contents_of, holds_pruned, opened, remember
from adafv.engines.transformers.call import CompressedInputs
from adafv.engines.transformers.compress import compress_call
from adafv.engines.transformers.crops import check_auto, check_crops, check_twice, unsure_rows
from adafv.engines.transformers.devices import host_by_default, sharded_parts_ready
from adafv.engines.transformers.encoded import HANDLE, encoded_in, refuse_other_images
from adafv.engines.transformers.families.base import family_of, stock_model
from adafv.engines.transformers.generation import (
    FirstToken,
    PromptRestorer,
    RestoredPrompts,
    RestoredStreamer,
    decoding_sees,
    fill_in_mask,
    first_token_seen_by,
    refuse_mixed_up,
    refuse_unsupported,
    shift_lengths,
)
from adafv.engines.transformers.outputs import in_the_callers_columns, logits_asked_for, of_generate
from adafv.engines.transformers.record import Record, timed
from adafv.engines.transformers.releases import (
    CACHE_NAMES,
    cache_of,
    holds_a_cache,
    named_for_this_release,
    returned_cache,
    warn_if_untested,
)
from adafv.engines.transformers.remembered import ImageStore
from adafv.engines.transformers.settings import Settings, said, setting
from adafv.errors import AlreadyEnabledError, NoRecordError, UnsupportedCallError
from adafv.methods import Method


class Pruner:
    """Any method, applied to a model.

        with Pruner("saliency", keep=64)(model) as pruner:
            output = model.generate(**inputs)
        pruner.last.kept

    Args:
        method: a name (see `adafv methods`) or a `Method`.
        keep: tokens per image over all its crops (64), or share of the image's tokens (0.1 or "10%"; 1.0 or "all" keeps
            all); see `adafv.core.Budget`.
        positions: "compact": tokens move up to close the gaps, as in the paper; "original": each keeps the position it
            has in the full prompt. With M-RoPE (Qwen), where there are no gaps, both are the same; so they are for methods
            that act inside the language model, where tokens keep the positions of the full prompt.
        text: which text counts, "question", "turn" or "after"; see `adafv.prompts.text`. None: "question"
            with a processor whose chat template shows the user's words, else "turn".
        processor: the model's processor, to know its chat template.
        video: what `keep` counts in a video: "clip", the tokens over all its frames, which compete with each other; or
            "frame", the tokens of each frame.
        logits: what `forward` returns logits (and hidden states, and attentions) of: "prompt", the columns of the prompt as
            given, NaN at those that were dropped, so that code that slices by its own prompt fits; or "kept", the shorter
            prompt alone, which takes less memory. Where gradients are recorded, a dropped column has the logits of the
            kept one in front of it, which the next kept token is predicted from: a loss outside the model is then the loss
            inside it.
        crops: of an image that the model sees as a thumbnail and crops, those that go through the tower: "all"; "thumbnail",
            none beside it; a number, the thumbnail first and then so many that its scores rank first; or "auto", in
            `generate` alone, the thumbnail first and all where the first token of the answer is not certain. Tokens of other
            crops cannot stay, so K may be smaller. See docs/crops.md.
        remember: keep encoded images, so that one that is shown again does not go through the tower again: bytes, as a number
            or with a unit ("512MB"), or an `ImageStore`, which several pruners and models may share. See `ImageStore`.
        **parameters: of the method, where it is given by name.

    Raises:
        BudgetError, OptionError: an option is wrong; a budget is checked against the image at the call.
    """

    def __init__(
        self,
        method: str | Method,
        keep: Budget | int | float | str,
        *,
        positions: str = "compact",
        text: str | None = None,
        processor: Any = None,
        video: str = "clip",
        logits: str = "prompt",
        crops: Crops | str | int = "all",
        remember: ImageStore | int | float | str | None = None,
        **parameters: Any,
    ) -> None:
        self.settings = Settings.of(
            method, keep, positions, text, processor, video, logits, crops, remember, **parameters
        )

    def __call__(self, model: Any) -> "PrunedModel":
        """Prepare `model`; nothing changes until the result is entered (`with`) or `enable` is called.

        Raises:
            UnsupportedModelError: the model cannot be pruned correctly.
        """
        return PrunedModel(model, self.settings)


class AdaFV(Pruner):
    """AdaFV (arXiv 2501.09532): keep the visual tokens with the largest geometric mean of text attention and saliency.

        with AdaFV(keep=64)(model) as adafv:
            output = model.generate(**inputs)
        adafv.last.kept

    Args:
        keep, positions, text, processor, video, logits, crops, remember: see `Pruner`.
        objective: how the geometric mean is maximised: "joint" (the best set that can be found, with a certificate), "split"
            (the paper's search) or "frank-wolfe" (what "joint" was before).
        variant: "corrected", or "published" for the published code to the letter, bugs and token layout included; then
            `text` defaults to "after", as there.
    """

    def __init__(
        self,
        keep: Budget | int | float | str,
        *,
        objective: str = "joint",
        variant: str = "corrected",
        positions: str = "compact",
        text: str | None = None,
        processor: Any = None,
        video: str = "clip",
        logits: str = "prompt",
        crops: Crops | str | int = "all",
        remember: ImageStore | int | float | str | None = None,
    ) -> None:
        super().__init__(
            "adafv",
            keep,
            positions=positions,
            text=text,
            processor=processor,
            video=video,
            logits=logits,
            crops=crops,
            remember=remember,
            objective=objective,
            variant=variant,
        )


class PrunedModel:
    """A model and how it is pruned; a context manager, or switched by `enable` and `disable`."""

    def __init__(self, model: Any, settings: Settings) -> None:
        warn_if_untested()
        self.model = stock_model(model)
        self.settings = settings
        self.family = family_of(self.model)
        check_crops(settings.crops, self.family, self.model)
        self._stock: Any = None
        # What is raised while a model is being compiled is not seen outside, so this is not compiled.
        self._refuse_compiled = torch.compiler.disable(_refuse_compiled)
        self._latest: Record | None = None
        self._own = threading.local()

    @property
    def last(self) -> Record:
        """What the last run with images did: the last of this thread, or else the last of any thread.

        Raises:
            NoRecordError: there was none yet.
        """
        record: Record | None = getattr(self._own, "record", None) or self._latest
        if record is None:
            raise NoRecordError("nothing was pruned yet: run the model with an image first, then read `last`")
        return record

    @property
    def remembered(self) -> ImageStore | None:
        """The images that are kept, with `hits`, `misses` and `bytes`; None where `remember` was not asked for."""
        return self.settings.store

    @property
    def enabled(self) -> bool:
        return self.model.__dict__.get(HANDLE) is self

    def enable(self) -> "PrunedModel":
        """Prune from now on.

        Raises:
            AlreadyEnabledError: the model is wrapped, by this object or by another.
        """
        with _enabling:
            if HANDLE in self.model.__dict__:
                raise AlreadyEnabledError(
                    f"this {type(self.model).__name__} is already wrapped by adafv; leave the other `with` block first, or "
                    "call disable() on what enable() returned"
                )
            stock_class: Any = type(self.model)
            self._stock = _blank(_inner_class(stock_class))
            object.__setattr__(self._stock, "__dict__", self.model.__dict__)
            self.model.__dict__[HANDLE] = self
            self.model.__class__ = _wrapped_class(stock_class)
        return self

    def disable(self) -> None:
        """Make the model exactly what it was. Does nothing where it is not enabled."""
        with _enabling:
            if self.enabled:
                self.model.__class__ = type(self.model).__mro__[1]
                del self.model.__dict__[HANDLE]

    def __enter__(self) -> "PrunedModel":
        return self.enable()

    def __exit__(self, *exception: Any) -> None:
        self.disable()

    @property
    def _inside(self) -> bool:
        """Whether this thread is in a call of the wrapped model."""
        return getattr(self._own, "depth", 0) > 0

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self._own.depth = getattr(self._own, "depth", 0) + 1
        try:
            yield
        finally:
            self._own.depth -= 1

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        stock = self._stock
        arguments = _by_name(stock.generate, args, kwargs)
        both = "inputs" in arguments and "input_ids" in arguments  # an error, which is for the stock model to raise
        if both or not self._concerned(arguments):
            return stock.generate(*args, **kwargs)
        self._check_compiled(arguments)
        arguments = named_for_this_release(arguments)
        if "inputs" in arguments:
            arguments["input_ids"] = arguments.pop("inputs")
        if self.settings.crops.certain is None or not self._visuals(arguments):
            return self._generate_once(arguments, self.settings)
        return self._generate_until_certain(arguments)

    def _generate_until_certain(self, arguments: dict[str, Any]) -> Any:
        """With the thumbnails; and where the first token of an answer is not certain, all answers again with more crops.

        The first call ends at that token, so asking again costs a prefill, and nothing that draws, looks at tokens or counts
        them has been asked by then.
        """
        check_twice(arguments)
        prompts = next(arguments[name] for name in ("input_ids", "inputs_embeds") if name in arguments)
        certainty: list[float] = []

        def look(scores: Tensor) -> None:
            found, unsure = unsure_rows(self.settings.crops, scores, self.last.images, len(prompts))
            certainty.extend(found)
            if unsure:
                raise _UnsureError(unsure)

        first, seconds = FirstToken(look), {}
        try:
            with first_token_seen_by(first):
                output = self._generate_once(dict(arguments), self.settings)
        except _UnsureError as error:
            unsure, seconds = error.rows, self.last.seconds
        else:
            unsure = frozenset()
        if not first.seen:
            raise UnsupportedCallError(
                "this way of generating asks no logits processor, so nothing says how certain an answer is; give "
                "crops='thumbnail' or a number, or leave crops out"
            )
        if unsure:
            output = self._generate_once(arguments, replace(self.settings, unsure=unsure))
        record = self.last
        record.seconds = {name: seconds.get(name, 0.0) + value for name, value in record.seconds.items()}
        record.certainty = certainty
        return output

    def _generate_once(self, arguments: dict[str, Any], settings: Settings) -> Any:
        stock = self._stock
        refuse_unsupported(self.model, self.family, arguments)
        restorer = None
        with host_by_default(), torch.no_grad():
            fill_in_mask(self.model, arguments)
            with sharded_parts_ready(self.model):
                call = compress_call(stock, self.family, settings, arguments, whole_conversation=True, wrapped=True)
            refuse_mixed_up(self.model, call)
            prompt = arguments.get("input_ids")
            if call.contents is not None:
                if prompt is not None and prompt.shape[1] > 0:
                    restorer = PromptRestorer(prompt, call["input_ids"], arguments.get("attention_mask"))
                    if call.get("streamer") is not None:
                        call["streamer"] = RestoredStreamer(call["streamer"], restorer)
                name = "inputs_embeds" if restorer is None else "input_ids"
                shift_lengths(self.model, call, arguments[name].shape[1], call[name].shape[1])
        with decoding_sees(restorer):
            output = self._run(call, stock.generate)
        with host_by_default(), torch.no_grad():
            own_loop = arguments.get("custom_generate") is not None
            if restorer is not None:
                restore = restorer.restore_if_there if own_loop else restorer.restore
                if isinstance(output, ModelOutput) and getattr(output, "sequences", None) is not None:
                    output.sequences = restore(output.sequences)
                elif isinstance(output, torch.Tensor):
                    output = restore(output)
            one_answer = not own_loop and (setting(self.model, arguments, "num_beams") or 1) == 1
            self._remember(call, output, cache_of(arguments), one_answer)
            if self.settings.logits == "prompt" and call.contents is not None and isinstance(output, ModelOutput):
                of_generate(output, call)
        return output

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        stock = self._stock
        arguments = _by_name(stock.forward, args, kwargs)
        if not self._concerned(arguments):
            return stock.forward(*args, **kwargs)
        self._check_compiled(arguments)
        if self._visuals(arguments):
            check_auto(self.settings.crops)
        arguments = named_for_this_release(arguments)
        with host_by_default(), sharded_parts_ready(self.model):
            call = compress_call(stock, self.family, self.settings, arguments, whole_conversation=False, wrapped=True)
        if call.contents is None:
            return self._run(call, stock.forward)
        # A tuple says neither where the cache is in it nor where the logits are.
        as_tuple = not call.pop("return_dict", getattr(self.model.config, "return_dict", True))
        asked = logits_asked_for(call, self.settings)
        output = self._run(call, functools.partial(stock.forward, return_dict=True))
        if call.inside is not None and call.inside.images:
            call.compaction = call.new = call.inside.compaction
            call.dropped = call.inside.dropped
        with host_by_default():
            self._remember(call, output, cache_of(arguments), one_answer=True)
            if self.settings.logits == "prompt" and call.compaction.changed:
                in_the_callers_columns(output, call, asked)
        return output.to_tuple() if as_tuple else output

    def _concerned(self, arguments: dict[str, Any]) -> bool:
        """Whether a call has images or continues a cache; text alone goes straight to the stock model.

        Raises:
            UnsupportedCallError: a cache under a name that is not known, or pictures under that of encoded ones; nobody would
                look at what they hold.
        """
        refuse_other_images(arguments)
        for name, value in arguments.items():
            if name not in CACHE_NAMES and holds_a_cache(value):
                raise UnsupportedCallError(
                    f"{name} holds a key/value cache, but adafv knows it as {' or '.join(CACHE_NAMES)} alone, and would not "
                    "see which tokens it lacks; pass it under one of these names"
                )
        return self._visuals(arguments) or any(arguments.get(name) is not None for name in CACHE_NAMES)

    def _check_compiled(self, arguments: Mapping[str, Any]) -> None:
        """Raise UnsupportedCallError where the model as a whole is compiled, or is being compiled, and tokens go or went."""
        # What is compiled of `model.compile()` is bound to the wrapped model: `generate` would come back here at every token.
        # With text alone it may: such a call is the stock model's, whatever cache it fills.
        compiled = torch.compiler.is_compiling() or self.model.__dict__.get("_compiled_call_impl") is not None
        if compiled and (self._visuals(arguments) or contents_of(cache_of(arguments)) is not None):
            self._refuse_compiled()

    def _visuals(self, arguments: Mapping[str, Any]) -> bool:
        """Whether images or videos are among the arguments, as pixels or encoded."""
        if encoded_in(arguments) is not None:
            return True
        pixels = ("pixel_values_videos", self.family.images[0])
        return any(value is not None and self.family.named(name) in pixels for name, value in arguments.items())

    def _run(self, call: CompressedInputs, function: Callable[..., Any]) -> Any:
        cache = cache_of(call)
        with opened(cache):
            try:
                return self._run_on_cache(call, function)
            except BaseException:  # whoever stops an answer goes on with what is cached of it
                self._remember_interrupted(call, cache)
                raise

    def _run_on_cache(self, call: CompressedInputs, function: Callable[..., Any]) -> Any:
        record, inside = call.record, call.inside
        if record is None:
            with nullcontext() if inside is None else inside.hooked():
                return function(**call)
        if inside is None:
            self._latest = self._own.record = record
            with timed(record.seconds, "model"):
                output = function(**call)
            self._latest = self._own.record = record  # a logits processor may have called the model meanwhile
            return output
        with timed(record.seconds, "model"), inside.hooked():
            output = function(**call)
        if inside.images:
            inside.describe(record)
            if call.contents is not None:
                call.contents = replace(call.contents, inside=inside.columns_held)
        self._latest = self._own.record = record
        return output

    def _remember(self, call: CompressedInputs, output: Any, given_cache: Any, one_answer: bool) -> None:
        """Write on the cache what it holds.

        Args:
            one_answer: whether the rows of the cache hold what the sequences say. With beams they do not.
        """
        contents = call.contents
        if contents is None:
            return
        sequences = getattr(output, "sequences", output if isinstance(output, torch.Tensor) else None)
        tokens = contents.tokens
        if one_answer and sequences is not None and tokens is not None and sequences.shape[1] > tokens.shape[1]:
            contents = contents.rows(torch.arange(len(tokens)).repeat_interleave(len(sequences) // len(tokens)))
            contents = replace(contents, tokens=sequences.cpu())  # with the answer
        for cache in (given_cache, returned_cache(output)):
            remember(cache, contents, guarded=True)

    @staticmethod
    def _remember_interrupted(call: CompressedInputs, cache: Any) -> None:
        """Write on the caller's cache what it holds after an exception."""
        contents, inside = call.contents, call.inside
        if contents is None or cached_length(cache) <= call.compaction.columns.shape[1] - call.new.columns.shape[1]:
            return  # nothing of this call is cached
        if inside is not None and inside.images:
            contents = replace(contents, inside=inside.columns_held)
        remember(cache, contents, guarded=True)


class _UnsureError(Exception):
    """Ends a call of `generate` at the first token; not for users."""

    def __init__(self, rows: frozenset[int]) -> None:
        super().__init__()
        self.rows = rows
        """Prompts that are to be asked again."""


def _refuse_compiled() -> None:
    raise UnsupportedCallError(
        "the model is compiled as a whole, and choosing tokens cannot be compiled with it; compile its language model alone: "
        "model.model.language_model.compile()"
    )


_enabling = threading.Lock()


def _blank(cls: Any) -> Any:
    """An object of a class, without running its constructor (FSDP2 runs it in `__new__`)."""
    return object.__new__(cls)


def _by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, without those that say nothing."""
    if not args:
        return said(kwargs)
    names = list(inspect.signature(function).parameters)
    if len(args) > len(names):
        raise TypeError(f"{len(args)} positional arguments were given, at most {len(names)} are possible")
    return said({**dict(zip(names, args, strict=False)), **kwargs})


class _Entry:
    """`generate` or `forward` of a wrapped model. A data descriptor: it overrules what is put on the object."""

    def __init__(self, stock_class: Any, name: str) -> None:
        self._stock_function = getattr(stock_class, name)
        self._name = name

    def __get__(self, model: Any, owner: Any = None) -> Any:
        name, stock_function = self._name, self._stock_function
        if model is None:  # Trainer reads the names of the labels off the class
            return stock_function
        handle: PrunedModel | None = model.__dict__.get(HANDLE)
        if handle is None:  # another thread has left the block since this one found the class
            return model.__dict__.get(name) or MethodType(stock_function, model)
        if handle.model is not model:
            raise UnsupportedCallError(
                "this is a replica of a wrapped model, as nn.DataParallel makes them; use DistributedDataParallel, "
                "or one process per device"
            )
        beneath = model.__dict__.get(name)

        # `generate` reads the signature of `forward`; so must whoever reads ours.
        @functools.wraps(stock_function)
        def call(_: Any, *args: Any, **kwargs: Any) -> Any:
            # Who replaces `forward` while the model is wrapped, as accelerate does for bf16, calls this one from inside
            # the new one. By then the prompt is pruned already, or the model is no longer wrapped at all.
            replaced = model.__dict__.get(name) is not beneath
            if not handle.enabled or (replaced and handle._inside):
                return stock_function(handle._stock, *args, **kwargs) if beneath is None else beneath(*args, **kwargs)
            with handle._entered():
                return getattr(handle, f"_{name}")(*args, **kwargs)

        return MethodType(call, model)

    def __set__(self, model: Any, value: Any) -> None:
        model.__dict__[self._name] = value

    def __delete__(self, model: Any) -> None:
        del model.__dict__[self._name]


@functools.cache
def _wrapped_class(stock_class: Any) -> Any:
    """The class of an enabled model: `stock_class` with `generate` and `forward` leading to the handle."""

    def reduce(model: Any, protocol: Any) -> Any:
        """Copies and pickles are of the stock class, without the handle: a copy is an unwrapped model."""
        stock = _blank(stock_class)
        stock.__dict__.update({name: value for name, value in model.__dict__.items() if name != HANDLE})
        return stock.__reduce_ex__(1)  # from protocol 2 on, pickle insists on the class of the very object

    def prepared(model: Any, *args: Any, **kwargs: Any) -> Any:
        """Ours calls `generate` on another object, so here the stock one runs on the wrapped model itself."""
        function = stock_class._get_logits_processor
        handle: PrunedModel | None = model.__dict__.get(HANDLE)
        given = inspect.signature(function).bind(model, *args, **kwargs).arguments.get("model_kwargs") or {}
        encoded = [part for part in (given.get("mm_encoder_outputs") or {}).values() if part is not None]
        if encoded or (handle is not None and handle._visuals(given)) or holds_pruned(cache_of(given)):
            raise UnsupportedCallError(
                "this `generate` was looked up before the model was wrapped, so it would not prune; look it up inside the "
                "`with` block, or after enable(): model.generate(...)"
            )
        return function(model, *args, **kwargs)

    names = {**{name: _Entry(stock_class, name) for name in ("generate", "forward")}, "__reduce_ex__": reduce}
    names["_get_logits_processor"] = prepared
    return _derived((stock_class,), names)


@functools.cache
def _inner_class(stock_class: Any) -> Any:
    """The class of the object on which the stock methods are called: `stock_class`, whose decoding sees whole prompts."""
    return _derived((RestoredPrompts, stock_class), {})


def _derived(bases: tuple[Any, ...], names: dict[str, Any]) -> Any:
    """A class that passes for its last base."""
    stock_class = bases[-1]
    identity = {name: getattr(stock_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock_class.__name__, bases, {**names, **identity})
