"""What a pruned key/value cache holds, so that the next turn fits it.

The caller of a chat keeps the cache and passes the whole conversation again, with all placeholders. The cache lacks the
dropped ones, so the same columns must be taken out of the new prompt before it meets the cache. What was dropped is
written on the cache object itself: it is the one thing that travels with the conversation, also through
`copy.deepcopy` (the common idiom for sharing a prefix), and it dies with it. A cache can also be repeated for several
answers, or its rows chosen and reordered; so from then on the object (and no other) has a class of its own, derived from
its stock class, that does the same to what is written on it, as an enabled model has.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adafv.engines.transformers.compaction import Compaction, nothing_removed
from adafv.errors import CacheError

_ATTRIBUTE = "_adafv_contents"
_GUARD = "_adafv_guard"
"""Set where the stock model by itself would read the cache wrongly, see `opened`."""
_MEND = "pass the conversation that this cache was made from, continued, or start without a cache"


@dataclass(frozen=True)
class HeldColumns:
    """Which columns of the first prompt each layer holds, where tokens went inside the language model."""

    length: int
    """S, columns of that prompt; what came later is in every layer."""
    layers: tuple[Tensor | None, ...]
    """[n] long, ascending, one for each decoder layer; None: all of them."""


@dataclass(frozen=True)
class CacheContents:
    """The prompt behind a pruned cache."""

    compaction: Compaction
    """How the prompt became shorter. Columns after it were cached as they were."""
    tokens: Tensor | None
    """[B, >= S] long on the host: the tokens of the conversation as far as they are known, placeholders included."""
    position_delta: Tensor | None = None
    """[B] long on the host, where positions are not counted along the prompt (M-RoPE): how far the next one is ahead of
    the number of attended tokens."""
    attended: Tensor | None = None
    """[B] long on the host, that number."""
    inside: HeldColumns | None = None
    """Where tokens went inside the language model."""

    def rows(self, index: Tensor) -> "CacheContents":
        """Of other rows: those at `index` ([B'] long on the host)."""
        tokens, delta, attended = (
            None if part is None else part[index] for part in (self.tokens, self.position_delta, self.attended)
        )
        return CacheContents(self.compaction.rows(index), tokens, delta, attended, self.inside)

    @property
    def batch(self) -> int:
        return self.compaction.columns.shape[0]


def remember(cache: Any, contents: CacheContents, guarded: bool = False) -> None:
    """Write on `cache` what it holds; repeated, where it holds several answers to each prompt.

    Args:
        guarded: whether it is refused from then on wherever it is not `opened`. A caller of `compress` runs the stock model
            on shortened inputs, and so on a cache that is not guarded.
    """
    if cache is None:
        return
    setattr(cache, _ATTRIBUTE, _for_rows(contents, _rows_held(cache)))
    setattr(cache, _GUARD, guarded and (contents.compaction.changed or contents.inside is not None))
    if not isinstance(cache, _Followed):
        stock_class: Any = type(cache)
        cache.__class__ = _followed_class(stock_class)


def forget(cache: Any) -> None:
    """Take off `cache` what was written on it: it was emptied, and will be filled anew."""
    if cache is not None:
        for name in (_ATTRIBUTE, _GUARD):
            cache.__dict__.pop(name, None)


@contextmanager
def opened(cache: Any) -> Iterator[None]:
    """Within, the stock model may go on with `cache`: what it is called with was brought in line with what is cached."""
    guarded = getattr(cache, _GUARD, False)
    if guarded:
        setattr(cache, _GUARD, False)
    try:
        yield
    finally:
        if guarded:
            setattr(cache, _GUARD, True)


def _rows_held(cache: Any) -> int | None:
    """Prompts in the cache, None where it cannot be seen."""
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.dim() > 1:
            return int(keys.shape[0])
    return None


class _Followed:
    """Of a cache on which something is written: what is done to its rows is done to that too."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, _GUARD, False):
            if cached_length(self) > 0:
                raise CacheError(
                    "this cache lacks visual tokens that adafv dropped, and the model by itself would read and extend it as "
                    "if they were there; go on with `generate` or `forward` inside `with AdaFV(keep=...)(model):`, or start "
                    "without a cache"
                )
            forget(self)  # it was emptied
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        contents = _written(self)
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        _rewrite(self, contents, lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        contents = _written(self)
        super().batch_select_indices(indices)  # type: ignore[misc]
        _rewrite(self, contents, lambda rows: rows[torch.as_tensor(indices).cpu()])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        contents = _written(self)
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        _rewrite(self, contents, lambda rows: rows[torch.as_tensor(beam_idx).cpu()])

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        forget(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are followed too."""
        return _restored, (type(self).__mro__[2],), self.__dict__


def _written(cache: Any) -> CacheContents | None:
    """What is written on a cache, with a row for each row that it holds by now."""
    contents: CacheContents | None = cache.__dict__.get(_ATTRIBUTE)
    return None if contents is None else _for_rows(contents, _rows_held(cache))


def _for_rows(contents: CacheContents, held: int | None) -> CacheContents:
    """The same for `held` rows, where those are several answers to each prompt."""
    if held is None or held == contents.batch or held % contents.batch:
        return contents
    return contents.rows(torch.arange(contents.batch).repeat_interleave(held // contents.batch))


def _rewrite(cache: Any, contents: CacheContents | None, choose: Callable[[Tensor], Tensor]) -> None:
    if contents is not None:
        setattr(cache, _ATTRIBUTE, contents.rows(choose(torch.arange(contents.batch))))


@functools.cache
def _followed_class(stock_class: Any) -> Any:
    identity = {name: getattr(stock_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock_class.__name__, (_Followed, stock_class), identity)


def _restored(stock_class: Any) -> Any:
    return object.__new__(_followed_class(stock_class))


def contents_of(cache: Any) -> CacheContents | None:
    """What is known of the contents of `cache`; None for an empty cache, or one that adafv has not seen."""
    return getattr(cache, _ATTRIBUTE, None) if cached_length(cache) > 0 else None


def holds_pruned(cache: Any) -> bool:
    """Whether `cache` holds a prompt from which columns were taken out."""
    contents = contents_of(cache)
    return contents is not None and contents.compaction.changed


def shortened_inside(cache: Any) -> HeldColumns | None:
    """What the layers of `cache` hold, where tokens went inside the language model.

    Raises:
        CacheError: it was changed since, where that could not be followed.
    """
    contents = contents_of(cache)
    held = None if contents is None else contents.inside
    if held is None:
        return None
    more = cached_length(cache) - held.length
    whole = [held.length if columns is None else len(columns) for columns in held.layers]
    if more < 0 or [layer.keys.shape[-2] for layer in cache.layers] != [length + more for length in whole]:
        raise CacheError(f"tokens of this cache went inside the language model, and it was changed since; {_MEND}")
    if _rows_held(cache) != 1:
        raise CacheError(f"tokens of this cache went inside the language model, one prompt at a time; {_MEND}")
    return held


def positions_known(cache: Any) -> bool:
    """Whether positions that are not counted along the prompt were written on `cache`."""
    contents = contents_of(cache)
    return contents is not None and contents.position_delta is not None


def cached_length(cache: Any) -> int:
    """Columns in the cache, 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def cached_prefix(cache: Any, batch: int) -> Compaction:
    """How the conversation's first columns became those in `cache`.

    Raises:
        CacheError: the cache is of another batch size, or was cut off amid a row's image.
    """
    length = cached_length(cache)
    contents = contents_of(cache)
    if contents is None:
        return nothing_removed(batch, length)
    before = contents.compaction
    held = _rows_held(cache)
    if held is not None and held != contents.batch:
        raise CacheError(
            f"the cache holds {held} prompts, but it held {contents.batch} when it was filled, and its rows were changed "
            f"where that could not be followed; use its own batch_repeat_interleave or batch_select_indices, or {_MEND}"
        )
    if contents.batch != batch:
        raise CacheError(f"the cache holds {contents.batch} prompts, but {batch} are given; {_MEND}")
    more = length - before.columns.shape[1]
    if more >= 0:
        return before.then(nothing_removed(batch, more, before.columns.device))
    columns = before.columns[:, :length]  # the caller has cropped the cache
    ends = columns[:, -1].tolist()
    if len(set(ends)) > 1 or ends[0] < 0:
        raise CacheError(f"the cache was cropped where the prompts of the batch lost different tokens; {_MEND}")
    behind = before.length - 1 - ends[0]
    lost = (before.lost - (behind - (before.columns > ends[0]).sum(1).cpu())).clamp_min(0)
    return Compaction(columns, ends[0] + 1, changed=True, lost=lost, padded=before.padded)


def check_same_conversation(cache: Any, tokens: Tensor, prefix: Compaction) -> None:
    """Raise CacheError unless `tokens` ([B, S] on the host) begins with what `cache` holds."""
    if tokens.shape[1] <= prefix.length:
        raise CacheError(
            f"the cache holds {prefix.length} tokens of the conversation, but the prompt has only {tokens.shape[1]}; {_MEND}"
        )
    contents = contents_of(cache)
    if contents is None or contents.tokens is None:
        return
    known = min(prefix.length, contents.tokens.shape[1])
    kept = torch.zeros(tokens.shape[0], prefix.length + 1, dtype=torch.bool)
    columns = prefix.columns.cpu()
    kept.scatter_(1, columns.where(columns >= 0, prefix.length), True)
    differs = (tokens[:, :known] != contents.tokens[:, :known]) & kept[:, :known]
    if differs.any():
        row, column = (int(place) for place in differs.nonzero()[0])
        raise CacheError(
            f"the cache is from another prompt: token {column} of prompt {row} is {int(tokens[row, column])}, "
            f"but {int(contents.tokens[row, column])} is cached there; {_MEND}"
        )
