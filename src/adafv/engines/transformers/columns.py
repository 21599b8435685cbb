"""Everything that runs along the prompt: the dropped columns are taken out of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafv.core.sending import sent
from adafv.engines.transformers.call import Call
from adafv.engines.transformers.compaction import Compaction, nothing_removed
from adafv.engines.transformers.packing import BORDERS, LONGEST
from adafv.engines.transformers.releases import NEWEST_TESTED, OLDEST_TESTED
from adafv.engines.transformers.settings import GENERATION_SETTINGS
from adafv.errors import PromptError, UnsupportedCallError

_IGNORED_LABEL = -100

ALONG_THE_PROMPT = {
    "inputs_embeds": 0.0,
    "attention_mask": 0,
    "labels": _IGNORED_LABEL,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "seq_idx": 0,
}
"""Arguments that have a column per token of the prompt, besides `input_ids`, and what padding gets in them."""
_KNOWN = {
    "input_ids",
    *ALONG_THE_PROMPT,
    "shift_labels",
    "position_ids",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "logits_to_keep",
    *BORDERS,
    *LONGEST,
}


def take_out(call: Call) -> None:
    """Take the dropped columns out of everything that runs along the prompt."""
    result, family = call.inputs, call.family
    whole, compaction = result.compaction, result.new
    batch, new = call.prompt.tokens.shape
    fills = {"input_ids": _padding_id(call), **ALONG_THE_PROMPT}
    if isinstance(result.get("shift_labels"), Tensor):
        result["shift_labels"] = _shifted(result["shift_labels"], compaction)
    for name, fill in fills.items():
        values = result.get(name)
        if not isinstance(values, Tensor) or values.dim() < 2 or values.shape[1] == 0:
            continue
        if values.shape[1] == new:
            values = family.since_the_cache_began(name, values, call.prefix.length)
        if values.shape[1] == whole.length:
            result[name] = whole.take(values, fill)
        elif values.shape[1] == new:
            result[name] = compaction.take(values, fill)
        elif name == "attention_mask" and values.shape[1] == call.prefix.columns.shape[1] + new:
            cached = nothing_removed(batch, call.prefix.columns.shape[1], compaction.columns.device)
            result[name] = cached.then(compaction).take(values, fill)
        else:
            raise PromptError(f"{name} is {list(values.shape)}, but the prompt is [{batch}, {new}]")
        if name == "labels":
            # Nothing predicts the first token of a prompt, and padding put in front of it must not begin to.
            first = sent(compaction.columns == 0, values.device)
            first[:, 0] = False
            labels = result[name]
            result[name] = labels.masked_fill(
                torch.nn.functional.pad(first, (labels.shape[1] - first.shape[1], 0)), _IGNORED_LABEL
            )
    if result.get("attention_mask") is None and not call.packed and whole.padded:
        result["attention_mask"] = (whole.columns >= 0).long()


def _shifted(values: Tensor, compaction: Compaction) -> Tensor:
    """`shift_labels` [B, S], each at the column in front of its token, in the shorter prompt.

    The column in front may have been dropped, as the last visual token in front of the answer may be; then the label goes
    to the column that is in front of the token now.
    """
    if values.shape[1] != compaction.length:
        raise PromptError(f"shift_labels is {list(values.shape)}, but the prompt has {compaction.length} columns")
    columns = sent(compaction.columns, values.device)
    behind = torch.nn.functional.pad(columns[:, 1:] - 1, (0, 1))
    behind[:, -1] = columns[:, -1]
    return values.gather(1, behind.clamp_min(0)).masked_fill((columns < 0) | (behind < 0), _IGNORED_LABEL)


def refuse_unknown_columns(inputs: Mapping[str, Any], lengths: tuple[int, int]) -> None:
    """Raise UnsupportedCallError for a tensor as long as the prompt (or the conversation) under a name not known here.

    It would keep its length while the prompt becomes shorter; so a release that renames an argument, or adds one, is not
    silently wrong.
    """
    for name, value in inputs.items():
        if name in _KNOWN or name in GENERATION_SETTINGS or not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if any(sound in name for sound in ("audio", "feature")):  # of models that hear too
            continue
        sizes = {value.shape[min(1, value.dim() - 1)], value.shape[-1]}
        if any(size in lengths and size > 1 for size in sizes):
            raise UnsupportedCallError(
                f"{name} is {list(value.shape)}, as long as the prompt, but adafv does not know what it says of the dropped "
                f"tokens; leave it out, or use keep=1.0 (transformers {OLDEST_TESTED} to {NEWEST_TESTED} were tested)"
            )


def _padding_id(call: Call) -> int:
    """The token of the caller's own padding; where there is none, the one that `generate` would take."""
    model, family, inputs = call.model, call.family, call.inputs
    padding = call.prompt.tokens[~call.prompt.attended]
    if padding.numel() and int(padding[0]) >= 0:
        return int(padding[0])
    placeholders = {family.placeholder(model, modality) for modality in family.modalities}
    given = inputs.get("generation_config")
    text = model.config.get_text_config()
    for sources in ((inputs, given, getattr(model, "generation_config", None)), (text, model.config)):
        for name in ("pad_token_id", "eos_token_id"):
            for source in sources:
                value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
                values = torch.as_tensor([] if value is None else value).flatten().tolist()
                if values and values[0] >= 0 and values[0] not in placeholders:
                    return int(values[0])
    return 0
