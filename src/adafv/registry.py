"""Finding methods and families: those of a package of adafv, and those that other installed distributions bring.

A module dropped into a package is found by itself. Another distribution names its classes in its own metadata:

    [project.entry-points."adafv.methods"]
    outliers = "my_package.outliers:Outliers"

Each module is imported on its own. One that fails takes down its own classes and no other; why it failed is kept
(`Broken`), and said wherever somebody looks for what is missing.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from adafv.printable import one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Broken:
    """Something that should have brought classes, and did not."""

    name: str
    """Of the module within its package, or of the entry point."""
    home: str
    """The module, or "module:Class (distribution release)"."""
    why: str
    """In one line, without paths of this machine."""

    def __str__(self) -> str:
        return f"{self.home}: {self.why}"


@dataclass(frozen=True)
class Found(Generic[T]):
    """What there is of one kind."""

    classes: dict[str, type[T]]
    """By name, in the order of the names."""
    homes: dict[str, str]
    """By name, where the class comes from."""
    broken: tuple[Broken, ...] = ()

    def lacking(self) -> str:
        """What is broken and why, to be put behind an error message; empty where nothing is."""
        return f"; not loaded: {'; '.join(map(str, self.broken))}" if self.broken else ""

    def named(self, name: str) -> tuple[Broken, ...]:
        """The broken ones that go by this name."""
        return tuple(broken for broken in self.broken if broken.name == name)


def find(
    package: str, group: str, base: type[T], fault: Callable[[type[T]], str | None], called_by_entry: bool = False
) -> Found[T]:
    """Every class derived from `base` in a package and in the entry points of a group.

    Of the package those that are not abstract and state a `name` of their own; others are bases. An entry point must lead
    to such a class. Where two have one name, that of the package is taken; of two from elsewhere neither is.

    Args:
        fault: what is wrong with a class, or None.
        called_by_entry: whether an entry point must have the name of its class.
    """
    broken: list[Broken] = []
    own: list[tuple[str, type[T]]] = []
    for module_info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        home, name = module_info.name, module_info.name.rpartition(".")[2]
        try:
            module = importlib.import_module(home)
        except (Exception, SystemExit) as error:
            broken.append(Broken(name, home, cause(error)))
            continue
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == home and issubclass(value, base):
                if inspect.isabstract(value) or "name" not in vars(value):
                    continue
                wrong = fault(value)
                if wrong is None:
                    own.append((f"{home}:{value.__qualname__}", value))
                else:
                    broken.append(Broken(name, f"{home}:{value.__qualname__}", wrong))
    guests: list[tuple[str, type[T]]] = []
    for entry in sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value)):
        home = _home(entry)
        try:
            value = entry.load()
            wrong = _not_derived(value, base) or fault(value)
        except (Exception, SystemExit) as error:
            broken.append(Broken(entry.name, home, cause(error)))
            continue
        if wrong is None and called_by_entry and value.name != entry.name:
            wrong = (
                f"the entry point is called {entry.name!r}, but the class is named {value.name!r}; give both one name"
            )
        if wrong is None:
            guests.append((home, value))
        else:
            broken.append(Broken(entry.name, home, wrong))
    classes, homes = _without_clashes(own, guests, broken)
    names = sorted(classes)
    return Found({name: classes[name] for name in names}, {name: homes[name] for name in names}, tuple(broken))


def _without_clashes(
    own: list[tuple[str, type[T]]], guests: list[tuple[str, type[T]]], broken: list[Broken]
) -> tuple[dict[str, type[T]], dict[str, str]]:
    """The classes by name, and their homes. Those whose name is taken are added to `broken`."""
    classes: dict[str, type[T]] = {}
    homes: dict[str, str] = {}
    for candidates in (own, guests):
        by_name: dict[str, dict[str, type[T]]] = {}
        for home, value in candidates:
            by_name.setdefault(value.name, {})[home] = value  # type: ignore[attr-defined]
        for name, there in by_name.items():
            others = list(there) + ([homes[name]] if name in homes else [])
            for home, value in there.items():
                if len(others) == 1:
                    classes[name], homes[name] = value, home
                else:
                    taken = " and ".join(other for other in others if other != home)
                    broken.append(Broken(name, home, f"the name {name!r} is also that of {taken}; rename one of them"))
    return classes, homes


def _home(entry: EntryPoint) -> str:
    where = f" ({entry.dist.name} {entry.dist.version})" if entry.dist else ""
    return f"{entry.value}{where}"


def _not_derived(value: Any, base: type[Any]) -> str | None:
    wanted = f"{base.__module__}.{base.__qualname__}"
    if not (inspect.isclass(value) and issubclass(value, base)):
        return f"is no class derived from {wanted}"
    if inspect.isabstract(value):
        return f"is abstract: it lacks {', '.join(sorted(getattr(value, '__abstractmethods__', ())))}"
    name = getattr(value, "name", None)
    if not (isinstance(name, str) and name):
        return "has no name: set `name`, a string"
    return None


def cause(error: BaseException) -> str:
    """What an exception says, in one line, without paths: reports of bugs quote it."""
    kind = type(error).__name__
    text = re.sub(r" \((?:/|\\|[A-Za-z]:)[^()]*\)", "", " ".join(str(error).split()))
    return kind if not text or "/" in text or "\\" in text else f"{kind}: {one_line(text)}"
