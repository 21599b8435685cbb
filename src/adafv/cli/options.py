"""Options that several commands have, and how they are read."""

import difflib
from typing import Annotated

import typer

from adafv import defaults
from adafv.asking.failures import UsageError
from adafv.printable import shortened

ModelOption = Annotated[
    str,
    typer.Option(
        envvar="ADAFV_MODEL",
        help="Folder of a checkpoint, its id on the Hugging Face Hub, or bundled, bundled-next, bundled-details or "
        "bundled-details-next. Default: bundled, a small model that comes with adafv.",
        show_default=False,
    ),
]

METHOD = "Method"
"""Heading of the options that say how to prune."""
RUN = "How to run it"

MethodOption = Annotated[str, typer.Option(help="How tokens are chosen; see `adafv methods`.", rich_help_panel=METHOD)]
DefaultMethodOption = Annotated[
    str | None,
    typer.Option(
        help=f"How tokens are chosen; see `adafv methods`. Default: {defaults.METHOD}; {defaults.PAPER} where --objective is "
        "given.",
        rich_help_panel=METHOD,
    ),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="An option of the method, such as objective=split; may be given again. `adafv methods` lists them.",
        rich_help_panel=METHOD,
    ),
]
ObjectiveOption = Annotated[
    str | None,
    typer.Option(help="Short for --option objective=...: joint, split or frank-wolfe.", rich_help_panel=METHOD),
]
TextOption = Annotated[
    str | None,
    typer.Option(help="Which text counts: question, turn or after. Default: question.", rich_help_panel=METHOD),
]

DTYPES = ("auto", "float32", "bfloat16", "float16")
DtypeOption = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.", rich_help_panel=RUN)]
DeviceOption = Annotated[
    str | None, typer.Option(help="Such as cpu, cuda, cuda:1. Default: cuda where there is one.", rich_help_panel=RUN)
]

BatchOption = Annotated[
    int,
    typer.Option("--batch", "--batch-size", min=1, help="Questions that are asked together.", rich_help_panel=RUN),
]


def one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    """`value`, if it is known.

    Raises:
        UsageError: it is not.
    """
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"{option} {shortened(value)!r} does not exist; known are: {', '.join(known)}{hint}")
    return value


def with_shorthands(written: list[str] | None, **shorthands: str | None) -> list[str]:
    """What `--option` says, with the options that have a name of their own."""
    return [*(written or []), *(f"{name}={value}" for name, value in shorthands.items() if value is not None)]


def parts_of(text: str) -> list[str]:
    """What stands between commas, less what is empty."""
    return [part for each in text.split(",") if (part := each.strip())]
