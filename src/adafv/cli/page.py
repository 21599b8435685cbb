"""`adafv page`: ask in the browser."""

import errno
import importlib.util
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from adafv.asking.models import about, checked_model
from adafv.cli.ask import DTYPES, one_of
from adafv.cli.failures import failures_as_messages
from adafv.cli.options import ModelOption
from adafv.errors import AdaFVError
from adafv.extras import install_command, outdated


class PageError(AdaFVError):
    """The page cannot be served."""


def page(
    model: ModelOption = "",
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default serves this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    examples: Annotated[
        Path | None, typer.Option(help="Folder of pictures to choose from. Default: those that come with adafv.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Such as cpu, cuda, cuda:1. Default: cuda where there is one.")
    ] = None,
) -> None:
    r"""Open a page on which to ask questions about images, unpruned and pruned side by side.

    Needs Gradio: pip install 'gradio>=6.31'. Without --model, a small model answers that comes with adafv and knows
    only simple drawings.

        adafv page --model llava-hf/llava-1.5-7b-hf
    """
    with failures_as_messages():
        if importlib.util.find_spec("gradio") is None:
            raise PageError(f"the page needs Gradio, which is not installed; run: {install_command('page')}")
        if old := outdated("page"):
            raise PageError(f"{old} is installed, but the page needs another release; run: {install_command('page')}")
        one_of("--dtype", dtype, DTYPES)
        _serve(checked_model(model), host, port, examples, dtype, device)


def _serve(model: str, host: str, port: int, examples: Path | None, dtype: str, device: str | None) -> None:
    from adafv.page.samples import bundled_samples, samples_in

    samples = bundled_samples() if examples is None else samples_in(examples)
    _check_address(host, port)  # before the model is loaded, which may take minutes
    from adafv.asking.session import Session, check_device
    from adafv.page.answers import Answers

    typer.echo(f"loading {model}", err=True)
    session = Session.load(model, dtype, check_device(device))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the uploads are deleted then, too
    with tempfile.TemporaryDirectory(prefix="adafv-page-") as uploads:
        # Gradio reads both when it is imported.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=uploads)
        from adafv.page.app import build, serve

        blocks = build(Answers(session), about(_shown_name(model), session.processor.tokenizer), samples)
        try:
            serve(blocks, host, port, lambda: typer.echo(f"http://{host}:{port}"))
        except OSError as error:
            raise _cannot_listen(host, port, error) from error


def _shown_name(model: str) -> str:
    """The name of a folder without the way to it, which is nobody's business."""
    return Path(os.path.abspath(model)).name if Path(model).exists() else model


def _check_address(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: Any) -> PageError:
    if error.errno == errno.EADDRINUSE or "empty port" in str(error):
        return PageError(f"port {port} is taken; give another one with --port, or end what listens there")
    return PageError(f"cannot listen on {host}, port {port} ({error.strerror or error}); check --host and --port")
