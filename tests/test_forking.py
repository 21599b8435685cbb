"""Forked processes are like those that Python starts, where tests rely on it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forking import ran, started

SHOW = """
import atexit, json, os, sys
atexit.register(lambda: print("at its end"))
print(json.dumps([sys.argv, __name__, os.getcwd(), os.environ.get("SHOWN"), sys.stdin.read()]))
print("to standard error", file=sys.stderr)
sys.exit("a message")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "show.py"
    path.write_text(SHOW)
    return path


def test_as_python_itself(script: Path, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("standard input")
    said = []
    for start in (ran, lambda arguments, **more: subprocess.run([sys.executable, *arguments], text=True, **more)):
        with (tmp_path / "given").open() as given:
            more = {} if start is ran else {"capture_output": True}
            done = start(
                [str(script), "one", "two"], env={**os.environ, "SHOWN": "x"}, cwd=tmp_path, stdin=given, **more
            )
        said.append((done.returncode, done.stdout, done.stderr))
    assert said[0] == said[1]
    assert said[0][0] == 1


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_signals(tmp_path: Path, sent: signal.Signals) -> None:
    (tmp_path / "wait.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)")
    process = started([tmp_path / "wait.py"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    assert process.poll() is None
    process.send_signal(sent)
    assert process.wait(20) == -sent
    assert process.poll() == -sent


def test_an_error_is_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise ValueError('surprise')")
    done = ran([tmp_path / "fails.py"])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: surprise"
