"""The rooms of the package: dependencies point inward, and little is imported."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging import version

import adafv

ROOT = Path(adafv.__file__).parent

LAYERS = (
    # Foundations: they know nothing of pruning. `asking.models` says which checkpoint is meant, before anything is loaded.
    (
        *("errors", "defaults", "printable", "extras", "registry", "web", "images", "bundled"),
        *("asking", "asking.failures", "asking.models"),
    ),
    ("core",),
    ("methods", "prompts"),
    ("engines", "engines.serving"),
    ("engines.transformers", "engines.vllm"),
    ("picture",),
    ("asking.session",),
    ("evaluation",),
    ("environment", "page"),
    ("cli",),
    ("__main__",),
)
"""Rooms, the innermost first. A module may import its own room and those of layers further in, and no other of its layer;
the foundations one another."""

SHARED = {"adafv.engines.transformers.towers", "adafv.engines.transformers.families.qwen2_5_vl"}
"""What the families of vLLM read off transformers' engine: the shapes of towers."""


def room_of(module: str) -> tuple[int, str]:
    """(number of the layer, room) of a module; the longest name that fits."""
    inside = module.removeprefix("adafv.")
    fitting = [
        (len(room), layer, room)
        for layer, rooms in enumerate(LAYERS)
        for room in rooms
        if inside == room or inside.startswith(f"{room}.")
    ]
    assert fitting, f"{module} stands in no room: give it a place in LAYERS"
    _, layer, room = max(fitting)
    return layer, room


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if "cpu_torchvision" not in parts:  # a stand-in for a package that is not ours
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(source: str) -> Iterator[str]:
    """Every module of adafv that a source imports, wherever in it. What the package itself hands on is `adafv.<name>`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "adafv")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            if node.module and node.module.split(".")[0] == "adafv":
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    yield name if name in modules() or node.module == "adafv" else node.module


def outward(module: str, source: str) -> list[str]:
    """The imports of a module that do not point inward."""
    layer, room = room_of(module)
    wrong = []
    for name in imports_of(source):
        if name == "adafv.__version__":
            continue
        if name not in modules():
            wrong.append(f"{module} imports {name} by way of the package, whose names are for users")
            continue
        there, other = room_of(name)
        same = other == room or layer == there == 0
        if not (same or there < layer or (room == "engines.vllm" and name in SHARED)):
            wrong.append(f"{module} imports {name}")
    return wrong


@pytest.mark.parametrize("module", sorted(set(modules()) - {"adafv"}))
def test_dependencies_point_inward(module: str) -> None:
    assert outward(module, modules()[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("adafv.core.scores", "from adafv.methods import Method"),
        ("adafv.methods.random", "from adafv.prompts import text"),
        ("adafv.prompts.text", "import adafv.engines.transformers.prompt"),
        ("adafv.engines.serving.settings", "from adafv.engines.vllm import RELEASES"),
        ("adafv.engines.serving.settings", "from adafv.engines.transformers import towers"),
        ("adafv.engines.transformers.record", "from adafv.engines.vllm import tap"),
        ("adafv.engines.vllm.model", "from adafv.engines.transformers.choice import Choice"),
        ("adafv.engines.transformers.record", "def later():\n    from adafv.asking.session import Session"),
        ("adafv.asking.session", "from adafv.cli.ask import parse_keep"),
        ("adafv.page.app", "from adafv.cli.options import METHOD"),
        ("adafv.picture", "from adafv.evaluation.world.scenes import render"),
        ("adafv.evaluation.world.scenes", "from adafv.page.app import build"),
        ("adafv.asking.session", "from adafv.evaluation.store import Store"),
        ("adafv.evaluation.answers", "from adafv.cli.options import METHOD"),
        ("adafv.asking.session", "from adafv.evaluation.speed import run"),
        ("adafv.core.select", "from adafv.evaluation.speed import stages"),
        ("adafv.engines.transformers.compress", "from adafv import Pruner"),
    ],
)
def test_what_points_outward_is_noticed(module: str, line: str) -> None:
    assert len(outward(module, line)) == 1


def test_serving_imports_no_engine() -> None:
    for module, path in modules().items():
        if module.startswith("adafv.engines.serving"):
            for name in imports_of(path.read_text(encoding="utf-8")):
                assert not name.startswith("adafv.engines") or name.startswith("adafv.engines.serving")


def in_a_process(script: str) -> Any:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_adafv_loads_no_model_code() -> None:
    """Nor torch. What knows no engine runs where there is no transformers; listing the families loads no model of it."""
    seen = in_a_process("""
import json, sys

def loaded(*names):
    return sorted(m for m in sys.modules if any(m == name or m.startswith(f"{name}.") for name in names))

import adafv, adafv.registry
seen = {"adafv": loaded("torch", "transformers")}
sys.modules["transformers"] = None
import adafv.core, adafv.methods, adafv.prompts.prompt, adafv.prompts.template, adafv.prompts.text
import adafv.engines.serving.request, adafv.engines.serving.settings
seen["methods"] = len(adafv.methods.known_methods())
del sys.modules["transformers"]
from adafv.engines.transformers.families import known_families
seen["families"] = len(known_families())
seen["models"] = loaded("transformers.models")
print(json.dumps(seen))
""")
    assert seen["adafv"] == []
    assert seen["methods"] >= 6
    assert seen["families"] >= 36
    # The package of models itself, and perhaps the table of their names; no model.
    alone = r"transformers\.models(\.auto.*)?"
    if version.parse(transformers.__version__) < version.parse("5.23"):
        # Which imports tokenizers, and other names of image processors, whatever is asked of it.
        alone += r"|transformers\.models\.\w+(\.(tokenization_\w+|\w+_fast))?"
    assert [name for name in seen["models"] if not re.fullmatch(alone, name)] == []
