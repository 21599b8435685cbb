"""A user's first minutes with the built package, in environments outside the repository. `make package` runs them.

They build sdist and wheel as a release would be built (`python -m build`: the wheel from the sdist, in an environment of its
own), from the files that git knows, and install the wheel as a user would, into fresh environments of each Python that
is there. Nothing of the development's is in those; commands run in them as processes.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from environments import (
    NAMED,
    PYTHONS,
    ROOT,
    TORCH,
    Environment,
    clean_variables,
    files_of_the_repository,
    interpreter,
    needed_by,
)

if not PYTHONS:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked "release" runs in `make package`, not in `make package-short`: see docs/testing.md."""
    if not os.environ.get("ADAFV_WHOLE"):
        items[:] = [item for item in items if item.get_closest_marker("release") is None]


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    for name in files_of_the_repository():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(folder / "source")]
    done = subprocess.run(command, env=clean_variables(), capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def sdist(dist: Path) -> Path:
    (found,) = dist.glob("*.tar.gz")
    return found


@pytest.fixture(scope="session")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist's only folder."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (only,) = folder.iterdir()
    return only


@pytest.fixture(
    scope="session",
    params=PYTHONS,
    ids=lambda release: f"python{release}",
)
def environment(
    request: pytest.FixtureRequest, wheel: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Environment]:
    """An environment with the wheel and nothing but what it brings."""
    release = request.param
    python = interpreter(release)
    if python is None:
        pytest.skip(f"there is no Python {release} on this machine")
    folder = tmp_path_factory.mktemp(f"python{release}")
    assert not folder.is_relative_to(ROOT)
    made = Environment(release, folder / "environment", folder / "home", folder / "clone")
    made.home.mkdir()
    shutil.copytree(unpacked, made.clone)
    subprocess.run([python, "-m", "venv", str(made.folder)], env=clean_variables(), check=True)
    if os.environ.get("ADAFV_WHOLE"):
        made.install("--no-compile", f"torch=={TORCH}")
    else:  # they are two gigabytes, which take pip a minute of a core; and what is compiled of them is shared
        for name in needed_by(wheel):
            made.link(name)
    made.install("--no-compile", str(wheel))
    make = made.run(f"python tests/package/hub_checkpoint.py {made.home / 'hf'} {' '.join(NAMED)}")
    assert make.returncode == 0, make.stderr
    yield made
    shutil.rmtree(folder)  # a gigabyte, or five with CUDA's libraries


@pytest.fixture(scope="session")
def photo(environment: Environment) -> Path:
    """The photo.jpg of the documentation."""
    path = environment.clone / "photo.jpg"
    convert = "from PIL import Image; Image.open('src/adafv/bundled/samples/bird.png').convert('RGB').save('photo.jpg')"
    assert environment.run(f'python -c "{convert}"').returncode == 0
    return path


@pytest.fixture(scope="session")
def address(photo: Path) -> Iterator[str]:
    """Where a web server shows the photo, in the place of https://..."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(photo.parent))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/photo.jpg"
        server.shutdown()
