"""examples/serve.py as it stands: it starts the server, asks it, and leaves nothing behind."""

import re
import subprocess
import sys
from pathlib import Path

from servers import environment_of_a_user

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve.py"
SECONDS = 400.0


def test_as_it_stands(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        cwd=tmp_path,
        env=environment_of_a_user(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = re.findall(r"^budget (.+): (\w+) \(prompt: (\d+) tokens\)$", done.stdout, re.MULTILINE)
    # Nine tokens are text.
    assert answers == [("of the server", "green", "25"), ("8", "green", "17"), ("144", "green", "153")]
    assert list(tmp_path.iterdir()) == []
    assert "Application shutdown complete" in done.stderr
