"""Processes of adafv that are forked from one which has imported torch and transformers already.

Importing them takes eight seconds of a core, and most tests of processes ask what a command does, not how long its imports
take. The forked process is one of its own in all else: arguments, variables, folder, standard streams, signals, exit code.
Not for what is read while something is imported (variables of the Hub), nor for what must not be imported: there, and once
per command, tests start Python itself.

All tests share one such parent, those of several processes of pytest-xdist too. It ends when they do.
"""

import array
import atexit
import gc
import importlib
import importlib.util
import json
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

SOURCE = Path(__file__).parent.parent / "src"
ADDRESS = "ADAFV_FORKING"
"""Variable with the folder of the parent's socket, which the processes of pytest-xdist share."""
PRELOADED = (
    "adafv.cli",
    "adafv.asking.session",
    "adafv.environment",
    "adafv.picture",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
)
FOR_WORKERS = ("fixtures",)
"""Where workers of pytest-xdist are forked, too: the table of models with all stock classes."""
FOR_THE_PAGE = ("gradio", "gradio.routes", "adafv.page")
"""Where they are installed."""


def started(arguments: Sequence[object], **options: Any) -> "Process":
    """As `subprocess.Popen([sys.executable, *arguments], **options)`, with text; a subset of it.

    Args:
        arguments: "-m", a module and its arguments, or a script and its arguments.
        options: env, cwd; stdin, stdout and stderr: a file, subprocess.PIPE or subprocess.DEVNULL.
    """
    return Process([str(argument) for argument in arguments], **options)


def ran(
    arguments: Sequence[object], *, timeout: float = 120, stdin: Any = subprocess.DEVNULL, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True, ...)`."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        shown = options.pop("stdout", out)
        process = started(arguments, stdin=stdin, stdout=shown, stderr=err, **options)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(list(arguments), code, out.read() if shown is out else "", err.read())


def in_a_copy(work: Callable[[], Any], forget: str = "adafv") -> Any:
    """What `work` returns (as JSON) in a copy of this process that has torch, transformers and the tests' own modules, but
    nothing of `forget`: what is imported there is imported anew. For what five seconds of imports would be waited for.
    """
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        with open(reading) as said:
            found = said.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 0, f"the copy ended with {code}: {found}"
        return json.loads(found)
    code = 1
    try:
        os.close(reading)
        _own_threads()
        with open(writing, "w") as saying:
            try:
                for name in [name for name in sys.modules if name == forget or name.startswith(f"{forget}.")]:
                    del sys.modules[name]
                json.dump(work(), saying)
                code = 0
            except BaseException:
                traceback.print_exc(file=saying)
    finally:
        os._exit(code)  # nothing of pytest's runs here


class Process:
    """What tests use of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: list[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: Any = subprocess.DEVNULL,
        stdout: Any = None,
        stderr: Any = None,
    ) -> None:
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        self.returncode: int | None = None
        given, to_close = [], []
        for place, (name, wanted) in enumerate((("stdin", stdin), ("stdout", stdout), ("stderr", stderr))):
            if wanted == subprocess.PIPE:
                reading, writing = os.pipe()
                mine, theirs = (writing, reading) if place == 0 else (reading, writing)
                setattr(self, name, os.fdopen(mine, "w" if place == 0 else "r"))
                to_close.append(theirs)
            elif wanted == subprocess.DEVNULL:
                theirs = os.open(os.devnull, os.O_RDWR)
                to_close.append(theirs)
            else:
                theirs = place if wanted is None else wanted.fileno()
            given.append(theirs)
        self._connection = _connected()
        request = {
            "arguments": arguments,
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
        }
        said = json.dumps(request).encode()
        rights = array.array("i", given)
        self._connection.sendmsg([len(said).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        self._connection.sendall(said)
        for descriptor in to_close:
            os.close(descriptor)
        self.pid = self._told(60)

    def _told(self, timeout: float | None) -> int:
        self._connection.settimeout(timeout)
        try:
            told = self._connection.recv(8, socket.MSG_WAITALL)
        except (TimeoutError, BlockingIOError):
            raise subprocess.TimeoutExpired("forked", timeout or 0.0) from None
        assert len(told) == 8, "the parent of forked processes is gone"
        return int.from_bytes(told, "big", signed=True)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._told(timeout)
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, sent: signal.Signals) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, sent)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """Once it has ended, or is to end: what it wrote that nobody read."""
        said = [stream.read() if stream else "" for stream in (self.stdout, self.stderr)]
        self.wait()
        return said[0], said[1]


# --------------------------------------------------------------------------------------------- finding the parent


def start_parent(*more: str) -> None:
    """Called by the process that starts those of pytest-xdist, they will share it; else when the first process is wanted.

    Args:
        more: modules that it imports beside the usual ones.
    """
    if ADDRESS in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="adafv-forking-"))
    # As the tests that follow: from the sources, one thread, in no folder of a test.
    variables = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder / "socket"), str(os.getpid()), *more]
    with (folder / "log").open("w") as log:
        parent = subprocess.Popen(command, env=variables, cwd=SOURCE, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    _OWN.append(parent)
    os.environ[ADDRESS] = str(folder)


def workers(wanted: Sequence[str]) -> list[str]:
    """As pytest-xdist is to start its workers: forked, so that not each of them imports torch and transformers first.

    Not where the tests are about other sources than those that forked processes have, as in `faults.py`.

    Args:
        wanted: the `--tx` of pytest-xdist.
    """
    found = importlib.util.find_spec("adafv")
    ours = found is not None and found.origin is not None and Path(found.origin).is_relative_to(SOURCE)
    if not ours or set(wanted) != {"popen"}:
        return list(wanted)
    return [f"popen//python={shlex.join([sys.executable, __file__])}" for _ in wanted]


def end() -> None:
    """The parent ends with the process that started it, which waits for it: so the seconds of all forked ones count."""
    while _OWN:
        parent = _OWN.pop()
        shutil.rmtree(os.environ.pop(ADDRESS))
        try:
            parent.wait(60)  # it may still be importing
        finally:
            parent.kill()


_OWN: list["subprocess.Popen[bytes]"] = []


def _connected() -> socket.socket:
    """To the parent, once it has imported everything."""
    start_parent()
    folder = Path(os.environ[ADDRESS])
    until = time.monotonic() + 300
    while not (folder / "socket").exists():
        said = (folder / "log").read_text()
        assert "Traceback" not in said, said
        assert time.monotonic() < until, "the parent of forked processes does not come up"
        time.sleep(0.05)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(folder / "socket"))
    return connection


# ------------------------------------------------------------------------------------------------- in the parent


def _serve(address: str, owner: int, *more: str) -> dict[str, Any]:
    """Forks at every request. Returns in the forked process alone, with what it is to do.

    Args:
        more: modules to import beside the usual ones.
    """
    gc.disable()
    for name in (*PRELOADED, *more, *(FOR_THE_PAGE if importlib.util.find_spec("gradio") else ())):
        importlib.import_module(name)
    gc.freeze()  # no forked process looks through what was imported
    gc.enable()
    if not Path(address).parent.exists():
        os._exit(0)  # nobody is left to be answered
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{address}.new")
    listening.listen(16)
    listening.settimeout(0.2)
    os.rename(f"{address}.new", address)  # now it answers
    while True:
        _reap()
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            try:
                os.kill(owner, 0)
            except ProcessLookupError:
                shutil.rmtree(Path(address).parent, ignore_errors=True)
            if not Path(address).exists():  # all that were wanted have ended, the last ones just now
                time.sleep(0.1)
                _reap()
                os._exit(0)
            continue
        if os.fork():
            connection.close()
            continue
        listening.close()
        return _forked(connection)


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _forked(connection: socket.socket) -> dict[str, Any]:
    """A process that waits for the one asked for, tells how it ended, and ends; in that one, what it is to do."""
    connection.setblocking(True)
    size = array.array("i")
    begin, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * size.itemsize))
    for _, _, data in ancillary:
        size.frombytes(data)
    said = connection.recv(int.from_bytes(begin, "big"), socket.MSG_WAITALL)
    if pid := os.fork():
        for descriptor in size:
            os.close(descriptor)
        with suppress(OSError):
            connection.sendall(pid.to_bytes(8, "big", signed=True))
        _, status = os.waitpid(pid, 0)
        with suppress(OSError):
            connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
        os._exit(0)
    connection.close()
    for place, descriptor in enumerate(size):
        os.dup2(descriptor, place)
        os.close(descriptor)
    found: dict[str, Any] = json.loads(said)
    return found


def _become(request: dict[str, Any]) -> None:
    """What Python does with its command line, in a terminal: behind `nohup` or `&` Ctrl-C is ignored, and so is a test's."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    _own_threads()
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first, *rest = request["arguments"]
    if first == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(rest[0], vars(main))
    elif first == "-m":
        sys.path[0] = ""
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(first).parent)
        sys.argv = request["arguments"]
        runpy.run_path(first, run_name="__main__")


def _own_threads() -> None:
    """torch makes its pool of threads anew at the first use in a forked process, and two threads that use it first at once
    may find none ("Invalid thread pool!"). So it is used here, by one."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(torch.get_num_threads())


def _end(code: int) -> NoReturn:
    """As Python ends, but for taking apart all that was imported, which takes half a second, half of it for copied memory."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    os._exit(code)


def _become_and_end(request: dict[str, Any]) -> NoReturn:
    try:
        _become(request)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            _end((error.code or 0) & 0xFF)
        print(error.code, file=sys.stderr)
        _end(1)
    except Exception:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        _end(1)
    _end(0)


def _worker(command: list[str]) -> int:
    """In the place of Python, for execnet, which starts `python -u -c ...` and speaks with it over standard streams."""
    process = Process([word for word in command if word not in ("-u", "-B")], stdin=None)
    return process.wait()


if __name__ == "__main__":
    if sys.argv[1] == "-u":
        sys.exit(_worker(sys.argv[1:]))
    _become_and_end(_serve(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
