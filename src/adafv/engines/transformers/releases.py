"""What differs between releases of transformers, and what they get wrong, said once for the engine and its families.

transformers 5.24 renamed the cache: `past_key_values` became `cache` in `forward`, `generate`, hooks and outputs. The old
name is still taken there, with a warning; older releases know the old one alone. Here both names are read under every
release, and the stock model is called by the name that its release uses, so no warning is of our making.

Functions and classes of single models are looked up by name where they are used (`of_stock`), never as a family is
imported: one that is renamed takes down its family and no other, and no model code is loaded for the models of others.
"""

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import fields
from functools import cache as once
from typing import Any

import torch
import transformers
import transformers.generation.utils
from packaging.version import Version
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from adafv.errors import CacheError, UnsupportedCallError, UnsupportedModelError

OLDEST_TESTED = "5.18.0"
NEWEST_TESTED = "5.24.0"
"""The releases that tests run on: the newest and a slice on the oldest in CI, all on both in `make test-all`."""

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the argument, and of the output's field, that hold the key/value cache, the newest first."""

CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})
"""The one that this release uses."""

_RELEASE = Version(transformers.__version__).release

# ------------------------------------------------------------------------------------------------ what is wrong with some

CHUNKED_PREFILL_KEEPS_IMAGES = hasattr(transformers.generation.utils, "_slice_mm_encoder_output")
"""transformers 5.18 sends no image into any chunk, and answers without having seen it; 5.23 cuts the images up."""

GUESSES_AHEAD = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
"""Settings of assisted decoding. On a cache that holds tokens already, 5.18 and 5.24 read these once more, behind it."""

REPEATS_IMAGES_IN_ORDER = Version(transformers.__version__) >= Version("5.23")
"""Older releases repeat several entries of one prompt in the wrong order for beams and several return sequences."""

READS_TYPES_FROM_THE_BEGINNING = _RELEASE >= (5, 23)
"""Gemma 3: whether `generate` hands over the `token_type_ids` of cached tokens too. They are looked up by place in the
sequence; older releases hand over those of the new tokens alone, which are then taken for the cached ones."""

MIXES_UP_PACKED_IMAGES = _RELEASE >= (5, 23)
"""Gemma 3: whether layers with a sliding window find the tokens of an image by positions, which start again at every packed
prompt: then tokens of one prompt look ahead where an image of another stands."""

KEEPS_PACKED_PREFIXES_APART = _RELEASE >= (5, 24)
"""PaliGemma: older releases let packed prompts look at each other, as all of a prompt may."""

COUNTS_ALONG_COSMOS_PROMPTS = _RELEASE >= (5, 24)
"""Cosmos 3 Edge: whether positions in three axes may come with one along the prompt. 5.18 fails; between, nobody looked."""


def one_by_one(tokens: Tensor) -> Tensor:
    """Visual tokens [N, D] as N images of one token each, for models that read their images as one tensor.

    [N, 1, D]; in releases that would mix them up where `generate` repeats them, [N, D, 1]: it is read just so too, but
    `generate` fails to repeat it. `cannot_be_repeated` tells them apart.
    """
    return tokens.unsqueeze(1 if REPEATS_IMAGES_IN_ORDER else 2)


def cannot_be_repeated(features: Any) -> bool:
    """Whether what is handed to the stock model is a tensor of `one_by_one` that `generate` would mix up."""
    return not REPEATS_IMAGES_IN_ORDER and isinstance(features, Tensor) and features.shape[-1] == 1


def check_any_number_of_tokens(base: torch.nn.Module, name: str) -> None:
    """Raise UnsupportedModelError for releases in which SmolVLM reads its visual tokens in blocks of one length."""
    if not hasattr(base, "get_placeholder_mask"):
        raise UnsupportedModelError(
            f"this release of transformers reads the visual tokens of {name} in blocks of one length, and so takes no "
            "pruned ones; run: pip install --upgrade transformers"
        )


def check_tower_in_base(base: torch.nn.Module, name: str) -> None:
    """Raise UnsupportedModelError for releases in which the thinkers of Qwen's Omni models hold the tower themselves."""
    if not hasattr(base, "get_image_features"):
        raise UnsupportedModelError(
            f"{name} has its tower elsewhere in this release of transformers; install a newer one"
        )


def check_counts_along_prompt(name: str) -> None:
    """Raise UnsupportedModelError for releases in which Cosmos 3 Edge takes positions in three axes alone."""
    if not COUNTS_ALONG_COSMOS_PROMPTS:
        raise UnsupportedModelError(
            f"this release of transformers gives {name} no position along the prompt beside those in time, height and "
            "width; run: pip install --upgrade transformers"
        )


def layers_setting(config: Any) -> str:
    """What this release calls the setting of ViP-LLaVA that says which layers of the tower are read."""
    return "vision_feature_layer" if hasattr(config, "vision_feature_layer") else "vision_feature_layers"


# ------------------------------------------------------------------------------------------------------ what has new names


def of_stock(module: str, name: str) -> Any:
    """A function or class of the modeling file of one model: of_stock("llava_next.modeling_llava_next", "...").

    Raises:
        UnsupportedModelError: this release has it no more.
    """
    try:
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no {name} in transformers.models.{module}, which this family "
            f"needs; run: pip install 'transformers<={NEWEST_TESTED}'"
        ) from error


@once
def warn_if_untested() -> None:
    """Warn, once in a process, where transformers is newer than the newest release that was tested."""
    if Version(transformers.__version__) > Version(NEWEST_TESTED):
        warnings.warn(
            f"transformers {transformers.__version__} is newer than the releases that this adafv was tested with "
            f"({OLDEST_TESTED} to {NEWEST_TESTED}); if an answer looks wrong, compare it with keep=1.0, or run: "
            f"pip install 'transformers<={NEWEST_TESTED}'",
            stacklevel=3,
        )


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The key/value cache among the arguments of a call, under whichever name; None where there is none.

    Raises:
        UnsupportedCallError: it is given under both names.
        CacheError: it is not a cache object of transformers.
    """
    given = {name: arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None}
    if len(given) > 1:
        raise UnsupportedCallError(f"the cache is given twice, as {' and '.join(given)}; leave one of them out")
    if not given:
        return None
    [(name, cache)] = given.items()
    if not hasattr(cache, "get_seq_length"):
        raise CacheError(
            f"{name} is a {type(cache).__name__}, not a cache object of transformers; pass the one that the model returned, "
            "or build one: DynamicCache(config=model.config)"
        )
    return cache


def named_for_this_release(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, with the cache under the name that this release uses."""
    cache = cache_of(arguments)
    if cache is None:
        return arguments
    return {**{name: value for name, value in arguments.items() if name not in CACHE_NAMES}, CACHE: cache}


def returned_cache(output: Any) -> Any:
    """The cache in what `generate` or `forward` returned; None where there is none."""
    return getattr(output, CACHE, None)


def holds_a_cache(value: Any) -> bool:
    """Whether an argument is, or contains, a key/value cache: an object of transformers, or tensors by layer, as of old."""
    if hasattr(value, "get_seq_length"):
        return True
    if not isinstance(value, (list, tuple)):
        return False
    return any(holds_a_cache(item) or _is_layer(item) for item in value)


def _is_layer(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 1 and all(getattr(part, "ndim", 0) == 4 for part in value)
