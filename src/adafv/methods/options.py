"""The options of a method: the fields of its dataclass, checked and read in one place.

Values come as Python objects (`Pruner("random", keep=64, seed=1)`), as JSON (a server's `parameters`) and as text
(`--option seed=1`, the page); all of them end in `method_of`, so a wrong one is refused alike and before anything runs.
"""

import difflib
import inspect
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from adafv.errors import OptionError
from adafv.methods.base import Method, found_methods, known_methods, method_named, warn_of_namesakes
from adafv.printable import shortened

_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_ENTRY = re.compile(r" {4}(\w+(?:, \w+)*): (.*)")
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class MethodOption:
    """One option of a method."""

    name: str
    kind: type | None
    """str, int, float or bool; None: another type, which Python code alone can give."""
    optional: bool
    """Whether None is a value, too."""
    default: Any
    """`dataclasses.MISSING` where one must be given."""
    meaning: str
    """One line: `metadata={"help": ...}` of the field, or what the class's docstring says under "Args:"; may be empty."""

    @property
    def takes(self) -> str:
        """What its values are, for a message."""
        kind = _KINDS[self.kind] if self.kind else "an object of Python"
        return (
            kind
            + (", or none" if self.optional else "")
            + ("" if self.default in (MISSING, None) else f", such as {self}")
        )

    def __str__(self) -> str:
        """The default as people write it."""
        return _written(self.default)

    def checked(self, value: Any) -> Any:
        """`value` as the type of the field: of NumPy's and JSON's numbers, Python's.

        Raises:
            OptionError: it is of another type, or a number that is none.
        """
        if self.kind is None or (self.optional and value is None):
            return value
        if self.kind in (str, bool):
            good = isinstance(value, self.kind)
        elif isinstance(value, (bool, str, bytes)):
            good = False
        else:
            try:
                value = operator.index(value) if self.kind is int else float(value)
                good = math.isfinite(value)
            except (TypeError, ValueError, OverflowError):
                good = False
        if not good:
            raise OptionError(f"{self.name}={shortened(repr(value), 60)}; give {self.takes}")
        return value

    def read(self, text: str) -> Any:
        """The value that is written.

        Raises:
            OptionError: it is none.
        """
        if self.kind is None:
            raise OptionError(f"{self.name} is {self.takes}, which cannot be written here; it can in Python code")
        if self.optional and text.lower() == "none":
            return None
        try:
            value = _TRUTH[text.lower()] if self.kind is bool else self.kind(text)
        except (KeyError, ValueError):
            raise OptionError(f"{self.name}={shortened(text, 60)}; give {self.takes}") from None
        return self.checked(value)


def options_of(method: type[Method]) -> list[MethodOption]:
    """The options of a method, in the order of its fields."""
    hints, meanings = get_type_hints(method), _meanings(method)
    found = []
    for each in fields(method):  # type: ignore[arg-type]
        if not each.init:
            continue
        hint = hints[each.name]
        # Of `tuple[int, int]` the arguments are no kinds of its own.
        kinds = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
        optional = NoneType in kinds
        others = [kind for kind in kinds if kind is not NoneType]
        kind = others[0] if len(others) == 1 and isinstance(others[0], type) else None
        default = each.default if each.default_factory is MISSING else each.default_factory()
        meaning = each.metadata.get("help", meanings.get(each.name, ""))
        found.append(MethodOption(each.name, kind if kind in _KINDS else None, optional, default, meaning))
    return found


def method_of(name: str, parameters: Mapping[str, Any]) -> Method:
    """The method called `name` with these options.

    Raises:
        OptionError: there is no such method or option, or a value is not of the option's type or range.
    """
    known = _options_by_name(name)
    for given in parameters:
        if given not in known:
            raise _no_such_option(name, given, known)
    values = {given: known[given].checked(value) for given, value in parameters.items()}
    lacking = [option for option in known.values() if option.default is MISSING and option.name not in values]
    if lacking:
        raise OptionError(f"the method {name!r} needs the option {lacking[0].name}; give {lacking[0].takes}")
    warn_of_namesakes(name)
    method: Any = known_methods()[name]
    made: Method = method(**values)
    return made


def parameters_from_options(name: str, written: Sequence[str]) -> dict[str, Any]:
    """The values of `["objective=split", ...]`, as the types of the method's fields.

    Raises:
        OptionError: one is not of the form name=value, is given twice, or does not belong to the method.
    """
    known = _options_by_name(name)
    values: dict[str, Any] = {}
    for option in written:
        given, equals, text = (part.strip() for part in option.partition("="))
        if not equals or not given:
            example = next((f"{each.name}={each}" for each in known.values() if each.default is not MISSING), "seed=1")
            raise OptionError(
                f"the option {shortened(repr(option), 60)} is not of the form name=value; such as {example}"
            )
        if given not in known:
            raise _no_such_option(name, given, known)
        if given in values:
            raise OptionError(f"the option {given} is given twice; once is enough")
        values[given] = known[given].read(text)
    return values


def method_from_options(name: str, written: Sequence[str]) -> Method:
    """The method called `name` with options as people write them, `["objective=split", ...]`.

    Raises:
        OptionError: there is no such method, option or value; the message says which there are.
    """
    return method_of(name, parameters_from_options(name, written))


def method_from_text(text: str) -> tuple[Method, str]:
    """A method with its options in one word, "saliency" or "adafv:objective=split"; and the word, see `in_one_word`.

    Raises:
        OptionError: as `method_from_options`.
    """
    name, *written = text.split(":")
    name = name.strip()
    parameters = parameters_from_options(name, written)
    return method_of(name, parameters), in_one_word(name, parameters)


def in_one_word(name: str, parameters: Mapping[str, Any]) -> str:
    """How a method is told from others: "saliency", or "adafv:objective=split"."""
    return ":".join([name, *(f"{given}={_written(value)}" for given, value in parameters.items())])


def listed(method: type[Method]) -> list[tuple[str, str]]:
    """(name=default, meaning) of every option, for a catalogue."""
    return [
        (option.name if option.default is MISSING else f"{option.name}={option}", option.meaning or option.takes)
        for option in options_of(method)
    ]


def described(method: type[Method]) -> str:
    """Its paper, what it reads, its stages and cost in one line, for a catalogue."""
    # Of some methods these depend on the options, and are properties.
    reads = sorted(map(str, method.needs)) if isinstance(method.needs, frozenset) else ["depends on the options"]
    stages = sorted(method.stages) if isinstance(method.stages, frozenset) else ["depends on the options"]
    facts = {"": method.paper, "reads": ", ".join(reads), "stage": ", ".join(stages), "cost": method.cost}
    return "; ".join(f"{heading} {fact}".strip() for heading, fact in facts.items() if fact)


def _options_by_name(name: Any) -> dict[str, MethodOption]:
    methods = known_methods()
    if not isinstance(name, str) or name not in methods:
        if isinstance(name, str) and found_methods().named(name):
            method_named(name)  # says why it could not be loaded
        close = difflib.get_close_matches(name, methods, n=1) if isinstance(name, str) else []
        hint = f"; did you mean {close[0]}?" if close else ""
        raise OptionError(f"there is no method {shortened(repr(name), 60)}; known are: {', '.join(methods)}{hint}")
    return {option.name: option for option in options_of(methods[name])}


def _no_such_option(name: str, given: Any, known: Mapping[str, MethodOption]) -> OptionError:
    there = ", ".join(f"{option.name} ({option.takes})" for option in known.values()) or "none"
    return OptionError(f"the method {name!r} has no option {shortened(repr(given), 60)}; it has {there}")


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def _meanings(method: type[Method]) -> dict[str, str]:
    """What the docstring says under "Args:", one line each."""
    found: dict[str, str] = {}
    entries = False
    latest: tuple[str, ...] = ()
    for line in (inspect.getdoc(method) or "").splitlines():
        if line == "Args:":
            entries = True
        elif entries and line and not line.startswith(" "):
            break
        elif entries and (entry := _ENTRY.fullmatch(line)):
            latest = tuple(entry[1].split(", "))
            found.update(dict.fromkeys(latest, entry[2]))
        elif entries and line.strip():
            found.update({name: f"{found[name]} {line.strip()}" for name in latest})
    return found
