"""The one interface of a pruning method.

Why it looks like this. kvpress gives each method a dataclass in a file of its own, with its parameters as fields, and
all methods share one way of being applied; that is what makes its catalogue easy to extend and to test as a matrix. We
do the same, and keep a method free of models and engines: it names the signals that it needs, sees tensors, and returns
indices, or indices and weights where it merges tokens. So the same object works in transformers and in vLLM, one image
or many, and a test needs no model.

A method says at which stages it acts:

    image   before the tower: `plan` asks for a lower resolution (down-sampling)
    tokens  between tower and language model: `select` chooses tokens, or mixes them
    tower   inside the tower; layers   inside the language model: known by name, so that an engine that has no such
            place refuses such a method. No engine has one yet; it comes with the first method that needs it.

An image that keeps all its tokens is never shown to a method.
"""

from abc import ABC, abstractmethod
from dataclasses import fields
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from adafv.core import ImageLayout
from adafv.core.tokens import Kept, Plan, Signal, VisualTokens
from adafv.discovery import concrete_subclasses
from adafv.errors import OptionError

IMAGE, TOWER, TOKENS, LAYERS = "image", "tower", "tokens", "layers"


class Method(ABC):
    """A pruning method. Subclasses are frozen dataclasses whose fields are the method's parameters."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for the catalogue, with the source."""
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
        return any(not signal.of_tower for signal in self.needs)

    @property
    def of_tower(self) -> frozenset[Signal]:
        """What it needs of the tower."""
        return frozenset(signal for signal in self.needs if signal.of_tower)

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
        raise NotImplementedError(f"{self.name} plans to count tokens after the scores, but has no `count`")

    def without_text(self) -> "Method":
        """What chooses in this method's place for an image that no word counts for: a method that needs no text.

        Itself where it needs none; else visual saliency alone, which is what the text is weighed against in AdaFV. The
        one place where this is decided: an engine that finds no words (`NoWordsError`) asks here, and says so.
        """
        return method_named("saliency") if self.needs_words else self

    @abstractmethod
    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        """Choose `keep` tokens, as planned. 0 < keep < N."""


@cache
def known_methods() -> dict[str, type[Method]]:
    """Every method in this package, by name."""
    return {
        method.name: method for method in sorted(concrete_subclasses("adafv.methods", Method), key=lambda m: m.name)
    }


def method_named(name: str, **parameters: Any) -> Method:
    """An instance of the method called `name`.

    Raises:
        OptionError: there is no such method, or it has no such parameter.
    """
    methods = known_methods()
    if name not in methods:
        raise OptionError(f"there is no method {name!r}; known are: {', '.join(methods)}")
    method: Any = methods[name]
    possible = [field.name for field in fields(method)]
    for parameter in parameters:
        if parameter not in possible:
            raise OptionError(
                f"the method {name!r} has no option {parameter!r}; it has {', '.join(possible) if possible else 'none'}"
            )
    return method(**parameters)
