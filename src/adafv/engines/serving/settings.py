"""The options of a server, from `--hf-overrides '{"adafv": {...}}'`, and of a request, from `mm_processor_kwargs`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from adafv.core.budget import check_keep, tokens_to_keep
from adafv.core.select import check_method
from adafv.core.tokens import WORDS
from adafv.errors import BudgetError, MethodError, OptionError
from adafv.methods import Method, method_named
from adafv.methods.base import TOKENS
from adafv.prompts.text import SCOPES

OPTION = "adafv"
"""Name of the options, in the config of the model and in a request's `mm_processor_kwargs`."""

MEBIBYTE = 2**20
MOST_TOKENS = 2**31 - 1
"""A budget above is a mistake; one up to it is stored in any integer on its way to the worker."""


@dataclass(frozen=True)
class Budget:
    """How many tokens of an image stay."""

    keep: int | float
    """A number of tokens, which is an upper bound: an image that has fewer keeps all. Or a share of them."""

    @property
    def keeps_all(self) -> bool:
        """Whether every token of any image stays; 1.0 does, 1 does not."""
        return isinstance(self.keep, float) and self.keep == 1.0

    def tokens(self, available: int) -> int:
        """K for an image of `available` (N) tokens."""
        return tokens_to_keep(self.keep, available)


@dataclass(frozen=True)
class ServerSettings:
    """What a server was started with."""

    method: Method
    budget: Budget
    most: Budget
    """The largest budget that a request may ask for; what vLLM reserves memory for."""
    scope: str | None
    """Which text counts, see `adafv.prompts.text`; None: "question" where the chat template shows it, else "turn"."""
    tower_cache_bytes: int
    """Of encoded images, per worker."""
    identity: str = field(repr=False, default="")
    """Everything but the budget that decides which tokens stay: part of what the caches know an image by."""

    @cached_property
    def method_without_text(self) -> Method:
        """What chooses where no word counts."""
        return self.method.without_text()

    def method_for(self, words: bool) -> Method:
        """What chooses for an image, by whether any word counts for it."""
        return self.method if words or not self.method.needs_words else self.method_without_text

    @classmethod
    def of(cls, options: Any) -> "ServerSettings":
        """Check `{"keep": 64, "method": "adafv", "parameters": {}, "max_keep": 1.0, "text": None, "tower_cache_mb": 256}`.

        Raises:
            BudgetError, OptionError: an option is missing, unknown or has no such value.
        """
        if not isinstance(options, Mapping):
            raise OptionError(
                f"the model's config says {OPTION}={options!r}; start vLLM with "
                f"""--hf-overrides '{{"architectures": [...], "{OPTION}": {{"keep": 64}}}}'"""
            )
        known = {"keep", "method", "parameters", "max_keep", "text", "tower_cache_mb"}
        _refuse_unknown(options, known, "the server's options")
        if "keep" not in options:
            raise OptionError(
                f'the option keep is missing: {{"{OPTION}": {{"keep": 64}}}} keeps 64 tokens of every image'
            )
        method = _method(options.get("method", "adafv"), options.get("parameters", {}))
        scope = options.get("text")
        if scope is not None and scope not in SCOPES:
            raise OptionError(f"text={scope!r}; known are: {', '.join(SCOPES)}")
        cache = options.get("tower_cache_mb", 256)
        if isinstance(cache, bool) or not isinstance(cache, (int, float)) or not 0 <= cache < 2**40:
            raise OptionError(f"tower_cache_mb={cache!r}; give a number of MiB, or 0 for no cache")
        budget, most = Budget(_keep("keep", options["keep"])), Budget(_keep("max_keep", options.get("max_keep", 1.0)))
        if not _within(budget, most):
            raise BudgetError(f"keep={budget.keep} is above max_keep={most.keep}; raise max_keep or leave it out")
        shown = asdict(method) | {"method": method.name, "text": scope}  # type: ignore[call-overload]
        identity = json.dumps(shown, sort_keys=True)
        return cls(method, budget, most, scope, int(cache * MEBIBYTE), identity)

    def asked(self, options: Any) -> Budget:
        """The budget of a request whose `mm_processor_kwargs` has `options` under "adafv"; None: it has none.

        Raises:
            BudgetError, OptionError: which vLLM answers with status 400.
        """
        if options is None:
            return self.budget
        if not isinstance(options, Mapping):
            raise OptionError(f'{OPTION}={options!r} in mm_processor_kwargs; give {{"{OPTION}": {{"keep": 64}}}}')
        _refuse_unknown(options, {"keep"}, "a request's options")
        if "keep" not in options:
            return self.budget
        budget = Budget(_keep("keep", options["keep"]))
        if not _within(budget, self.most):
            raise BudgetError(
                f"keep={budget.keep}, but this server keeps at most max_keep={self.most.keep}; ask for less"
            )
        return budget


def _within(budget: Budget, most: Budget) -> bool:
    """Whether a budget surely is none above `most`, whatever the size of an image; numbers and shares do not compare."""
    if most.keeps_all:
        return True
    if isinstance(budget.keep, int) != isinstance(most.keep, int):
        raise BudgetError(
            f"keep={budget.keep} and max_keep={most.keep} do not compare; give two numbers of tokens, or two shares"
        )
    return budget.keep <= most.keep


def _refuse_unknown(options: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in options:
        if name not in known:
            raise OptionError(f"{where} have no {name!r}; they have: {', '.join(sorted(known)) or 'none'}")


def _keep(name: str, value: Any) -> int | float:
    """`value` as a plain number; see `check_keep`, which also takes the text of a share."""
    try:
        if isinstance(value, (str, bytes)):
            raise BudgetError(f"keep={value!r} is text; give a number of tokens (64) or a share (0.1)")
        keep = check_keep(value)
        if keep > MOST_TOKENS:
            raise BudgetError(f"keep is above {MOST_TOKENS}; no image has so many visual tokens")
    except BudgetError as error:
        raise error if name == "keep" else BudgetError(f"{name}: {error}") from None
    return keep


def _method(name: Any, parameters: Any) -> Method:
    """The method, if it does what vLLM's prompts can show."""
    if not isinstance(name, str):
        raise OptionError(f"method={name!r}; give its name, such as 'adafv'")
    if not isinstance(parameters, Mapping):
        raise OptionError(
            f"parameters={parameters!r}; give the method's options by name, such as {{'objective': 'joint'}}"
        )
    defaults = {option.name: option.default for option in fields(method_named(name))}  # type: ignore[arg-type]
    _refuse_unknown(parameters, set(defaults), f"the options of the method {name!r}")
    for option, value in parameters.items():
        # The worker would find it out in the midst of a request.
        if type(value) is not type(defaults[option]):
            raise OptionError(f"{option}={value!r}; give a value like {defaults[option]!r}")
    method = method_named(name, **parameters)
    if method.may_repeat:
        raise MethodError("the published variant repeats tokens, which vLLM's prompts cannot; use variant='corrected'")
    check_method(method, "vLLM", frozenset({TOKENS}), frozenset({WORDS}).__contains__)
    return method
