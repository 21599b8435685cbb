"""Finding the plug-ins of a package: dropping a file in is all that it takes."""

import importlib
import inspect
import pkgutil
from typing import Any


def concrete_subclasses(package: str, base: Any) -> list[Any]:
    """Every class derived from `base` that a module of `package` defines and that is not abstract."""
    found = []
    for module_info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        module = importlib.import_module(module_info.name)
        found += [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, base)
            and not inspect.isabstract(value)
            and value.__module__ == module.__name__
        ]
    return found
