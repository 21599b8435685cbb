"""What a pruned key/value cache holds, so that the next turn fits it.

The caller of a chat keeps the cache and passes the whole conversation again, with all placeholders. The cache lacks the
dropped ones, so the same columns must be taken out of the new prompt before it meets the cache. What was dropped is
written on the cache object itself: it is the one thing that travels with the conversation, also through
`copy.deepcopy` (the common idiom for sharing a prefix), and it dies with it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adafv.engines.transformers.prompt import Compaction, nothing_removed
from adafv.errors import CacheError

_ATTRIBUTE = "_adafv_contents"
_MEND = "pass the conversation that this cache was made from, continued, or start without past_key_values"


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


def remember(cache: Any, contents: CacheContents) -> None:
    """Write on `cache` what it holds."""
    if cache is not None:
        setattr(cache, _ATTRIBUTE, contents)


def contents_of(cache: Any) -> CacheContents | None:
    """What is known of the contents of `cache`; None for an empty cache, or one that adafv has not seen."""
    return getattr(cache, _ATTRIBUTE, None) if cached_length(cache) > 0 else None


def holds_pruned(cache: Any) -> bool:
    """Whether `cache` holds a prompt from which columns were taken out."""
    contents = contents_of(cache)
    return contents is not None and contents.compaction.changed


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
    if before.columns.shape[0] != batch:
        raise CacheError(f"the cache holds {before.columns.shape[0]} prompts, but {batch} are given; {_MEND}")
    more = length - before.columns.shape[1]
    if more >= 0:
        return before.then(nothing_removed(batch, more, before.columns.device))
    columns = before.columns[:, :length]  # the caller has cropped the cache
    ends = columns[:, -1].tolist()
    if len(set(ends)) > 1 or ends[0] < 0:
        raise CacheError(f"the cache was cropped where the prompts of the batch lost different tokens; {_MEND}")
    return Compaction(columns, ends[0] + 1, changed=True)


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
