"""Time per stage of a call: marks on the device's own clock where stages begin and end.

On CUDA a mark is an event in the queue, so nothing waits for it and the stages of a call add up to the call. A stage has
the time from its first kernel's turn to its last one's, time in which the device waits for the host included.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch

from adafv.core.stages import heard_by, stage

REST = "rest"
"""What is in no stage: wrapping, the record."""
LAYERS = "layers"
"""The decoder layers of a language model that was built with fewer layers than it has, so that they can be scaled."""
NAMES = {"model": "prefill"}
"""What the engine calls a stage, where it is called otherwise here."""


class Stages:
    """A listener that knows which stage is on. Of stages within stages, the innermost counts."""

    def __init__(self) -> None:
        self._open: list[str] = []

    @property
    def current(self) -> str:
        return self._open[-1] if self._open else REST

    def enter(self, stage: str) -> None:
        self.border()
        self._open.append(NAMES.get(stage, stage))

    def leave(self) -> None:
        self.border()
        self._open.pop()

    def border(self) -> None:
        """The current stage ends here, or is interrupted."""


class StageClock(Stages):
    """Seconds per stage on a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._cuda = device.type == "cuda"
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def border(self) -> None:
        self._marks.append((self.current, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def marks(self) -> int:
        """Borders so far."""
        return len(self._marks)

    def seconds(self, first: int = 0, last: int | None = None) -> dict[str, float]:
        """Per stage, between two borders; waits for the device. In all, the time between them."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        marks = self._marks[first : None if last is None else last + 1]
        found: dict[str, float] = {}
        for (_, before), (name, after) in pairwise(marks):
            lasted = before.elapsed_time(after) / 1e3 if self._cuda else after - before
            found[name] = found.get(name, 0.0) + lasted
        return found


@contextmanager
def listening(listener: Stages) -> Iterator[None]:
    """Within, `listener` hears of stages; the block is one stage, `REST`."""
    with heard_by(listener), stage(REST):
        yield


@contextmanager
def staged(modules: dict[str, Any]) -> Iterator[None]:
    """Within, calls of these modules are stages of these names; a list of modules is one stage each."""
    with ExitStack() as hooks:
        for name, module in modules.items():
            for part in module if isinstance(module, list) else [module]:
                entered: list[Any] = []

                def enter(*_: Any, name: str = name, entered: list[Any] = entered) -> None:
                    within = stage(name)
                    within.__enter__()
                    entered.append(within)

                def leave(*_: Any, entered: list[Any] = entered) -> None:
                    entered.pop().__exit__(None, None, None)

                hooks.callback(part.register_forward_pre_hook(enter).remove)
                hooks.callback(part.register_forward_hook(leave, always_call=True).remove)
        yield
