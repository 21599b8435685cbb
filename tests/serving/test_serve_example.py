"""examples/serve.py as it stands: it starts the server, asks it, and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from servers import environment_of_a_user

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve.py"
SECONDS = 600.0
"""As long as a busy machine may take."""


@pytest.mark.release
def test_as_it_stands(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, str(EXAMPLE)],
        cwd=tmp_path,
        env=environment_of_a_user(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, log = process.communicate(timeout=SECONDS)
        finally:
            with suppress(ProcessLookupError):  # the server is of the same group
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, log[-4000:]
    answers = re.findall(r"^budget (.+): (\w+) \(prompt: (\d+) tokens\)$", said, re.MULTILINE)
    # Nine tokens are text.
    assert answers == [("of the server", "green", "25"), ("8", "green", "17"), ("144", "green", "153")]
    assert list(tmp_path.iterdir()) == []
    assert "Application shutdown complete" in log
