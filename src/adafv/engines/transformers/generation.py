"""The arguments of `generate` that speak of the prompt, and its result.

Inside, the prompt is shorter. Outside nobody shall notice: lengths count from the caller's prompt, and whatever looks at
tokens in the decoding loop (logits processors, stopping criteria, streamers) sees the caller's prompt too. A stopping
criterion that cuts the prompt off by its length, as most do, would otherwise silently look at the wrong tokens; a penalty
for repeated tokens would see other padding.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from adafv.engines.transformers.cache import cached_length, contents_of
from adafv.engines.transformers.encoded import encoded_in
from adafv.engines.transformers.families import Family
from adafv.engines.transformers.releases import (
    CHUNKED_PREFILL_KEEPS_IMAGES,
    GUESSES_AHEAD,
    cache_of,
    cannot_be_repeated,
)
from adafv.engines.transformers.settings import setting
from adafv.errors import UnsupportedCallError


def refuse_unsupported(model: Any, family: Family, arguments: dict[str, Any]) -> None:
    """Raise UnsupportedCallError for ways of generating that cannot be made to fit."""
    if isinstance(arguments.get("custom_generate"), str):
        raise UnsupportedCallError("custom_generate recipes replace the decoding loop and are not supported")
    if arguments.get("generation_mode", "text") != "text":  # of models that draw too
        raise UnsupportedCallError(
            f"generation_mode={arguments['generation_mode']!r} sees no images, so there is nothing to prune; leave them out"
        )
    if setting(model, arguments, "token_healing"):
        raise UnsupportedCallError("token_healing writes the prompt anew and loses its images; leave it out")
    implementation = str(setting(model, arguments, "cache_implementation") or "")
    if implementation.startswith("paged") or str(model.config._attn_implementation).startswith("paged"):
        raise UnsupportedCallError(
            "continuous batching (paged caches) takes no images; use another cache_implementation"
        )
    if setting(model, arguments, "prefill_chunk_size") and not CHUNKED_PREFILL_KEEPS_IMAGES:
        raise UnsupportedCallError(
            "this release of transformers loses the images in chunked prefill; leave prefill_chunk_size out, or run: "
            "pip install --upgrade transformers"
        )
    guessing = next((name for name in GUESSES_AHEAD if setting(model, arguments, name) is not None), None)
    cache = cache_of(arguments)
    if guessing is not None and cached_length(cache) > 0:  # the length of a static cache lies on the device
        shown = encoded_in(arguments) is not None or any(
            name in arguments for name in (family.images[0], *family.videos[:1])
        )
        if shown or contents_of(cache) is not None:
            raise UnsupportedCallError(
                f"{guessing} on a cache that is filled reads what is cached a second time in stock transformers, and the "
                f"answer is another one; leave {guessing} out of later turns, or pass the whole conversation without a cache"
            )
    if family.images[0] in arguments or encoded_in(arguments) is not None:
        family.check_generate(functools.partial(setting, model, arguments))
    if setting(model, arguments, "guidance_scale") not in (None, 1.0):
        if family.rotary_axes:
            raise UnsupportedCallError(
                f"classifier-free guidance fails in stock transformers with {family.name}; leave guidance_scale out"
            )
        if arguments.get("negative_prompt_ids") is not None:
            raise UnsupportedCallError(
                "classifier-free guidance with a negative prompt is not supported with pruned tokens"
            )


def refuse_mixed_up(model: Any, arguments: dict[str, Any]) -> None:
    """Raise UnsupportedCallError where `generate` would repeat the kept features in the wrong order."""
    repeats = [setting(model, arguments, name) or 1 for name in ("num_beams", "num_return_sequences")]
    if max(repeats) == 1:
        return
    for output in (arguments.get("mm_encoder_outputs") or {}).values():
        if cannot_be_repeated(output.pooler_output):
            raise UnsupportedCallError(
                "this release of transformers mixes up prompts with different numbers of visual tokens in beam search and "
                "with several return sequences; give the prompts one by one, or run: pip install --upgrade transformers"
            )


def fill_in_mask(model: Any, arguments: dict[str, Any]) -> None:
    """Infer a missing `attention_mask` of a padded batch as `generate` would, before its padding is moved."""
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if mask is not None or ids is None or arguments.get("inputs_embeds") is not None:
        return
    pad, end = (setting(model, arguments, name) for name in ("pad_token_id", "eos_token_id"))
    ends = end if isinstance(end, (list, tuple)) else [end]
    if pad is not None and pad not in ends and bool((ids == pad).any()):
        arguments["attention_mask"] = (ids != pad).long()


def shift_lengths(model: Any, arguments: dict[str, Any], length: int, shortened: int) -> None:
    """`max_length` and `min_length` count the caller's prompt of `length` tokens; make them count the shortened one."""
    removed = length - shortened
    if not removed:
        return
    longest = setting(model, arguments, "max_length")
    if longest is not None:
        if longest <= length and setting(model, arguments, "max_new_tokens") is None:
            raise UnsupportedCallError(
                f"the prompt is {length} tokens long (before pruning), but max_length is {longest}; "
                "increase max_length or, better, set max_new_tokens"
            )
        arguments["max_length"] = max(longest - removed, 1)
    shortest = setting(model, arguments, "min_length")
    if shortest:
        arguments["min_length"] = max(shortest - removed, 0)


class PromptRestorer:
    """Puts the caller's prompt back in front of what was generated.

    Args:
        original: [B, S] long, the prompt as given.
        shortened: [B, S'] long, the prompt that the model saw.
        mask: [B, S], the caller's attention mask, where there is one.
    """

    def __init__(self, original: Tensor, shortened: Tensor, mask: Tensor | None) -> None:
        self.original = original
        self.shortened = shortened
        self.mask = mask

    @property
    def removed(self) -> int:
        return self.original.shape[1] - self.shortened.shape[1]

    def restore(self, tokens: Tensor) -> Tensor:
        """[B * m, S' + new] -> [B * m, S + new]; m > 1 for beams and several return sequences."""
        original = _repeated(self.original, tokens)
        return torch.cat((original, tokens[:, self.shortened.shape[1] :]), dim=1)

    def restore_if_there(self, tokens: Any) -> Any:
        """The same for what a loop of the caller's own returned: the answer may come without the prompt, or be no tokens."""
        length = self.shortened.shape[1]
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[1] < length or not len(tokens):
            return tokens
        if tokens.shape[0] % len(self.original) or tokens.is_floating_point():
            return tokens
        return self.restore(tokens) if torch.equal(tokens[:, :length], _repeated(self.shortened, tokens)) else tokens


def _repeated(prompt: Tensor, tokens: Tensor) -> Tensor:
    """The prompt for every row of `tokens`, where there are several rows to each prompt."""
    prompt = prompt.to(tokens.device)
    repeats = tokens.shape[0] // prompt.shape[0]
    return prompt if repeats == 1 else prompt.repeat_interleave(repeats, dim=0)


_PENDING: ContextVar[PromptRestorer | None] = ContextVar("adafv_restorer", default=None)
"""Of the call of `generate` that is being prepared in this thread or task. Taken by the first `generate` inside it: one that
the caller's own loop may call in turn has prompts of its own."""

_FIRST: ContextVar["FirstToken | None"] = ContextVar("adafv_first_token", default=None)
"""Whoever wants to see the scores of the first token, likewise."""

HOOKS = ("_get_logits_processor", "_get_stopping_criteria")
"""The methods in which `generate` makes the processors and criteria that its settings ask for, and merges the caller's."""


@contextmanager
def decoding_sees(restorer: PromptRestorer | None) -> Iterator[None]:
    """Within, everything that looks at tokens during decoding sees the caller's prompt."""
    token = _PENDING.set(restorer)
    try:
        yield
    finally:
        _PENDING.reset(token)


class FirstToken:
    """Shown the scores of the first token of the answers, before any logits processor; it may raise to end the call there.

    Args:
        look: is given [rows * n, V], logits or their log softmax, n answers to each prompt.
    """

    def __init__(self, look: Callable[[Tensor], None]) -> None:
        self._look: Callable[[Tensor], None] | None = look

    @property
    def seen(self) -> bool:
        return self._look is None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        look, self._look = self._look, None
        if look is not None:
            look(scores)
        return scores


@contextmanager
def first_token_seen_by(first: FirstToken) -> Iterator[None]:
    """Within, of the first call of `generate`."""
    token = _FIRST.set(first)
    try:
        yield
    finally:
        _FIRST.reset(token)


class RestoredPrompts:
    """Put in front of a stock class: its `generate` shows processors and criteria the caller's prompt.

    Those of the caller's and those that `generate` makes itself: penalties and n-gram bans look at the tokens of the prompt,
    its padding included, and lengths count them. They are made by stock code for the caller's prompt, so that one of the
    caller's replaces one of the same type, as in stock; then each is wrapped.
    """

    def get_compiled_call(self, compile_config: Any) -> Any:
        """What `generate` decodes with on a static cache, on accelerators: compiled for an object like this one.

        What it has compiled outside the block is bound to the model, and would lead back into the wrapper at every token. As
        there, it stays on the model, for the next block: to compile takes long.
        """
        own = self.__dict__.get(_COMPILED)
        if own is None or type(own.model) is not type(self) or own.model.__dict__ is not self.__dict__:
            own = self.__dict__[_COMPILED] = _Compiled(self)
        return super().get_compiled_call.__func__(own, compile_config)  # type: ignore[misc]

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        first = _FIRST.get()
        processors = self._restored_processors(*args, **kwargs)
        if first is None:
            return processors
        _FIRST.set(None)
        return LogitsProcessorList([first, *processors])

    def _restored_processors(self, *args: Any, **kwargs: Any) -> Any:
        stock = super()._get_logits_processor  # type: ignore[misc]
        restorer = _PENDING.get()
        if restorer is None:
            return stock(*args, **kwargs)
        given = inspect.signature(stock).bind(*args, **kwargs).arguments
        given["generation_config"] = _lengthened(given["generation_config"], restorer.removed)
        given["input_ids_seq_length"] = restorer.original.shape[1]
        if isinstance(given.get("encoder_input_ids"), Tensor) and given["encoder_input_ids"].dim() == 2:
            given["encoder_input_ids"] = restorer.original.to(given["encoder_input_ids"].device)
        if given.get("model_kwargs"):  # where a penalty reads off the mask which tokens are padding
            config, mask = given["generation_config"], restorer.mask
            if mask is not None:
                mask = mask.repeat_interleave(max(config.num_beams or 1, config.num_return_sequences or 1), dim=0)
            given["model_kwargs"] = {**given["model_kwargs"], "attention_mask": mask}
        return LogitsProcessorList(_restored(item, restorer) for item in stock(**given))

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        stock = super()._get_stopping_criteria  # type: ignore[misc]
        restorer = _PENDING.get()
        if restorer is None:
            return stock(*args, **kwargs)
        _PENDING.set(None)  # what `generate` asks for last; the loop that runs now is another matter
        given = inspect.signature(stock).bind(*args, **kwargs).arguments
        given["generation_config"] = _lengthened(given["generation_config"], restorer.removed)
        return _RestoredCriteria((_restored(item, restorer) for item in stock(**given)), restorer.removed)


_COMPILED = "_adafv_compiled"


class _Compiled:
    """Passes for a model whose call nobody has compiled yet, and keeps what is compiled. A copy of the model has none."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        if name in ("_compiled_call", "_last_compile_config"):
            raise AttributeError(name)
        return getattr(self.model, name)

    def __reduce__(self) -> Any:
        return type(None), ()


def _lengthened(config: Any, removed: int) -> Any:
    """A generation config whose lengths count the caller's prompt again: what `shift_lengths` shortened."""
    config = copy.copy(config)
    for name in ("max_length", "min_length"):
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name) + removed)
    return config


def _restored(item: Any, restorer: PromptRestorer) -> Any:
    # Guidance looks at no token: it runs the model on the last one.
    return item if isinstance(item, UnbatchedClassifierFreeGuidanceLogitsProcessor) else _Restored(item, restorer)


class _RestoredCriteria(StoppingCriteriaList):
    """`max_length` counts the shortened prompt: the loop compares it with the tokens that it has."""

    def __init__(self, items: Iterable[Any], removed: int) -> None:
        super().__init__(items)
        self._removed = removed

    @property
    def max_length(self) -> int | None:
        longest = super().max_length
        return None if longest is None else longest - self._removed


class _Restored:
    """A logits processor or stopping criterion, shown the caller's prompt. It passes for what it wraps."""

    def __init__(self, wrapped: Any, restorer: PromptRestorer) -> None:
        def shown(input_ids: Tensor, scores: Any, *args: Any, **kwargs: Any) -> Any:
            return wrapped(restorer.restore(input_ids), scores, *args, **kwargs)

        # The list of processors hands further arguments to those whose `__call__` names them, so ours has that signature.
        self.__dict__ |= {"_wrapped": wrapped, "__call__": functools.wraps(wrapped.__call__)(shown)}

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._wrapped)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["__call__"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_wrapped":  # of a copy that is not made yet
            raise AttributeError(name)
        return getattr(self._wrapped, name)


class RestoredStreamer:
    """A streamer of the caller's, whose first piece is the caller's prompt."""

    def __init__(self, wrapped: Any, restorer: PromptRestorer) -> None:
        self._wrapped = wrapped
        self._restorer = restorer
        self._prompt_due = True

    def put(self, value: Tensor) -> None:
        if self._prompt_due:
            self._prompt_due = False
            value = self._restorer.restore(value)
        self._wrapped.put(value)

    def end(self) -> None:
        self._wrapped.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)
