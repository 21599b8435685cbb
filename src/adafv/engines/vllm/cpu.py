"""What `adafv serve` sets where vLLM is a build for CPUs, unless the user did: the memory for keys and values.

On a CPU vLLM takes 92 % of the machine's memory, and writes to all of it at the start: 22 of 24 GB for a model of 5 million
parameters. It refuses to start where so much is not free.
"""

import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from math import ceil
from typing import Any

KEYS_AND_VALUES = "--kv-cache-memory-bytes"

DECIDES_MEMORY = (KEYS_AND_VALUES, "--gpu-memory-utilization", "--device-memory-utilization")
"""Options of vLLM, each of which says how much memory keys and values get; --num-gpu-blocks-override is none, as vLLM still
refuses to start where the 92 % are not free."""
VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
"""Of the environment; says the same, in GiB."""

GIB = 2**30
LEAST, MOST = 1, 4
"""GiB."""
PROMPTS = 16
"""Of the greatest length, for which there is memory as long as that is not above `MOST`; pruned ones are much shorter."""
BLOCKS = 256
"""Tokens; two of vLLM's blocks on a CPU, by which it rounds."""

_SUFFIXES = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}


def is_for_cpus(distribution: str) -> bool:
    """Whether vLLM, installed from this distribution, would run on the CPU; decided as it decides itself."""
    return os.environ.get("VLLM_TARGET_DEVICE") == "cpu" or "cpu" in distribution or "cpu" in version(distribution)


def decides_memory(options: Sequence[str]) -> bool:
    """Whether vLLM's options or the environment say how much memory keys and values get."""
    if os.environ.get(VARIABLE):
        return True
    names = (option.partition("=")[0].replace("_", "-") for option in options)
    # vLLM takes options that are cut short, too.
    return any(len(name) > 4 and known.startswith(name) for name in names for known in DECIDES_MEMORY)


def gibibytes(config: Any, length: str | None, precision: str | None) -> int:
    """Memory for keys and values, in one worker: for some prompts, and at least for one of the greatest length.

    Args:
        config: of the model, as transformers reads it.
        length: what --max-model-len says.
        precision: what --dtype says.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = 4 if precision in ("float32", "float") else 2  # vLLM's "auto" never takes four
    per_token = 2 * text.num_hidden_layers * heads * width * size
    longest = _tokens(length, text.max_position_embeddings)
    if longest is None:  # vLLM fits it to the memory
        return MOST
    one = ceil((longest + BLOCKS) * per_token / GIB)
    return max(one, min(max(LEAST, ceil(PROMPTS * longest * per_token / GIB)), MOST))


def _tokens(written: str | None, default: int) -> int | None:
    """A length as vLLM reads it; None for one that it chooses itself, or will refuse."""
    if written is None:
        return default
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", written.strip())
    return int(float(found[1]) * _SUFFIXES.get(found[2], 1)) if found else None
