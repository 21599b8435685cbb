"""The scripts in examples/: each runs as it stands, on the bundled model and on another, and says something true.

tests/serving/test_serve_example.py has the server, which needs vLLM.
"""

import ast
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import forking
import pytest

from adafv.bundled import bundled_model, sample_pictures

EXAMPLES = Path(__file__).parent.parent / "examples"
LINES = 60
TRUTH = {entry["picture"]: entry for entry in json.loads((sample_pictures()[0].parent / "samples.json").read_text())}


def captions(said: str) -> None:
    found = re.findall(r"^(\S+\.png) \((\d+) of (\d+) visual tokens\): (.+)$", said, re.MULTILINE)
    assert [name for name, *_ in found] == [picture.name for picture in sample_pictures()]
    for _, after, before, _ in found:
        assert int(after) == round(0.25 * int(before))
    # The last word is the background, which the small model tells well; of the objects it names some.
    backgrounds = [caption.split()[-1] == TRUTH[name]["caption"].split()[-1] for name, *_, caption in found]
    assert sum(backgrounds) >= 5, found
    objects = [set(caption.split()) & set(TRUTH[name]["caption"].split()) - {"a", "on"} for name, *_, caption in found]
    assert all(len(words) >= 3 for words in objects), found


def chat(said: str) -> None:
    turns = re.findall(r"^(.+\?) (\w+) \(prompt: (\d+) tokens, cache: (\d+)\)$", said, re.MULTILINE)
    questions = ["What color is the banana?", "Is there a bottle?", "How many cars are there?"]
    assert [(question, answer) for question, answer, *_ in turns] == list(zip(questions, ["green", "yes", "one"]))
    kept = re.search(r"kept (\d+) of (\d+) visual tokens", said)
    assert kept
    dropped = int(kept[2]) - int(kept[1])
    assert dropped > 100
    # Of the answer, a word and its end, the word has keys and values.
    assert all(int(cache) == int(prompt) - dropped + 1 for *_, prompt, cache in turns)
    assert all(int(before) < int(after) for (*_, before), (*_, after) in pairwise(turns))


def compare(said: str) -> None:
    heads = re.findall(r"^(\w+) keeps (\d+) of (\d+) visual tokens: (.+)$", said, re.MULTILINE)
    assert [name for name, *_ in heads] == ["adafv", "saliency"]
    assert heads[0][3] == "green"
    assert all(int(after) == round(0.05 * int(before)) for _, after, before, _ in heads)
    rows = [line.split() for line in said.splitlines() if line.startswith("    ")]
    maps = [[cell for row in half for cell in row] for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :])]
    marked = [{place for place, cell in enumerate(cells) if cell == "#"} for cells in maps]
    assert [len(cells) for cells in maps] == [144, 144]
    shared = re.search(r"^both keep (\d+) tokens$", said, re.MULTILINE)
    assert shared
    if heads[0][2] == "144":  # one crop: the map shows all of it
        assert [len(found) for found in marked] == [7, 7]
        assert int(shared[1]) == len(marked[0] & marked[1])
    assert marked[0] != marked[1]


def finetune(said: str) -> None:
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", said, re.MULTILINE)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2
    kept = re.search(r"trained through (\d+) of (\d+) visual tokens", said)
    assert kept
    assert int(kept[1]) == round(0.25 * int(kept[2]))


CHECKS = {"captions": captions, "chat": chat, "compare": compare, "finetune": finetune}


@pytest.mark.parametrize("name", CHECKS)
def test_as_it_stands(name: str, tmp_path: Path) -> None:
    """As a process in an empty folder, without the Hub."""
    done = run(name, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    CHECKS[name](done.stdout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.release] if name == "finetune" else []) for name in CHECKS]
)
def test_on_another_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One option names it. In this process, where torch has been imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--model", str(bundled_model("llava-next"))])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    CHECKS[name](said)
    assert " of 144 " not in said  # it has more visual tokens: the option was heard


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here: tests/serving runs it")
def test_serve_says_what_it_needs(tmp_path: Path) -> None:
    done = run("serve", tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip() == "this example needs vLLM, which is not installed: see docs/serving.md"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_is_short_tested_and_says_how_to_call_it(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LINES
    assert f"    python {path.name}" in (ast.get_docstring(ast.parse(text), clean=False) or "")
    assert path.stem in {*CHECKS, "serve"}


def run(name: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return forking.ran([str(EXAMPLES / f"{name}.py")], cwd=folder, env=variables, timeout=600)
