"""The options of a server, from `--hf-overrides '{"adafv": {...}}'`, and of a request, from `mm_processor_kwargs`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from adafv.core import Budget, ImageLayout
from adafv.core.crops import ALL, ALL_CROPS, AUTO, CERTAIN, THUMBNAIL, Crops, chooses
from adafv.core.select import check_method, is_ours, plan_of
from adafv.core.tokens import SALIENCY, WORDS, Plan, Signal
from adafv.errors import BudgetError, MethodError, OptionError
from adafv.methods import Method
from adafv.methods.base import TOKENS, TOWER, origin_of
from adafv.methods.options import method_of
from adafv.prompts.text import SCOPES

OPTION = "adafv"
"""Name of the options, in the config of the model and in a request's `mm_processor_kwargs`."""

MEBIBYTE = 2**20


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
    crops: Crops = ALL_CROPS
    """Of an image that the model sees in crops, those that the tower is to see; see `adafv.core.crops`."""
    identity: str = field(repr=False, default="")
    """Everything but budget and crops that decides which tokens stay: part of what the caches know an image by."""

    @cached_property
    def method_without_text(self) -> Method:
        """What chooses where no word counts."""
        return self.method.without_text()

    def method_for(self, words: bool) -> Method:
        """What chooses for an image, by whether any word counts for it."""
        return self.method if words or not self.method.needs_words else self.method_without_text

    @cached_property
    def signals(self) -> frozenset[Signal]:
        """What is read off the tower, whichever request comes: which images come without words is known only then, and what
        is cached of an image serves every question."""
        chosen = {SALIENCY} if self.crops.chosen and self.crops.most != 0 else set()
        return self.method.of_tower | self.method_without_text.of_tower | chosen

    def plan(self, layout: ImageLayout, budget: Budget, words: bool, crops: Crops = ALL_CROPS) -> Plan | None:
        """What is to become of an image, alike in the front, which writes its placeholders, and in the worker, which
        chooses; None: all of it stays.

        Args:
            words: whether any word counts for it.

        Raises:
            BudgetError: the method cannot keep so many, or so few.
            MethodError: the method counts after the scores, when the prompt is long written.
        """
        keep = min(budget.tokens(layout.tokens), crops.tokens(layout))
        if keep == layout.tokens:
            return None
        method = self.method_for(words)
        plan = plan_of(method, layout, keep)
        if plan.keep is None or plan.grid is not None or plan.arranged is not None:
            raise MethodError(
                f"the method {method.name} counts its tokens after the tower, or looks at another image; vLLM writes the "
                "prompt before that: use another method"
            )
        # vLLM would read the first K of what the worker kept, whichever they are.
        if not is_ours(method) and plan_of(method, layout, keep) != plan:
            raise MethodError(
                f"the method {method.name} plans otherwise each time, and vLLM asks once where it writes the prompt and once "
                "where tokens are chosen: plan by the image and the budget alone"
            )
        return plan

    def chooses(self, layout: ImageLayout, plan: Plan, words: bool, crops: Crops) -> bool:
        """Whether some crops of an image need not be encoded; raises where they cannot be chosen (`adafv.core.crops`)."""
        return chooses(crops, layout, plan, self.method_for(words))

    def tokens_of(self, layout: ImageLayout, budget: Budget, words: bool, crops: Crops = ALL_CROPS) -> int:
        """K, the number of tokens that stay.

        Raises:
            BudgetError, MethodError, UnsupportedCallError: the worker could not choose them.
        """
        plan = self.plan(layout, budget, words, crops)
        if plan is not None:
            self.chooses(layout, plan, words, crops)
        return layout.tokens if plan is None or plan.keep is None else plan.keep

    @classmethod
    def of(cls, options: Any) -> "ServerSettings":
        """Check `{"keep": 64, "method": "adafv", "parameters": {}, "max_keep": 1.0, "text": None, "tower_cache_mb": 256,
        "crops": "all"}`.

        Raises:
            BudgetError, OptionError: an option is missing, unknown or has no such value.
        """
        if not isinstance(options, Mapping):
            raise OptionError(
                f"the model's config says {OPTION}={options!r}; start vLLM with "
                f"""--hf-overrides '{{"architectures": [...], "{OPTION}": {{"keep": 64}}}}'"""
            )
        known = {"crops", "keep", "method", "parameters", "max_keep", "text", "tower_cache_mb"}
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
        budget, most = Budget.of(options["keep"]), Budget.of(options.get("max_keep", 1.0), "max_keep")
        if not budget.within(most):
            raise BudgetError(f"keep={budget} is above max_keep={most}; raise max_keep or leave it out")
        shown = asdict(method) | {"method": method.name, "text": scope}  # type: ignore[call-overload]
        if origin := origin_of(method):
            shown["comes from"] = origin  # which no option can be called
        # What JSON has no word for cannot have been given: it is the default.
        identity = json.dumps(shown, sort_keys=True, default=lambda value: type(value).__qualname__)
        crops = _crops(options.get("crops", ALL))
        return cls(method, budget, most, scope, int(cache * MEBIBYTE), crops, identity)

    def asked(self, options: Any) -> Budget:
        """The budget of a request whose `mm_processor_kwargs` has `options` under "adafv"; None: it has none.

        Raises:
            BudgetError, OptionError: which vLLM answers with status 400.
        """
        if options is None:
            return self.budget
        if not isinstance(options, Mapping):
            raise OptionError(f'{OPTION}={options!r} in mm_processor_kwargs; give {{"{OPTION}": {{"keep": 64}}}}')
        _refuse_unknown(options, {"keep", "crops"}, "a request's options")
        if "keep" not in options:
            return self.budget
        budget = Budget.of(options["keep"])
        try:
            within = budget.within(self.most)
        except BudgetError as error:  # who asks can change one of the two alone
            kind = "a share" if isinstance(self.most.keep, float) else "a number of tokens"
            raise BudgetError(
                f"keep={budget} and this server's max_keep={self.most} do not compare; ask for {kind}"
            ) from error
        if not within:
            raise BudgetError(f"keep={budget}, but this server keeps at most max_keep={self.most}; ask for less")
        return budget

    def crops_asked(self, options: Any) -> Crops:
        """The crops of a request with these options, which `asked` has looked at.

        Raises:
            OptionError: which vLLM answers with status 400.
        """
        if options is None or "crops" not in options:
            return self.crops
        crops = _crops(options["crops"])
        if crops.chosen and crops.most != 0 and SALIENCY not in self.signals:
            raise OptionError(
                f"crops={str(crops)!r}, but this server does not read the saliency that ranks crops, which its method has no "
                f"use for; give crops={THUMBNAIL!r}, or start the server with crops=1, which reads it"
            )
        return crops


def _crops(value: Any) -> Crops:
    """The crops, if vLLM can know them before it writes the prompt."""
    crops = Crops.of(value)
    if crops.certain is not None:
        raise OptionError(
            f"crops={AUTO!r} asks a question again where its answer is not certain, and vLLM has written the prompt, and "
            f"gives the answer away, before that is known; ask with crops={THUMBNAIL!r} and logprobs, and where the first "
            f"token has a probability below {CERTAIN}, ask again with crops={ALL!r}"
        )
    return crops


def _refuse_unknown(options: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in options:
        if name not in known:
            raise OptionError(f"{where} have no {name!r}; they have: {', '.join(sorted(known)) or 'none'}")


def _method(name: Any, parameters: Any) -> Method:
    """The method, if it does what vLLM's prompts can show."""
    if not isinstance(name, str):
        raise OptionError(f"method={name!r}; give its name, such as 'adafv'")
    if not isinstance(parameters, Mapping):
        raise OptionError(
            f"parameters={parameters!r}; give the method's options by name, such as {{'objective': 'joint'}}"
        )
    method = method_of(name, parameters)
    if method.may_repeat:
        raise MethodError("the published variant repeats tokens, which vLLM's prompts cannot; use variant='corrected'")
    check_method(method, "vLLM", frozenset({TOKENS}), frozenset({WORDS}).__contains__, (TOKENS, TOWER))
    return method
