"""Sdist and wheel: what is in them, what is not, what they say of themselves, and the tests of the unpacked sdist."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from environments import ROOT, Environment, clean_variables, files_of_the_repository
from packaging.metadata import Metadata

MEGABYTE = 10**6
MOST = 25 * MEGABYTE
"""Of either file. The two bundled models are twenty; a third one, or the log of a training, should not slip in."""
NOT_IN_SDIST = {".gitignore"}
DEVELOPMENT = ("pytest", "mypy", "ruff", "hypothesis", "build", "playwright", "peft", "torchao", "bitsandbytes")


def metadata_of(wheel: Path) -> Metadata:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Metadata.from_email(archive.read(name), validate=True)


class TestContents:
    def test_wheel_is_the_package_and_nothing_else(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        package = {name for name in names if ".dist-info/" not in name}
        assert package == {name.removeprefix("src/") for name in files_of_the_repository("src")}
        assert {"adafv/py.typed", "adafv/bundled/llava/model.safetensors", "adafv/page/style.css"} <= package

    def test_wheel_holds_the_files_as_they_are(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            for name in files_of_the_repository("src"):
                assert archive.read(name.removeprefix("src/")) == (ROOT / name).read_bytes(), name

    def test_sdist_is_the_repository(self, unpacked: Path) -> None:
        found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
        made = {name for name in found if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
        assert found - made == files_of_the_repository() - NOT_IN_SDIST

    def test_size(self, wheel: Path, sdist: Path) -> None:
        for path in (wheel, sdist):
            assert path.stat().st_size < MOST, path.name

    def test_modes(self, sdist: Path, wheel: Path) -> None:
        """Everyone may read what root installs, and nobody else may write it."""
        with tarfile.open(sdist) as archive:
            modes = {member.name: member.mode for member in archive.getmembers()}
        with zipfile.ZipFile(wheel) as archive:
            modes |= {info.filename: info.external_attr >> 16 for info in archive.infolist()}
        assert [name for name, mode in modes.items() if not mode & 0o004 or mode & 0o002] == []


class TestMetadata:
    def test_valid_and_as_pyproject_says(self, wheel: Path, sdist: Path) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        said = metadata_of(wheel)
        assert (said.name, str(said.version)) == ("adafv", project["version"])
        assert str(said.requires_python) == project["requires-python"]
        assert str(said.license_expression) == "Apache-2.0"
        assert said.license_files == ["LICENSE"]
        assert said.description_content_type == "text/markdown"
        assert said.description is not None
        assert said.description.strip() == (ROOT / "README.md").read_text().strip()
        assert set(said.provides_extra or ()) == set(project["optional-dependencies"])
        assert said.project_urls == project["urls"]
        assert said.keywords
        assert said.summary == project["description"]

    def test_sdist_says_the_same(self, wheel: Path, unpacked: Path) -> None:
        told = Metadata.from_email((unpacked / "PKG-INFO").read_bytes(), validate=True)
        said = metadata_of(wheel)
        for name in ("name", "version", "requires_python", "requires_dist", "project_urls", "summary", "license_files"):
            assert getattr(told, name) == getattr(said, name)

    def test_one_version_everywhere(self, wheel: Path) -> None:
        version = str(metadata_of(wheel).version)
        assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version  # type: ignore[index]
        assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version  # type: ignore[index]

    def test_addresses_are_real_ones(self, wheel: Path) -> None:
        assert metadata_of(wheel).project_urls
        assert all(url.startswith("https://") for url in metadata_of(wheel).project_urls.values())  # type: ignore[union-attr]


class TestInstalled:
    def test_pip_check(self, environment: Environment) -> None:
        done = environment.run("python -m pip check")
        assert done.returncode == 0, done.stdout

    def test_nothing_of_the_development_and_no_extra(self, environment: Environment) -> None:
        found = environment.installed()
        assert not set(DEVELOPMENT) & found.keys()
        assert not {"accelerate", "gradio", "vllm"} & found.keys()

    def test_it_is_the_wheel(self, environment: Environment) -> None:
        where = environment.run("python -c 'import adafv; print(adafv.__file__, adafv.__version__)'")
        path, version = where.stdout.split()
        assert Path(path).is_relative_to(environment.folder)
        assert version == environment.installed()["adafv"]

    def test_types_reach_its_users(self, environment: Environment, tmp_path: Path) -> None:
        """mypy, which the development has, reads the installed package: py.typed is where it must be."""
        script = tmp_path / "uses_adafv.py"
        script.write_text("from adafv import AdaFV, Pruner\n\nkeep: str = AdaFV(keep=64)\n")
        skipped = "".join(
            f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "transformers", "PIL", "numpy")
        )
        (tmp_path / "mypy.ini").write_text(f"[mypy]\n{skipped}")  # else it reads all of torch
        command = [sys.executable, "-m", "mypy", "--python-executable", environment.python]
        done = subprocess.run(
            [*command, "--cache-dir", str(tmp_path), script.name], cwd=tmp_path, capture_output=True, text=True
        )
        assert 'has type "AdaFV"' in done.stdout, done.stdout
        assert "Found 1 error" in done.stdout


@pytest.mark.release
class TestSdist:
    """What somebody who packages adafv does: unpack, and run the tests there (with the development's packages)."""

    def pytest(self, unpacked: Path, *arguments: str) -> str:
        path = os.pathsep.join([str(unpacked / "src"), str(unpacked)])
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments],
            cwd=unpacked,
            env={**clean_variables(), "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        return done.stdout

    def test_all_tests_are_collected(self, unpacked: Path) -> None:
        said = self.pytest(unpacked, "--collect-only")
        counted = re.search(r"(\d+) tests collected", said)
        assert counted
        assert int(counted[1]) > 1000
        modules = {path.name for path in (ROOT / "tests").glob("test_*.py")}
        assert {name for name in modules if f"tests/{name}" in said} == modules

    def test_some_of_them_run(self, unpacked: Path) -> None:
        """Those of the pure functions, of the documents, of helpers and of what is not in the package."""
        chosen = ["tests/test_core.py", "tests/test_vllm_settings.py", "-m", "not slow"]
        documents = [f"tests/test_families.py::{name}" for name in ("test_the_example_in_the_docs_is_what_is_there",)]
        said = self.pytest(unpacked, *documents, *chosen)
        assert re.search(r"\d+ passed", said)
        assert "failed" not in said

    def test_the_package_is_the_unpacked_one(self, unpacked: Path) -> None:
        """Else the two above would say nothing."""
        script = "import adafv, pathlib; print(pathlib.Path(adafv.__file__).resolve())"
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**clean_variables(), "PYTHONPATH": str(unpacked / "src")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert Path(done.stdout.strip()).is_relative_to(unpacked.resolve())


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_has_what_the_documents_name(document: str) -> None:
    named = set(re.findall(r"(?:^|[`\s])make ([a-z][a-z-]*)", (ROOT / document).read_text()))
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named
    assert named <= targets
