"""A picture that is asked about several times is prepared for the model once.

Every question of a processor's call comes with its picture, so several about one would have it resized and cut up as often;
what comes out depends on the picture alone.
"""

from collections.abc import Hashable
from copy import copy
from typing import Any


def preparing_once(processor: Any) -> Any:
    """A copy of a processor that prepares every picture once, as long as the copy lives.

    A picture is known by its object, so it must not be changed meanwhile; another one of the same pixels is prepared again.
    """
    twin = copy(processor)
    if not isinstance(processor.image_processor, _Once):
        twin.image_processor = _Once(processor.image_processor)
    return twin


class _Once:
    """An image processor that gives the same answer to the same pictures and options, without another look."""

    def __init__(self, image_processor: Any) -> None:
        self._stock = image_processor
        self._made: dict[Hashable, tuple[Any, Any]] = {}

    def __call__(self, images: Any = None, *args: Any, **options: Any) -> Any:
        name = _name(images), repr(args), repr(sorted(options.items()))
        if name not in self._made:
            # The pictures are held as well, or another one might get the place in memory that names one.
            self._made[name] = self._stock(images, *args, **options), images
        # Processors take out of it what they alone need, and may change lists.
        fresh = copy(self._made[name][0])
        for key, value in fresh.items():
            if isinstance(value, list):
                fresh[key] = list(value)
        return fresh

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_stock":
            raise AttributeError(name)
        return getattr(self._stock, name)


def _name(images: Any) -> Hashable:
    return tuple(map(_name, images)) if isinstance(images, (list, tuple)) else id(images)
