"""The arguments of `generate` that speak of the prompt, and its result.

Inside, the prompt is shorter. Outside nobody shall notice: lengths count from the caller's prompt, and whatever the
caller hooked into the decoding loop (logits processors, stopping criteria, streamers) sees the caller's prompt too. A
stopping criterion that cuts the prompt off by its length, as most do, would otherwise silently look at the wrong tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers.generation.utils
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from adafv.errors import UnsupportedCallError
from adafv.families import Family
from adafv.families.base import REPEATS_IMAGES_IN_ORDER

CHUNKED_PREFILL_KEEPS_IMAGES = hasattr(transformers.generation.utils, "_slice_mm_encoder_output")
"""transformers 5.18 sends no image into any chunk, and answers without having seen it; 5.23 cuts the images up."""


def refuse_unsupported(model: Any, family: Family, arguments: dict[str, Any]) -> None:
    """Raise UnsupportedCallError for ways of generating that cannot be made to fit."""
    if isinstance(arguments.get("custom_generate"), str):
        raise UnsupportedCallError("custom_generate recipes replace the decoding loop and are not supported")
    if arguments.get("generation_mode", "text") != "text":  # of models that draw too
        raise UnsupportedCallError(
            f"generation_mode={arguments['generation_mode']!r} sees no images, so there is nothing to prune; leave them out"
        )
    if _setting(model, arguments, "token_healing"):
        raise UnsupportedCallError("token_healing writes the prompt anew and loses its images; leave it out")
    implementation = str(_setting(model, arguments, "cache_implementation") or "")
    if implementation.startswith("paged") or str(model.config._attn_implementation).startswith("paged"):
        raise UnsupportedCallError(
            "continuous batching (paged caches) takes no images; use another cache_implementation"
        )
    if _setting(model, arguments, "prefill_chunk_size"):
        if not CHUNKED_PREFILL_KEEPS_IMAGES:
            raise UnsupportedCallError(
                "this release of transformers loses the images in chunked prefill; leave prefill_chunk_size out, or run: "
                "pip install --upgrade transformers"
            )
        if family.looks_ahead and family.images[0] in arguments:
            raise UnsupportedCallError(
                f"chunked prefill cuts apart images whose tokens look at each other, as those of {family.name} do, so that "
                "the answer is another one, pruned or not; leave prefill_chunk_size out"
            )
        if not family.chunked_prefill and family.images[0] in arguments:
            raise UnsupportedCallError(
                f"chunked prefill fails in stock transformers with images of {family.name}; leave prefill_chunk_size out"
            )
    if _setting(model, arguments, "guidance_scale") not in (None, 1.0):
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
    repeats = [_setting(model, arguments, name) or 1 for name in ("num_beams", "num_return_sequences")]
    if REPEATS_IMAGES_IN_ORDER or max(repeats) == 1:
        return
    for output in (arguments.get("mm_encoder_outputs") or {}).values():
        features = output.pooler_output
        if isinstance(features, Tensor) and features.shape[-1] == 1:  # see Family.hand_over
            raise UnsupportedCallError(
                "this release of transformers mixes up prompts with different numbers of visual tokens in beam search and "
                "with several return sequences; give the prompts one by one, or run: pip install --upgrade transformers"
            )


def fill_in_mask(model: Any, arguments: dict[str, Any]) -> None:
    """Infer a missing `attention_mask` of a padded batch as `generate` would, before its padding is moved."""
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if mask is not None or ids is None or arguments.get("inputs_embeds") is not None:
        return
    pad, end = (_setting(model, arguments, name) for name in ("pad_token_id", "eos_token_id"))
    ends = end if isinstance(end, (list, tuple)) else [end]
    if pad is not None and pad not in ends and bool((ids == pad).any()):
        arguments["attention_mask"] = (ids != pad).long()


def shift_lengths(model: Any, arguments: dict[str, Any], length: int, shortened: int) -> None:
    """`max_length` and `min_length` count the caller's prompt of `length` tokens; make them count the shortened one."""
    removed = length - shortened
    if not removed:
        return
    longest = _setting(model, arguments, "max_length")
    if longest is not None:
        if longest <= length and _setting(model, arguments, "max_new_tokens") is None:
            raise UnsupportedCallError(
                f"the prompt is {length} tokens long (before pruning), but max_length is {longest}; "
                "increase max_length or, better, set max_new_tokens"
            )
        arguments["max_length"] = max(longest - removed, 1)
    shortest = _setting(model, arguments, "min_length")
    if shortest:
        arguments["min_length"] = max(shortest - removed, 0)


def _setting(model: Any, arguments: dict[str, Any], name: str) -> Any:
    """A generation setting, by `generate`'s own precedence: argument, generation_config, the model's default."""
    for source in (arguments.get(name), getattr(arguments.get("generation_config"), name, None)):
        if source is not None:
            return source
    return getattr(model.generation_config, name, None)


class PromptRestorer:
    """Puts the caller's prompt back in front of what was generated.

    Args:
        original: [B, S] long, the prompt as given.
        shortened: S', the length of the prompt that the model saw.
    """

    def __init__(self, original: Tensor, shortened: int) -> None:
        self.original = original
        self.shortened = shortened

    def restore(self, tokens: Tensor) -> Tensor:
        """[B * m, S' + new] -> [B * m, S + new]; m > 1 for beams and several return sequences."""
        original = self.original.to(tokens.device)
        if tokens.shape[0] != original.shape[0]:
            original = original.repeat_interleave(tokens.shape[0] // original.shape[0], dim=0)
        return torch.cat((original, tokens[:, self.shortened :]), dim=1)

    def apply(self, arguments: dict[str, Any]) -> None:
        """Wrap everything of the caller's that will look at the tokens."""
        for name, kind in (("logits_processor", LogitsProcessorList), ("stopping_criteria", StoppingCriteriaList)):
            if arguments.get(name):
                arguments[name] = kind(_Restored(item, self) for item in arguments[name])
        if (allowed := arguments.get("prefix_allowed_tokens_fn")) is not None:
            arguments["prefix_allowed_tokens_fn"] = self._allowed(allowed)
        if arguments.get("streamer") is not None:
            arguments["streamer"] = _RestoredStreamer(arguments["streamer"], self)

    def _allowed(self, allowed: Callable[[int, Tensor], list[int]]) -> Callable[[int, Tensor], list[int]]:
        def restored(batch: int, tokens: Tensor) -> list[int]:
            return allowed(batch, torch.cat((self.original[batch].to(tokens.device), tokens[self.shortened :])))

        return restored


class _Restored:
    """A logits processor or stopping criterion of the caller's, shown the caller's prompt."""

    def __init__(self, wrapped: Any, restorer: PromptRestorer) -> None:
        self._wrapped = wrapped
        self._restorer = restorer

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self._wrapped(self._restorer.restore(input_ids), scores)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


class _RestoredStreamer:
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
