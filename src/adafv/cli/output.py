"""Files and progress of commands that run for long."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import typer

from adafv.asking.failures import UsageError
from adafv.cli.failures import say
from adafv.printable import shortened


def writable_folder(option: str, path: Path) -> Path:
    """The folder, made if needed, once it is known that it can be written to.

    Raises:
        UsageError: it cannot.
    """
    name = f"{option} {shortened(path)}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise UsageError(f"{name} may not be written; choose another place")
    except FileExistsError as error:
        raise UsageError(f"{name} is a file; name a folder") from error
    except NotADirectoryError as error:
        raise UsageError(f"{name} lies in a file; name a folder") from error
    except (OSError, ValueError) as error:
        why = shortened(getattr(error, "strerror", None) or error)
        raise UsageError(f"{name} cannot be made ({why}); choose another place") from error
    return path


def write_whole(path: Path, text: str, mend: str = "choose another place") -> None:
    """Write a file whole or not at all; half letters, which a question may hold, as \\ud83d.

    Args:
        mend: what to do where it cannot be written.

    Raises:
        UsageError: it cannot be written.
    """
    beside = path.with_name(f".adafv-{os.getpid()}-{path.name}.tmp")
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        why = shortened(error.strerror)
        raise UsageError(f"{shortened(path)} cannot be written ({why}); {mend}") from error


def model_label(model: str) -> str:
    """A model in a report: a folder by its own name, as others have it elsewhere."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def counted(name: str, what: str) -> Callable[[int, int, int], None]:
    """Tells of progress on standard error: on a terminal in one line that is written over, else every ten seconds.

    Returns:
        To be called with (done, of how many, done in this run).
    """
    start = last = time.monotonic()
    terminal = sys.stderr.isatty()

    def told(done: int, total: int, fresh: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (1 if terminal else 10) and (done < total or not fresh):
            return
        last = now
        left = f", {time_left((now - start) / fresh * (total - done))} left" if fresh and done < total else ""
        line = f"{shortened(name)}: {done:,} of {total:,} {what}{left}"
        if terminal:
            typer.echo(f"\r{line:<78}", err=True, nl=done == total)
        else:
            say(line)

    return told


def time_left(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
