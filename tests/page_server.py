"""The real `adafv page` as a process of its own, and a real browser, for the tests of the page."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forking
import pytest
from cli_checkpoint import save_llava
from processors import photo

QUESTION = "What is in the picture?"
SAMPLE_QUESTION = "How many colours are there?"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def needs(*modules: str, browser: bool = False) -> pytest.MarkDecorator:
    """Skip what cannot run here."""
    lacking = [name for name in modules if not importlib.util.find_spec(name)]
    lacking += ["Chromium"] if browser and not CHROMIUM else []
    return pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")


@dataclass(frozen=True)
class Server:
    url: str
    checkpoint: Path
    samples: Path
    log: Path
    folder: Path
    """Holds all of these, and the folder of uploads."""
    process: Any

    @property
    def uploads(self) -> Path:
        (found,) = self.folder.glob("adafv-page-*")
        return found


def free_port(host: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as probe:
        return int(probe.getsockname()[1])


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@contextmanager
def serving(
    folder: Path,
    *options: str,
    url: str = "http://127.0.0.1:{port}",
    given: str = "",
    start: Callable[..., Any] = forking.started,
    **environment: str,
) -> Iterator[Server]:
    """`adafv page` on a free port. Its way to the outside world is a proxy that does not exist.

    Args:
        folder: an empty one.
        url: what the command must print.
        given: what stands on its standard input.
        start: `by_python` for a process that imports everything itself.
        environment: variables.
    """
    checkpoint, samples = save_llava(folder / "model"), folder / "samples"
    samples.mkdir()
    for number in (1, 2):
        photo(number).save(samples / f"sample{number}.png")
    (samples / "samples.json").write_text(json.dumps([{"picture": "sample2.png", "question": SAMPLE_QUESTION}]))
    url = url.format(port=(port := free_port()))
    command = ["-m", "adafv", "page", "--model", str(checkpoint), "--device", "cpu"]
    command += ["--port", str(port), "--examples", str(samples), *options]
    with (folder / "log").open("w+") as log:
        variables = {**_surroundings(folder), **environment}
        process = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=variables)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(given)
            process.stdin.close()
            assert process.stdout.readline().strip() == url, (folder / "log").read_text()
            yield Server(url, checkpoint, samples, folder / "log", folder, process)
        finally:
            process.terminate()
            code = process.wait(60)
    assert code == 0
    assert not list(folder.glob("adafv-page-*")), "uploads were left behind"


def by_python(arguments: list[str], **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, *arguments], text=True, **options)


def _surroundings(folder: Path) -> Mapping[str, str]:
    # One thread, as in these tests: sums in another order could come to another answer.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment.pop("no_proxy", None)
    environment.pop("NO_PROXY", None)
    return environment


@contextmanager
def started_browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    flags = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
    flags += ("disable-component-update", "disable-sync")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in flags])
        yield started
        started.close()
