"""Environments outside the repository, in which the built package is tried."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from email import message_from_bytes
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.linking import link

ROOT = Path(__file__).parent.parent.parent
PYTHONS = os.environ.get("ADAFV_PACKAGE", "").split()
"""Releases to try it on."""
TORCH = "2.13.0"
"""As in the Makefile: asked for through a range, pip may choose a build with gigabytes of CUDA libraries."""
NAMED = ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-v1.6-34b-hf")
"""Checkpoints that the documentation names in what is run here."""


def files_of_the_repository(*folders: str) -> set[str]:
    """The files that git knows or would add, by their place in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


def clean_variables() -> dict[str, str]:
    """The environment variables without those of the development."""
    hidden = ("PYTHON", "ADAFV_", "HF_", "TRANSFORMERS_", "VIRTUAL_ENV", "PYTEST_", "COVERAGE", "OMP_")
    return {name: value for name, value in os.environ.items() if not name.startswith(hidden)}


def needed_by(wheel: Path) -> set[str]:
    """The packages that the wheel brings, and what these bring, as the Python that runs this has them; no extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        waiting = message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    found: set[str] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        package = canonicalize_name(requirement.name)
        if package not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(package)
            waiting += distribution(package).requires or []
    return found


def interpreter(release: str) -> str | None:
    """A Python of this release: on the path, among pyenv's, or the one that runs this."""
    candidates = [shutil.which(f"python{release}")]
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True).stdout.strip()
        candidates += [str(path) for path in Path(root).glob(f"versions/{release}.*/bin/python")]
    candidates.append(sys.executable)
    for candidate in filter(None, candidates):
        said = subprocess.run(
            [candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2], sys.executable)"],
            capture_output=True,
            text=True,
        )
        if said.stdout.startswith(release):
            return said.stdout.split(maxsplit=1)[1].strip()
    return None


@dataclass(frozen=True)
class Environment:
    """An environment in which adafv is installed, and the folder of its user."""

    release: str
    """Of Python."""
    folder: Path
    home: Path
    clone: Path
    """What a user would have cloned, unpacked from the sdist, with a photo.jpg in it."""

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def variables(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Of a user who activated the environment, has the documented checkpoints on disk and cannot reach the Hub."""
        path = os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", os.defpath)])
        own = {"HOME": str(self.home), "HF_HOME": str(self.home / "hf"), "HF_HUB_OFFLINE": "1", "PATH": path}
        # One thread: the tests of two environments share the cores. Wide: messages are read as lines.
        return {**clean_variables(), **own, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **(more or {})}

    def run(
        self,
        command: str,
        *,
        cwd: Path | None = None,
        timeout: float = 180,
        variables: Mapping[str, str] | None = None,
        entered: str = "",
    ) -> "subprocess.CompletedProcess[str]":
        """One line of a shell, as a user types it, and what is entered then."""
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", command],
            cwd=cwd or self.clone,
            env=self.variables(variables),
            input=entered,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def install(self, *arguments: str) -> None:
        """`pip install`, to the versions of constraints.txt."""
        command = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        constraints = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
        done = subprocess.run(command, env={**clean_variables(), **constraints}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def link(self, name: str) -> None:
        """Has a package of the Python that runs this, without what it needs: for pip, it is there.

        Not one that the environment has of its own, as setuptools.
        """
        link(name, self.folder / "lib" / f"python{self.release}" / "site-packages")

    def installed(self) -> dict[str, str]:
        """Name and release of every package, as pip lists them."""
        done = self.run("python -m pip list --format freeze --disable-pip-version-check")
        assert done.returncode == 0, done.stderr
        pairs = (line.split("==") if "==" in line else line.split(" @ ") for line in done.stdout.splitlines())
        return {name.lower(): release for name, release in pairs}
