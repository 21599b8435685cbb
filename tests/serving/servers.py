"""The real server, started by `adafv serve`, and requests to it."""

import base64
import ctypes
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

SMALL = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "32")
"""Options of vLLM's server for the bundled model on a small machine."""

OF_ENGINES_IN_PROCESS = (
    "PYTHONPATH",
    "TORCHDYNAMO_DISABLE",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
)
"""Variables that conftest.py sets. A server has none of them, as on a user's machine: `adafv serve` sees to what it needs."""

SECONDS_TO_START = 240.0
SECONDS_TO_STOP = 30.0
MODEL = "bundled"


@dataclass
class Server:
    """A server that runs, and how to talk to it."""

    process: subprocess.Popen[bytes]
    url: str
    log_file: Path
    temporary: Path
    """Its folder for temporary files, of its own."""
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        # Connections are not kept: after an error 500 a server closes them, and the next request would pay for it.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=self.url, timeout=60.0, limits=limits)

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self.log_file.read_text(errors="replace")

    def post(self, body: dict[str, Any]) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=body)

    def ask(self, *content: Any, **more: Any) -> tuple[str, int]:
        """(answer, tokens of the prompt) to one turn of the user."""
        response = self.post(body(*content, **more))
        assert response.status_code == 200, response.text
        return answer(response.json())

    def metrics(self) -> dict[str, float]:
        """/metrics, summed over labels."""
        found: dict[str, float] = defaultdict(float)
        for line in self.client.get("/metrics").text.splitlines():
            if line and not line.startswith("#"):
                found[line.split("{")[0].split(" ")[0]] += float(line.rsplit(" ", 1)[1])
        return found

    def wait_for(self, expected: dict[str, float], seconds: float = 10.0) -> None:
        """Until /metrics says so: vLLM's front counts a request after it has answered it."""
        deadline = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            found = {name: metrics[name] for name in expected}
            if found == expected or time.monotonic() > deadline:
                assert found == expected
                return
            time.sleep(0.1)

    def stop(self) -> int:
        """As a supervisor would; exit code."""
        self.process.terminate()
        return self.process.wait(SECONDS_TO_STOP)


@contextmanager
def running(folder: Path, command: Sequence[str], **environment: str) -> Iterator[Server]:
    """A server until the end of the block, whatever happens in it.

    Args:
        folder: for its log and its temporary files.
        command: all but the address, which is added: --host and --port.
    """
    port = free_port()
    temporary, log_file = folder / "tmp", folder / "server.log"
    temporary.mkdir(parents=True)
    variables = environment_of_a_user()
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=variables | {"TMPDIR": str(temporary)} | environment,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log_file, temporary)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        with suppress(subprocess.TimeoutExpired):
            server.stop()
        _kill_group(process.pid)
        process.wait()
        server.client.close()


def environment_of_a_user() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in OF_ENGINES_IN_PROCESS}


def served(*options: str, further: Sequence[str] = ()) -> list[str]:
    """`adafv serve` for the bundled model, up to where the address follows."""
    paper = () if "--method" in options else ("--method", "adafv")  # what the tests compare with
    return [sys.executable, "-m", "adafv", "serve", MODEL, *paper, *options, "--", *SMALL, *further]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(picture: Image.Image | bytes, kind: str = "image/png") -> dict[str, Any]:
    """A picture, or the bytes of what claims to be one, as a data URL."""
    if not isinstance(picture, bytes):
        written = io.BytesIO()
        picture.save(written, "PNG")
        picture = written.getvalue()
    return image_at(f"data:{kind};base64,{base64.b64encode(picture).decode()}")


def image_at(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def budget(keep: Any) -> dict[str, Any]:
    """The part of a request that asks for a budget of its own."""
    return {"mm_processor_kwargs": {"adafv": {"keep": keep}}}


def body(*content: Any, **more: Any) -> dict[str, Any]:
    """A greedy request of one turn; strings are text, pictures are pictures."""
    parts = [
        text(part) if isinstance(part, str) else image(part) if isinstance(part, Image.Image) else part
        for part in content
    ]
    messages = [{"role": "user", "content": parts}]
    return {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0.0} | more


def answer(completion: Any) -> tuple[str, int]:
    """(what was answered, tokens of the prompt)."""
    return completion["choices"][0]["message"]["content"].strip(), completion["usage"]["prompt_tokens"]


def _wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise AssertionError(f"the server ended with code {server.process.returncode}:\n{server.log[-4000:]}")
        with suppress(httpx.TransportError):
            if server.client.get("/health").status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"the server did not start in {SECONDS_TO_START} s:\n{server.log[-4000:]}")


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _die_with_parent() -> None:
    """Linux ends the server when the tests are ended without a chance to do it."""
    parent_death_signal = 1
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
