"""Things that must be done one at a time, in the order in which people came for them."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from adafv.errors import AdaFVError

PATIENCE = 600.0
"""Seconds that one turn may take before those behind it are told so instead of waiting on."""


class BusyError(AdaFVError):
    """Something that must be done one at a time has been going on for too long."""


class OneAtATime:
    """A lock that is fair, and gives up on whoever holds it: a request that hangs must not hang all that come after it.

    Args:
        what: is done one at a time, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._since: float | None = None
        """When the one whose turn it is began."""

    @contextmanager
    def turn(self) -> Iterator["Turn"]:
        """Wait for our turn, and have it.

        Raises:
            BusyError: the one whose turn it is has had it for longer than `PATIENCE`.
        """
        turn = Turn(self)
        turn.take()
        try:
            yield turn
        finally:
            turn.release()

    def _take(self) -> None:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._since is not None or self._waiting[0] is not ticket:
                    # Where nobody has it, the first in the row is waking up.
                    left = PATIENCE if self._since is None else self._since + PATIENCE - time.monotonic()
                    if left <= 0:
                        raise BusyError(
                            f"another {self._what} has been going on for more than {PATIENCE / 60:.0f} minutes; try again "
                            "later, or ask whoever runs this page to start it again"
                        )
                    self._changed.wait(left)
                self._since = time.monotonic()
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _release(self) -> None:
        with self._changed:
            self._since = None
            self._changed.notify_all()


class Turn:
    """The turn of one thread."""

    def __init__(self, of: OneAtATime) -> None:
        self._of = of
        self._held = False

    def take(self) -> None:
        """Wait until it is ours.

        Raises:
            BusyError: as `OneAtATime.turn`.
        """
        self._of._take()
        self._held = True

    def release(self) -> None:
        """Let the next one go on. Does nothing where it is not ours."""
        if self._held:
            self._held = False
            self._of._release()

    def pass_on(self) -> None:
        """Let all those go first who are waiting now; what takes long does so between its steps."""
        self.release()
        self.take()
