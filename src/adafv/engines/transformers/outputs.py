"""What the stock model returned, in the columns of the caller's prompt.

Who calls `forward` slices its logits by the prompt that they passed: `logits[:, n - 1 : n]`, `logits[i, length - 1]`,
`logits[:, -answer:]`, a loss against labels as long as the prompt. Of a shorter prompt such slices are empty, or of other
tokens, without a word. So logits, hidden states and attentions are put back where the caller looks for them.
"""

from typing import Any

import torch
from torch import Tensor

from adafv.engines.transformers.call import CompressedInputs
from adafv.engines.transformers.settings import Settings
from adafv.errors import UnsupportedCallError


def logits_asked_for(call: CompressedInputs, settings: Settings) -> Any:
    """`logits_to_keep` as the caller gave it, after making it one that the shorter prompt can give.

    The last n columns of the prompt stand in the last n of the shorter one, or were dropped. Columns by their numbers are
    looked up afterwards.

    Raises:
        UnsupportedCallError: columns by their numbers, of a prompt whose columns move.
    """
    asked = call.get("logits_to_keep")
    if not _is_count(asked) and call.changed:
        if settings.logits != "prompt":
            raise UnsupportedCallError(
                "logits_to_keep must be a number of last columns with logits='kept': the others move; use logits='prompt'"
            )
        del call["logits_to_keep"]
    elif _is_count(asked) and asked and call.compaction.changed:
        call["logits_to_keep"] = min(asked, call.new.columns.shape[1])
    return asked


def _is_count(asked: Any) -> bool:
    """Whether `logits_to_keep` says how many of the last columns, or nothing; else which they are."""
    return asked is None or (isinstance(asked, int) and asked >= 0)


def in_the_callers_columns(output: Any, call: CompressedInputs, asked: Any) -> None:
    """Put back the logits, hidden states and attentions of a call of `forward`.

    Args:
        asked: `logits_to_keep`, as the caller gave it.
    """
    logits = getattr(output, "logits", None)
    if logits is not None:
        last = asked if asked is not None and _is_count(asked) and asked > 0 else None
        # Someone may train on them: then every column has what its next token is predicted from.
        trained = torch.is_grad_enabled() and logits.requires_grad
        logits = call.new.give_back(logits, last, fill=None if trained else float("nan"), dropped=call.dropped)
        if not _is_count(asked):  # as the stock model reads it: tensors, lists and slices, and numbers from the front
            columns = slice(-asked, None) if isinstance(asked, int) else asked
            logits = logits[:, columns.to(logits.device) if isinstance(columns, Tensor) else columns]
        output.logits = logits
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(_states(state, call) for state in output.hidden_states)
    if getattr(output, "attentions", None) is not None:
        output.attentions = tuple(_attention(layer, call) for layer in output.attentions)


def of_generate(output: Any, call: CompressedInputs) -> None:
    """Put back the hidden states and attentions of a call of `generate`: those of the prompt, and what answers look at."""
    if not call.compaction.changed:
        return
    if getattr(output, "hidden_states", None):
        first, *others = output.hidden_states
        output.hidden_states = (tuple(_states(state, call) for state in first), *others)
    if getattr(output, "attentions", None):
        output.attentions = tuple(tuple(_attention(layer, call) for layer in step) for step in output.attentions)


def _states(values: Tensor, call: CompressedInputs) -> Tensor:
    """[B * m, L, D] of the last L columns that were read -> of the columns as given."""
    new = call.new
    if values.shape[1] > new.columns.shape[1]:
        raise _unknown("hidden states", values)
    return new.give_back(values, fill=float("nan"), dropped=call.dropped, repeats=len(values) // len(new.columns))


def _attention(values: Tensor | None, call: CompressedInputs) -> Tensor | None:
    """[B * m, H, queries, keys] -> the same of the columns as given: 0 to a dropped key, NaN from a dropped query."""
    if values is None:
        return None
    whole, new = call.compaction, call.new
    queries, keys = values.shape[-2:]
    more = keys - whole.columns.shape[1]
    if more < 0:
        raise _unknown("attentions", values)
    repeats = len(values) // len(new.columns)
    held, answer = values.split((whole.columns.shape[1], more), dim=-1)
    held = whole.give_back(held.movedim(-1, 1), fill=0.0, repeats=repeats).movedim(1, -1)
    values = torch.cat((held, answer), dim=-1)
    if queries != new.columns.shape[1] or more:
        return values
    values = values.movedim(-2, 1)
    return new.give_back(values, fill=float("nan"), dropped=call.dropped, repeats=repeats).movedim(1, -2)


def _unknown(what: str, values: Tensor) -> UnsupportedCallError:
    return UnsupportedCallError(
        f"{what} of shape {list(values.shape)} cannot be told apart by the columns of the prompt, as with a static "
        "cache or a sliding window; use logits='kept' to have them as they are"
    )
