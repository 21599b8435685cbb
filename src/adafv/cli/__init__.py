"""The command line: `adafv ask`, `adafv check`, `adafv bench`, `adafv analyze`, `adafv eval`, `adafv page`,
`adafv serve`, `adafv methods`, `adafv families`, `adafv env`.

torch and transformers take seconds to import, so a command imports them once its options are known to be sound.
Answers go to standard output, everything else to standard error; no error ends in a traceback.
"""

import contextlib
import logging
import os
import sys
from typing import Annotated

import typer

from adafv.cli.analyze import analyze
from adafv.cli.ask import ask
from adafv.cli.bench import bench
from adafv.cli.check import check
from adafv.cli.env import env
from adafv.cli.eval import evaluate
from adafv.cli.failures import FAILED, INTERRUPTED, failures_as_messages, put
from adafv.cli.page import page
from adafv.cli.serve import serve
from adafv.printable import one_line

app = typer.Typer(
    name="adafv",
    help="Keep the visual tokens that matter for the question: training-free pruning for vision-language models. "
    "A small model comes along, so that all of it can be tried without a download.",
    # Completion is printed by --show-completion; only --install-completion touches the user's start-up files.
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("ask")(ask)
app.command("check")(check)
app.command("page")(page)
app.command("serve")(serve)
app.command("analyze")(analyze)
app.command("eval")(evaluate)
app.command("env")(env)
app.add_typer(bench, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        from adafv import __version__

        typer.echo(f"adafv {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("methods")
def methods() -> None:
    """List the pruning methods: what each keeps, its paper, what it reads and where it acts, its cost and options.

    The cost is of choosing K of N tokens, beside one pass over them: "N x K" numbers looked at, K steps one after another.
    """
    with failures_as_messages():
        from adafv.methods import found_methods, known_methods
        from adafv.methods.options import described, listed

        width = max(map(len, known_methods()))
        for name, method in known_methods().items():
            put(f"{name:<{width}}  {method.summary}")
            put(f"{'':<{width}}  {described(method)}")
            for option, meaning in listed(method):
                put(f"{'':<{width}}    {option}: {meaning}")
        for broken in found_methods().broken:
            put(f"not loaded: {one_line(str(broken))}")


@app.command("families")
def families() -> None:
    """List the supported model families: what each takes, and what is refused."""
    with failures_as_messages():
        from adafv.engines.transformers.families.catalogue import catalogue

        put(catalogue())


def main() -> None:
    """Entry point of the `adafv` command."""
    # A stream that was closed before the start (`adafv ... <&-`) is None, which libraries do not reckon with. To questions it
    # is an empty one, and what would be said there nobody hears; an answer is no worse for that.
    for name, mode in (("stdin", "r"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    # Where torchao is installed, transformers imports it, and it warns of kernels for other machines.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        # An answer in a script that the terminal cannot show must not end the program.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:  # of what Typer itself writes, such as --help
        sys.exit(FAILED if isinstance(error, BrokenPipeError) else f"error: {one_line(str(error))}")
    finally:
        _close_output()


def _close_output() -> None:
    """Write what is left. What cannot be written is dropped: Python would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
