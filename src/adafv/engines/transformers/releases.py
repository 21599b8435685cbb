"""What differs between releases of transformers, said once for the engine.

transformers 5.24 renamed the cache: `past_key_values` became `cache` in `forward`, `generate`, hooks and outputs. The old
name is still taken there, with a warning; older releases know the old one alone. Here both names are read under every
release, and the stock model is called by the name that its release uses, so no warning is of our making.
"""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from functools import cache as once
from typing import Any

import transformers
from packaging.version import Version
from transformers.modeling_outputs import CausalLMOutputWithPast

from adafv.errors import CacheError, UnsupportedCallError

OLDEST_TESTED = "5.18.0"
NEWEST_TESTED = "5.24.0"
"""The releases on which the whole suite runs in CI (`make oldest`, `make test`)."""

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the argument, and of the output's field, that hold the key/value cache, the newest first."""

CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})
"""The one that this release uses."""


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
    """Whether an argument is, or contains, a key/value cache."""
    if hasattr(value, "get_seq_length"):
        return True
    return isinstance(value, (list, tuple)) and any(holds_a_cache(item) for item in value)
