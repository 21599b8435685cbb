"""The one interface of a pruning method.

Why it looks like this. kvpress gives each method a dataclass in a file of its own, with its parameters as fields, and
all methods share one way of being applied; that is what makes its catalogue easy to extend and to test as a matrix. We
do the same, and keep a method free of models and engines: it names the signals that it needs, sees tensors, and returns
indices, or indices and weights where it merges tokens. So the same object works in transformers and in vLLM, one image
or many, and a test needs no model.

A method says at which stages it acts:

    image   before the tower: `plan` asks for a lower resolution (down-sampling)
    tokens  between tower and language model: `select` chooses tokens, or mixes them
    layers  inside the language model: `cuts` says at which decoder layers, `select` chooses at each of them. transformers
            alone has this stage, within a `Pruner`
    tower   inside the tower: known by name, so that an engine that has no such place refuses such a method. No engine has
            it yet; it comes with the first method that needs it.

An image that keeps all its tokens is never shown to a method.
"""

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence, Set
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, ClassVar, get_type_hints

from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.select import is_ours
from adafv.core.tokens import READ, Cut, Kept, Plan, Signal, VisualTokens
from adafv.errors import MethodError, OptionError
from adafv.registry import Found, cause, find

IMAGE, TOWER, TOKENS, LAYERS = "image", "tower", "tokens", "layers"


class Method(ABC):
    """A pruning method. Subclasses are frozen dataclasses whose fields are the method's parameters."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for the catalogue: what is kept."""
    paper: ClassVar[str] = ""
    """Where it is described, such as "AdaFV, arXiv 2501.09532"; empty for baselines. The public code that was read, with its
    commit, and where this file departs from either stands in the docstring of the class."""
    cost: ClassVar[str] = ""
    """What choosing K of N tokens takes, beside one pass over them: "sort", "K steps, N x K", "N x N, K steps"."""
    mixes: str = TOKENS
    """What the weights of merged tokens mix: the visual tokens ("tokens"), or, with the stage's own name "tower", what the
    projector reads, so that it projects the mixes."""
    needs: ClassVar[frozenset[Signal]] = frozenset()
    """What it must see besides the visual tokens; see `adafv.core.tokens`."""
    stages: ClassVar[frozenset[str]] = frozenset({TOKENS})
    scope: str | None = None
    """Which text counts where the caller does not say, see `adafv.prompts.text`; None: as for all methods."""
    may_repeat: bool = False
    """Whether `indices` may hold a token twice, or in any order, as one published code does."""

    @property
    def needs_words(self) -> bool:
        """Whether it looks at the prompt."""
        return any(not signal.of_tower and not signal.of_layers for signal in self.needs)

    @property
    def of_tower(self) -> frozenset[Signal]:
        """What must be read off the tower for it."""
        mixed = {READ} if self.mixes == TOWER else set()
        return frozenset(signal for signal in self.needs if signal.of_tower) | mixed

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        """What to do with an image, decided on the host before the tower runs.

        Args:
            layout: of the image.
            keep: what the budget leaves of it, 0 < keep < N. The plan may keep fewer, never more.

        Raises:
            BudgetError: the method cannot keep so many, or so few.
        """
        return Plan(keep)

    def count(self, tokens: VisualTokens, keep: int) -> Tensor:
        """[G] long, the number of tokens that stay of each image; asked for where the plan says "after the scores".

        Args:
            keep: what the budget leaves at most.
        """
        raise MethodError(
            f"the method {self.name} plans to count tokens after the scores, but has no `count`; write it, or plan a number"
        )

    def cuts(self, depth: int, tokens: int, keep: int) -> Sequence[Cut]:
        """Where inside the language model tokens go; asked on the host, of methods of the stage LAYERS in place of `plan`.

        At each cut `select` is then shown the tokens that are still there, one image at a time, with the attention of one
        layer among the signals (`LAST_ATTENTION`, `WORD_ATTENTION`), and what it leaves out is gone from `Cut.layer` on.

        Args:
            depth: decoder layers of the language model.
            tokens: N, of the image.
            keep: what the budget says, 0 < keep < N. The last cut may leave fewer, never more.

        Raises:
            BudgetError, MethodError: the method cannot keep so few, or the model has too few layers.
        """
        raise MethodError(f"the method {self.name} acts inside the language model, but has no `cuts`; write it")

    def without_text(self) -> "Method":
        """What chooses in this method's place for an image that no word counts for: a method that needs no text.

        Itself where it needs none; else visual saliency alone, which is what the text is weighed against in AdaFV. The
        one place where this is decided: an engine that finds no words (`NoWordsError`) asks here, and says so.
        """
        return method_named("saliency") if self.needs_words else self

    @abstractmethod
    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        """Choose `keep` tokens, as planned. 0 < keep < N."""


class Mixing(Method):
    """Base of methods that merge tokens where their option says: in front of the projector, or behind it."""

    before_projector: bool
    """A field of every subclass, in the place that it shall have among the options."""

    @property
    def mixes(self) -> str:  # type: ignore[override]
        return TOWER if self.before_projector else TOKENS


@cache
def found_methods() -> Found[Method]:
    """The methods of this package and of the entry points `adafv.methods`, and what could not be loaded."""
    return find("adafv.methods", "adafv.methods", Method, _fault, called_by_entry=True)  # type: ignore[type-abstract]


def known_methods() -> dict[str, type[Method]]:
    """Every method that could be loaded, by name; in the order of the names."""
    return dict(found_methods().classes)


def method_named(name: str, **parameters: Any) -> Method:
    """An instance of the method called `name`.

    Raises:
        OptionError: there is no such method, it could not be loaded, or it has no such parameter.
    """
    found = found_methods()
    if name not in found.classes:
        known = f"known are: {', '.join(found.classes)}"
        if broken := found.named(name):
            raise OptionError(f"the method {name!r} could not be loaded: {'; '.join(map(str, broken))}; {known}")
        raise OptionError(f"there is no method {name!r}; {known}{found.lacking()}")
    warn_of_namesakes(name)
    method: Any = found.classes[name]
    options = {field.name: field for field in fields(method) if field.init}
    for parameter in parameters:
        if parameter not in options:
            raise OptionError(
                f"the method {name!r} has no option {parameter!r}; it has {', '.join(options) if options else 'none'}"
            )
    needed = [
        option
        for option, field in options.items()
        if option not in parameters and field.default is MISSING and field.default_factory is MISSING
    ]
    if needed:
        raise OptionError(f"the method {name!r} has no default for {', '.join(needed)}; give a value")
    return method(**parameters)


def warn_of_namesakes(name: str) -> None:
    """Whoever installed another method of this name may mean that one."""
    found = found_methods()
    for refused in found.named(name):
        warnings.warn(f"the method {name!r} is that of {found.homes[name]}; {refused}", stacklevel=3)


def origin_of(method: Method) -> str:
    """Where a method that is not adafv's own comes from, with the release of its distribution; "" for adafv's own.

    What it chooses may be otherwise in its next release, of which nothing else here knows: so it is part of what answers and
    pruned images are kept under.
    """
    if is_ours(method):
        return ""
    found = found_methods()
    if found.classes.get(method.name) is type(method) and method.name in found.homes:
        return found.homes[method.name]
    return f"{type(method).__module__}:{type(method).__qualname__}"


TAKEN = frozenset({"keep", "method", "positions", "text", "processor", "video", "logits", "crops", "remember"})
"""Arguments of `Pruner` beside a method's options: one of the same name could not be given."""

RESERVED = frozenset({"all", "blank", "unpruned"})
"""Names by which lists of methods, and tables, mean something else."""


def _fault(method: type[Method]) -> str | None:
    """Why a class cannot be offered by name: its options must be known."""
    if method.name in RESERVED or method.name != method.name.strip() or {":", ","} & set(method.name):
        return f"has the name {method.name!r}, which lists of methods read as something else: rename it"
    if "__dataclass_fields__" not in vars(method):
        return "is no dataclass, so its options are not known: put @dataclass(frozen=True) in front of the class"
    options = {field.name for field in fields(method) if field.init}  # type: ignore[arg-type]
    if hidden := sorted(set(inspect.signature(method).parameters) - options):
        return f"takes {', '.join(hidden)} without fields of that name; every option is a field of the dataclass"
    if taken := sorted(TAKEN & options):
        return f"has an option {', '.join(taken)}, which is one of Pruner's own: rename it"
    if not isinstance(getattr(method, "summary", None), str):
        return "has no summary: set `summary`, one line"
    needs: Any = method.needs  # of some methods a property
    if not (
        hasattr(needs, "__get__") or (isinstance(needs, Collection) and all(isinstance(one, Signal) for one in needs))
    ):
        return "has needs that are no signals: set `needs`, as to frozenset({SALIENCY})"
    if not (hasattr(method.stages, "__get__") or isinstance(method.stages, Set)):
        return "has stages that are no set: set `stages`, as to frozenset({TOKENS})"
    try:
        get_type_hints(method)
        for field in fields(method):  # type: ignore[arg-type]
            if field.default_factory is not MISSING:
                field.default_factory()
    except Exception as error:
        return f"has options that cannot be listed, by type and default: {cause(error)}"
    return None
