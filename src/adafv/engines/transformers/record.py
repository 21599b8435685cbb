"""What one run did, for whoever wants to look."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adafv.core import ImageLayout


@dataclass
class Record:
    """One run: one entry per image (or video, or frame with a budget of its own) in all lists, in the prompts' order."""

    kept: list[Tensor]
    """[K] long, ascending: indices into the image's own tokens as the stock model would place them. Merged tokens: the
    token that stands for them. In the published variant, tokens may repeat, and -1 is a patch that the stock model cuts
    off as padding."""
    keep_mask: Tensor
    """[batch, length] bool over the prompt as given: True where the token stayed. Of padding it says nothing."""
    rows: list[int]
    """The prompt of the batch that the image stands in."""
    modalities: list[str]
    """"image" or "video"."""
    frames: list[int | None]
    """With a budget per frame: which frame of its video; else None."""
    layouts: list[ImageLayout]
    """Where each token of the image comes from."""
    crop: list[Tensor]
    """[K] long: crop (frame of a video) that the kept token shows, -1 where it shows none (newlines)."""
    row: list[Tensor]
    """[K] long: row inside the crop."""
    column: list[Tensor]
    """[K] long: column inside the crop."""
    saliency: list[Tensor | None]
    """[N] float32, attention of [CLS] to each token; None where the method did not ask. NaN where no patch is shown."""
    text_attention: list[Tensor | None]
    """[N] float32, text-to-image attention of each token; None where the method did not ask."""
    objective: list[float | None]
    """Geometric mean of the kept set; None for methods that do not maximise it, and where everything was kept."""
    certificate: list[float | None]
    """c: no set of K tokens has an objective above objective / (1 - c); None where that is unknown."""
    tokens_before: list[int]
    """N, visual tokens."""
    tokens_after: list[int]
    """K, visual tokens."""
    prompt_length_before: int
    prompt_length_after: int
    kv_bytes_before: int
    """Bytes of keys and values for the prompts of the batch, as given."""
    kv_bytes_after: int
    """... and as the language model saw them."""
    methods: list[str] = field(default_factory=list)
    """The method that chose: another than the one asked for where that needs text and no word of the prompt counts."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage: "tower" (with the projector), "selection", "compaction", "model" (the call of the stock
    model). On an accelerator work is queued, so without synchronising it is the time to queue it."""


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the block to `seconds[stage]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def kv_bytes(model: Any, tokens: int) -> int:
    """Bytes of keys and values that a prompt of so many tokens leaves in the cache, all layers together."""
    config = model.config.get_text_config()
    element = torch.empty((), dtype=model.get_input_embeddings().weight.dtype).element_size()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    # A layer with a sliding window keeps what the next token may look at besides itself.
    window = (getattr(config, "sliding_window", None) or tokens + 1) - 1
    return element * sum(
        _numbers_kept(config, layer) * (min(tokens, window) if kinds[layer] == "sliding_attention" else tokens)
        for layer in _layers_that_keep(config, len(kinds))
    )


def _layers_that_keep(config: Any, layers: int) -> list[int]:
    """Those that do not read the keys and values of another layer."""
    sharing = getattr(config, "kv_sharing_modes", None)
    if sharing:
        return [layer for layer in range(layers) if not str(sharing[layer]).startswith("reuse")]
    return list(range(layers - (getattr(config, "num_kv_shared_layers", None) or 0)))


def _numbers_kept(config: Any, layer: int) -> int:
    """Of the keys and values of one token, in one layer."""
    rotates = getattr(config, "no_rope_layers", None)  # 1 where it does, whatever the name says
    config = config.per_layer_config[layer]
    latent = getattr(config, "kv_lora_rank", None)
    if latent:  # DeepSeek-V3 keeps one latent for all heads, and one rotated key
        return int(latent + (config.qk_rope_head_dim if not rotates or rotates[layer] else 0))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * heads * head_size)
