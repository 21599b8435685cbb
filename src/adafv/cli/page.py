"""`adafv page`: ask in the browser."""

import errno
import getpass
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from adafv.asking.failures import UsageError
from adafv.asking.models import about, checked_model
from adafv.cli.failures import failures_as_messages
from adafv.cli.options import DTYPES, DeviceOption, DtypeOption, ModelOption, one_of
from adafv.errors import AdaFVError
from adafv.extras import install_command, outdated

PASSWORD = "ADAFV_PAGE_PASSWORD"
"""Environment variable that may hold the password."""
_SHORTEST = 8
"""Letters of a password."""
_GRADIO_PROBES = "127.0.0.1"
"""Where Gradio finds out whether a port is free, whatever the page is to listen on."""


class PageError(AdaFVError):
    """The page cannot be served."""


def page(
    model: ModelOption = "",
    host: Annotated[
        str, typer.Option(help="Name or address (IPv4 or IPv6) to listen on; the default serves this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    password: Annotated[
        bool,
        typer.Option(
            "--password",
            help=f"Let in only who gives a password: typed now, or the first line of standard input. {PASSWORD} in the "
            "environment does the same without the question.",
        ),
    ] = False,
    examples: Annotated[
        Path | None, typer.Option(help="Folder of pictures to choose from. Default: those that come with adafv.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An option of the first method when the page opens, such as blocks=0; may be given again.",
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    r"""Open a page on which to ask questions about images, unpruned and pruned side by side, and to check your own.

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
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        _serve(model, bare, port, password, examples, option or [], dtype, device)


def _serve(
    model: str,
    host: str,
    port: int,
    ask_password: bool,
    examples: Path | None,
    options: list[str],
    dtype: str,
    device: str | None,
) -> None:
    from adafv.page.samples import bundled_samples, samples_in

    samples = bundled_samples() if examples is None else samples_in(examples)
    # All of this before the model is loaded, which may take minutes.
    local = _check_address(host, port)
    password = _password(ask_password)
    if not local:
        typer.echo(f"warning: {_open_to_others(host, password)}", err=True)
    from adafv.asking.session import Session, check_device
    from adafv.methods.options import method_from_options
    from adafv.page.answers import METHODS, Answers
    from adafv.page.checks import Checks
    from adafv.page.uploads import Uploads

    method_from_options(METHODS[0], options)
    model = checked_model(model)
    typer.echo(f"loading {model}", err=True)
    session = Session.load(model, dtype, check_device(device))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the uploads are deleted then, too
    with tempfile.TemporaryDirectory(prefix="adafv-page-") as temporary:
        folder = os.path.realpath(temporary)  # Gradio resolves links, and uploads are told by where they lie
        # Gradio reads these when it is imported.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder, GRADIO_SERVER_NAME=_GRADIO_PROBES)
        from adafv.page.app import build, serve

        uploads = Uploads(Path(folder))
        name = _shown_name(model)
        answers = Answers(session, uploads)
        checks = Checks(session, name, answers.turns, uploads, Path(folder))
        blocks = build(answers, checks, about(name, session.processor.tokenizer), samples, ":".join(options))
        try:
            serve(blocks, uploads, host, port, password, lambda: typer.echo(_url(host, port)))
        except OSError as error:
            raise _cannot_listen(host, port, error) from error
        finally:
            checks.close()


def _password(ask: bool) -> str:
    """The password, empty where none is wanted. Never an argument, which `ps` shows to every user of the machine."""
    password = os.environ.pop(PASSWORD, "")
    if ask:
        try:
            password = getpass.getpass("Password: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
        except EOFError:
            password = ""
    elif not password:
        return ""
    if len(password) < _SHORTEST:
        raise UsageError(
            f"the password has {len(password)} letters; give one of at least {_SHORTEST}, since nothing limits guesses"
        )
    return password


def _open_to_others(host: str, password: str) -> str:
    if password:
        return (
            f"the page listens on {host}, not on this machine alone; the password and all else travel unencrypted, so "
            "put a server that speaks https in front of it"
        )
    return (
        f"the page listens on {host}, not on this machine alone: anybody who reaches it can use it and upload pictures to "
        "this machine; --password lets in only who knows one"
    )


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _shown_name(model: str) -> str:
    """The name of a folder without the way to it, which is nobody's business."""
    return Path(os.path.abspath(model)).name if Path(model).exists() else model


def _check_address(host: str, port: int) -> bool:
    """Whether `host` is this machine alone.

    Raises:
        PageError: one cannot listen there.
    """
    if not host.strip():
        raise UsageError("--host is empty; give a name or an address, such as 127.0.0.1 or ::1")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from error
    for family, _, _, _, address in addresses:
        _probe(host, port, family, address)
    # Whatever it is to listen on, Gradio wants the port to be free there, too.
    _probe(_GRADIO_PROBES, port, socket.AF_INET, (_GRADIO_PROBES, port))
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in addresses)


def _probe(host: str, port: int, family: int, address: Any) -> None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: Any) -> PageError:
    if getattr(error, "errno", None) == errno.EADDRINUSE or "empty port" in str(error):
        return PageError(f"port {port} is taken on {host}; give another one with --port, or end what listens there")
    reason = getattr(error, "strerror", None) or error
    return PageError(f"cannot listen on {host}, port {port} ({reason}); check --host and --port")
