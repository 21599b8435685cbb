"""The options, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import GenerationConfig

from adafv.core import Budget
from adafv.core.crops import ALL_CROPS, Crops
from adafv.engines.transformers.remembered import ImageStore
from adafv.errors import MethodError, OptionError
from adafv.methods import Method
from adafv.methods.base import TOKENS
from adafv.methods.options import method_of
from adafv.printable import shortened
from adafv.prompts.text import ChatTemplate, resolve_scope

POSITIONS = ("compact", "original")
LOGITS = ("prompt", "kept")
VIDEO_BUDGETS = ("clip", "frame")
GENERATION_SETTINGS = frozenset(vars(GenerationConfig()))


@dataclass(frozen=True)
class Settings:
    """How to prune, whatever the model."""

    method: Method
    budget: Budget
    positions: str
    scope: str
    template: ChatTemplate | None
    video: str
    logits: str = "prompt"
    crops: Crops = ALL_CROPS
    unsure: frozenset[int] = frozenset()
    """Prompts of the batch that get all crops nevertheless."""
    tokenizer: Any = None
    """Of the processor, for methods that read words as text."""
    store: ImageStore | None = None
    """Where encoded images are kept; None: nowhere."""

    @cached_property
    def method_without_text(self) -> Method:
        """What chooses where no word counts."""
        return self.method.without_text()

    @classmethod
    def of(
        cls,
        method: str | Method,
        keep: Budget | int | float | str,
        positions: str = "compact",
        scope: str | None = None,
        processor: Any = None,
        video: str = "clip",
        logits: str = "prompt",
        crops: Crops | str | int = "all",
        remember: ImageStore | int | float | str | None = None,
        **parameters: Any,
    ) -> "Settings":
        """Check the options, see `Pruner`."""
        if isinstance(method, str):
            method = method_of(method, parameters)
        elif not isinstance(method, Method):
            raise OptionError(
                f"method={shortened(repr(method), 80)}; give a name (see `adafv methods`), or a Method: not a class, but "
                "what it makes"
            )
        elif parameters:
            raise OptionError(f"{', '.join(parameters)}: a Method has its options already; give them where it is made")
        if positions not in POSITIONS:
            raise OptionError(f"positions={positions!r}; known are: {', '.join(POSITIONS)}")
        if video not in VIDEO_BUDGETS:
            raise OptionError(f"video={video!r}; known are: {', '.join(VIDEO_BUDGETS)}")
        if logits not in LOGITS:
            raise OptionError(f"logits={logits!r}; known are: {', '.join(LOGITS)}")
        if method.may_repeat and positions != "compact":
            raise OptionError("the published variant repeats tokens, so they have no original positions")
        chosen = Crops.of(crops)
        if chosen.chosen and (method.stages != {TOKENS} or method.may_repeat):
            raise MethodError(
                f"the method {method.name} does not choose among encoded tokens, or repeats them, so it knows nothing of "
                f"crops that are not encoded; leave crops={str(chosen)!r} out, or use another method"
            )
        resolved, template = resolve_scope(method.scope if scope is None else scope, processor)
        tokenizer = getattr(processor, "tokenizer", processor)
        store = ImageStore.of(remember)
        return cls(
            method,
            Budget.of(keep),
            positions,
            resolved,
            template,
            video,
            logits,
            chosen,
            tokenizer=tokenizer,
            store=store,
        )

    def crops_of(self, row: int) -> Crops:
        """Those of the images in a prompt of the batch."""
        return ALL_CROPS if row in self.unsure else self.crops

    @property
    def keep(self) -> int | float:
        """The budget as a plain number."""
        return self.budget.keep


def setting(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """A generation setting, by `generate`'s own precedence: argument, generation_config, the model's default."""
    if name in arguments:
        return arguments[name]
    chosen = getattr(arguments.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if chosen is None else chosen


def said(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a call's arguments that say something: a generation setting says something as None too, it switches off what
    the model's own configuration asks for."""
    return {name: value for name, value in arguments.items() if value is not None or name in GENERATION_SETTINGS}
