"""How the command line ends when something goes wrong: one line on standard error and an exit code, no traceback."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from adafv.asking.failures import UsageError, out_of_memory
from adafv.printable import one_line, shortened

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
REPORT = "adafv env"
"""The command whose output belongs into a bug report."""


class OutputError(Exception):
    """Standard output cannot be written; the cause says why."""


def say(message: str) -> None:
    """One line on standard error, printable whatever is in it: names, addresses, what a server or a checkpoint says."""
    typer.echo(one_line(message), err=True)


def put(text: str) -> None:
    """A result on standard output.

    Raises:
        OutputError: the disk is full, or nobody reads, or it is closed.
    """
    try:
        if sys.stdout is None:  # closed before the start, as in `adafv ... >&-`
            raise ValueError("it is closed")
        typer.echo(text)
    except (OSError, ValueError) as error:
        raise OutputError from error


@contextmanager
def failures_as_messages() -> Iterator[None]:
    """Turn every exception into a message and an exit code.

    2 for a wrong option, 130 for an interrupt, 1 for all else. ADAFV_TRACEBACK=1 lets exceptions through instead.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except Exception as error:
        if os.environ.get("ADAFV_TRACEBACK"):
            raise
        _end(*_message(error))


@contextmanager
def warnings_as_messages() -> Iterator[None]:
    """Turn Python's warnings into lines on standard error, each one once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(str(each.message) for each in caught):
        say(f"warning: {text}")


def _message(error: Exception) -> tuple[str, int]:
    if isinstance(error, OutputError):
        reason = error.__cause__
        if isinstance(reason, BrokenPipeError):  # whoever read our output has had enough
            return "", FAILED
        return f"standard output cannot be written ({getattr(reason, 'strerror', None) or reason})", FAILED
    if isinstance(error, BrokenPipeError):
        return "", FAILED
    if isinstance(error, UsageError):
        return str(error), MISUSED
    from adafv.errors import AdaFVError, BudgetError, OptionError

    if isinstance(error, AdaFVError):
        return str(error), MISUSED if isinstance(error, (BudgetError, OptionError)) else FAILED
    if out_of_memory(error):
        return "out of memory; try --dtype bfloat16, a smaller --keep, --device cpu, or a smaller model", FAILED
    text = shortened(" ".join(str(error).split()), 500)
    how = f"ADAFV_TRACEBACK=1 shows where it came from, and `{REPORT}` what a report of it needs"
    return f"{type(error).__name__}: {text} (not foreseen by adafv; {how})", FAILED


def _end(message: str, code: int) -> None:
    if message:
        say(f"error: {message}")
    raise typer.Exit(code)
