"""Stages of a call, for whoever measures one: `adafv bench speed`.

A stage says where it begins and ends; a listener of this thread hears of it. Without one, a stage costs a look at a
variable. So what is measured is the code that runs for everybody, not a copy of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Listener(Protocol):
    """Hears of stages; they nest."""

    def enter(self, stage: str) -> None: ...
    def leave(self) -> None: ...


_LISTENER: ContextVar[Listener | None] = ContextVar("adafv_stages", default=None)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """The block is this stage of a call."""
    listener = _LISTENER.get()
    if listener is None:
        yield
        return
    listener.enter(name)
    try:
        yield
    finally:
        listener.leave()


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Within, stages that this thread enters are told to `listener`."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)
