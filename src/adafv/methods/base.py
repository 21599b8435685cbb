"""The one interface of a pruning method.

Why it looks like this. kvpress gives each method a dataclass in a file of its own, with its parameters as fields, and
all methods share one way of being applied; that is what makes its catalogue easy to extend and to test as a matrix. We
do the same, and keep a method free of models and engines: it sees tensors and returns indices. So the same object works
in transformers and in vLLM, one image or many, and a test needs no model.

A method takes part at up to two points, in this order:

    grid     before the tower: look at the image at a lower resolution (down-sampling)
    select   between projector and language model: choose tokens, or replace them by merged ones

An image that keeps all its tokens is never shown to a method.

Methods that prune inside the language model need a third point, the layers; it will be added with the first of them.
"""

import inspect
import warnings
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from adafv.core import ImageLayout
from adafv.errors import OptionError
from adafv.registry import Found, find


@dataclass(frozen=True)
class VisualTokens:
    """What a method sees: G images with the same number N of visual tokens each."""

    features: Tensor
    """[G, N, D], the visual tokens as the language model would read them. In training they carry gradients: detach them
    for scores, use them as they are for merging."""
    saliency: Tensor | None
    """[G, N] float32, attention of [CLS] (see `adafv.core.class_attention`); None unless `needs_saliency`."""
    text: Tensor | None
    """[G, T, D], input embeddings of the text that counts; None unless `needs_text`."""
    text_mask: Tensor | None
    """[G, T] bool, False on padding."""
    shows_patch: Tensor
    """[G, N] bool, False for tokens that show no part of the image, such as newlines."""
    source: Tensor
    """[G, N] long, where each token comes from: see `adafv.core.ImageLayout`."""
    crops: int
    rows: int
    columns: int
    grid: tuple[int, int] | None = None
    """(rows, columns) of `features` where the method asked for a lower resolution: then they are [G, rows * columns, D]."""


@dataclass(frozen=True)
class Kept:
    """What a method decided; the leading dimension is that of `VisualTokens`."""

    indices: Tensor
    """[G, K] long, ascending. For merged tokens: the token that stands for the merged ones."""
    features: Tensor | None = None
    """[G, K, D], what the language model reads in their place; None: the tokens at `indices` as they are."""
    text_attention: Tensor | None = None
    """[G, N] float32, where the method computed it."""
    objective: Tensor | None = None
    """[G] geometric mean of the kept set, where the method maximises it."""
    certificate: Tensor | None = None
    """[G] share by which the objective may fall short of the best set of K tokens, where it is known."""


class Method(ABC):
    """A pruning method. Subclasses are dataclasses whose fields are the method's parameters."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for the catalogue, with the source."""
    needs_text: ClassVar[bool] = False
    needs_saliency: ClassVar[bool] = False
    published_layout: bool = False
    """Whether the tokens are to be laid out as the published AdaFV code does (see `families`)."""

    def budget(self, keep: int, layout: ImageLayout) -> int:
        """The number of tokens really kept for a budget of `keep`; known before the tower runs."""
        return keep

    def grid(self, keep: int, layout: ImageLayout) -> tuple[int, int] | None:
        """(rows, columns) at which the tower should see the image, or None for full resolution."""
        return None

    def without_text(self) -> "Method":
        """What chooses in this method's place for an image that no word counts for: a method that needs no text.

        Itself where it needs none; else visual saliency alone, which is what the text is weighed against in AdaFV. The
        one place where this is decided: an engine that finds no words (`NoWordsError`) asks here, and says so.
        """
        return method_named("saliency") if self.needs_text else self

    @abstractmethod
    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        """Choose `keep` tokens, as returned by `budget`. 0 < keep < N."""


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
    for refused in found.named(name):  # of the same name
        warnings.warn(f"the method {name!r} is that of {found.homes[name]}; {refused}", stacklevel=2)
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


def _fault(method: type[Method]) -> str | None:
    """Why a class cannot be offered by name: its options must be known."""
    if "__dataclass_fields__" not in vars(method):
        return "is no dataclass, so its options are not known: put @dataclass(frozen=True) in front of the class"
    options = {field.name for field in fields(method) if field.init}  # type: ignore[arg-type]
    if hidden := sorted(set(inspect.signature(method).parameters) - options):
        return f"takes {', '.join(hidden)} without fields of that name; every option is a field of the dataclass"
    if not isinstance(getattr(method, "summary", None), str):
        return "has no summary: set `summary`, one line"
    return None
