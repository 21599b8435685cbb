"""The examples of the documentation, run as they are written, so that they cannot rot."""

import json
import re
import shlex
from pathlib import Path

import pytest
from environments import ROOT, Environment
from snippets import Snippet, snippets

FOUND = snippets(ROOT)
DOCUMENTS = sorted({found.document for found in FOUND if found.language == "python"})
SERVED = [found for found in FOUND if found.document == "docs/serving.md" and found.language == "bash"]

AFTERWARDS = {
    "README.md": """
assert [len(kept) for kept in adafv.last.kept] == [64]
assert 0 <= float(adafv.last.certificate[0]) < 1
assert adafv.last.keep_mask.shape == inputs["input_ids"].shape
assert output.shape[1] > inputs["input_ids"].shape[1]  # the whole prompt came back
""",
    "docs/adding-a-family.md": """
assert ROW.name == "deepseek-vl"
""",
    "docs/extending.md": """
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from adafv import Pruner
from adafv.bundled import bundled_model
model = AutoModelForImageTextToText.from_pretrained(bundled_model())
processor = AutoProcessor.from_pretrained(bundled_model())
inputs = processor(images=Image.open("photo.jpg"), text="<image> what is in the picture?", return_tensors="pt")
with Pruner(Folded(), keep=64)(model) as pruned:
    model.generate(**inputs, max_new_tokens=2)
assert [len(kept) for kept in pruned.last.kept] == [64]
""",
    "docs/library.md": """
assert not adafv.enabled
assert [len(kept) for kept in pruner.last.kept] == [len(kept) for kept in adafv.last.kept] == [14]
assert shorter["input_ids"].shape[1] == inputs["input_ids"].shape[1] - 144 + 14
assert processor.decode(output[0, shorter["input_ids"].shape[1] :], skip_special_tokens=True).strip() == "green"
""",
    "docs/serving.md": """
import base64, json, urllib.request
picture = "data:image/jpeg;base64," + base64.b64encode(open("photo.jpg", "rb").read()).decode()
content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is this?"}]
body = {"model": "llava-hf/llava-1.5-7b-hf", "max_tokens": 2, "messages": [{"role": "user", "content": content}]}
request = urllib.request.Request(
    "http://localhost:8000/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
)
answer = json.load(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120))
server.kill_server()
assert answer["usage"]["completion_tokens"] == 2, answer
""",
    "docs/training.md": """
import os
assert os.path.exists("trained/adapter/adapter_model.safetensors")
""",
}
"""What must hold when the last example of a document has run."""


@pytest.mark.parametrize(
    "document",
    [pytest.param(name, marks=[] if name == "README.md" else [pytest.mark.release]) for name in DOCUMENTS],
)
def test_examples(environment: Environment, photo: Path, tmp_path: Path, document: str) -> None:
    """The examples of one document after one another, in one process outside the repository."""
    chosen = [found for found in FOUND if found.document == document and found.language == "python"]
    needs = sorted({package for found in chosen for package in found.needs})
    if needs:
        if environment.release != "3.11":
            pytest.skip(f"{document} needs {', '.join(needs)}, installed beside Python 3.11 alone")
        environment.install("--no-compile", *needs)
    run = [found for found in chosen if not found.not_run]
    if not run:
        pytest.skip("; ".join(f"{found.name}: {found.not_run}" for found in chosen))
    (tmp_path / "photo.jpg").write_bytes(photo.read_bytes())
    # Compiled under its own name and line, so that an error names the line of the document.
    script = tmp_path / "examples.py"
    parts = [{"name": found.name, "text": "\n" * (found.line - 1) + found.text} for found in run]
    parts.append({"name": "afterwards", "text": AFTERWARDS.get(document, "")})
    script.write_text(
        f"import json\n\nfor part in json.loads({json.dumps(parts)!r}):\n"
        "    exec(compile(part['text'], part['name'], 'exec'), globals())\n"
    )
    path = {"PYTHONPATH": str(environment.clone / "tests")} if "adding" in document else {}
    done = environment.run(f"python {shlex.quote(str(script))}", cwd=tmp_path, variables=path, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.release
@pytest.mark.parametrize("command", SERVED, ids=lambda command: command.name)
def test_commands_of_the_docs(environment: Environment, command: Snippet) -> None:
    """Those that start vLLM are checked as far as they can be without it; tests/serving starts the real server."""
    if command.not_run:
        pytest.skip(f"{command.text}: {command.not_run}")
    assert command.text.startswith("adafv serve"), "say how this command is to be tested"
    written, *others = command.text.partition("#")[0].split(" -- ")
    done = environment.run(" -- ".join([f"{written} --print-command", *others]))
    assert done.returncode == 0, done.stderr
    printed = shlex.split(done.stdout)
    assert printed[:3] == ["vllm", "serve", shlex.split(written)[2]]
    overrides = json.loads(printed[printed.index("--hf-overrides") + 1])
    keep = re.search(r"--keep (\d+)", written)
    assert keep
    assert overrides["adafv"]["keep"] == int(keep[1])
    assert printed[-len(shlex.split(" ".join(others))) :] == shlex.split(" ".join(others)) or not others


def test_every_fence_is_run_or_says_why_not() -> None:
    """A language that is neither bash nor python is text; nothing else is left out."""
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        fences = re.findall(r"^ *```(\w+)$", path.read_text(), re.MULTILINE)
        assert set(fences) <= {"bash", "python", "json", "toml"}, path.name
        lines = path.read_text().count("```python\n")
        document = path.relative_to(ROOT).as_posix()
        assert lines == sum(found.language == "python" for found in FOUND if found.document == document)
        commands = {found.line for found in FOUND if found.document == document and found.language == "bash"}
        starts = [number for number, line in enumerate(path.read_text().splitlines(), 2) if line.strip() == "```bash"]
        assert set(starts) <= commands


def test_marks_are_read() -> None:
    """Each mark in the documents changes what is run: a misspelled one would be a comment."""
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        document = path.relative_to(ROOT).as_posix()
        of_it = [found for found in FOUND if found.document == document]
        for mark in re.findall(r"<!-- (.+?) -->", path.read_text()):
            kind, _, rest = mark.partition(": ")
            used = {found.not_run for found in of_it} | {", ".join(found.needs) for found in of_it}
            assert re.match(r"not run( \(.+\))?$|run with$", kind), mark
            assert rest in used, mark
