"""The commands and examples of the documentation, as they are written there.

A fence of `bash` is a list of commands, one of `python` goes on where the last one of its document ended; others are not
run. In README.md the commands in the text count, too. What cannot run here is marked in front of its fence with the
reason, what needs packages that adafv does not bring with their names; neither is shown to readers:

    <!-- not run: it needs a GPU -->
    <!-- not run (vllm serve): it needs a GPU -->       the commands that begin so, in the whole document
    <!-- run with: peft, accelerate -->
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

NOT_HERE = {
    r"adafv (ask|check)$": "it is a command's name, and no more of it",
    r"adafv eval|lmms-eval|.*adafv eval --include": "it needs lmms-eval and the Hub; `make test-lmms` has the first",
    r"adafv (bench accuracy|analyze)": "it needs scikit-image, or minutes; tests/evaluation runs it",
    r"adafv bench speed": "it takes minutes, a GPU or a checkpoint; tests/test_speed.py runs it",
}
"""Commands, by how they begin, that many documents name and that cannot run here."""
_MARKED_FENCE = re.compile(
    r"(?P<marks>(?:^[ ]*<!--.*?-->\n)*)^(?P<indent>[ ]*)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```$",
    re.M | re.S,
)
_COMMAND = re.compile(r"(?<!`)`((?:adafv [a-z]|pip install )[^`]+)`")


@dataclass(frozen=True)
class Snippet:
    """One command, or one example in Python."""

    document: str
    line: int
    language: str
    """bash or python"""
    text: str
    not_run: str
    """Why it cannot be run here; empty where it can."""
    needs: tuple[str, ...]
    """Packages that it needs beside adafv."""

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"


def snippets(root: Path) -> list[Snippet]:
    """Those of README.md, of the other READMEs and of docs/, in order."""
    paths = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    paths += [root / "src/adafv/bundled/README.md", root / "training/README.md"]
    return [found for path in paths for found in _of(path.relative_to(root).as_posix(), path.read_text())]


def _of(document: str, text: str) -> list[Snippet]:
    excluded = dict(re.findall(r"<!-- not run \((.+?)\): (.+?) -->", text))
    found = []

    def add(place: int, language: str, snippet: str, reason: str, needs: tuple[str, ...] = ()) -> None:
        reason = reason or next((why for start, why in excluded.items() if snippet.startswith(start)), "")
        if language == "bash":
            reason = reason or next((why for start, why in NOT_HERE.items() if re.match(start, snippet)), "")
        found.append(Snippet(document, text.count("\n", 0, place) + 1, language, snippet, reason, needs))

    for fence in _MARKED_FENCE.finditer(text):
        body = textwrap.dedent(fence["body"])
        reason = "".join(re.findall(r"<!-- not run: (.+?) -->", fence["marks"]))
        needs = re.search(r"<!-- run with: (.+?) -->", fence["marks"])
        if fence["language"] == "python":
            packages = tuple(re.split(r",\s*", needs[1])) if needs else ()
            add(fence.start("body"), "python", body, reason, packages)
        if fence["language"] == "bash":
            place = fence.start("body")
            for command in re.split(r"(?<!\\)\n", fence["body"].rstrip("\n")):
                if command.strip():
                    add(place, "bash", textwrap.dedent(command), reason)
                place += len(command) + 1
    if document == "README.md":
        outside = _MARKED_FENCE.sub(lambda fence: re.sub(r"[^\n]", " ", fence[0]), text)
        for match in _COMMAND.finditer(outside):
            add(match.start(), "bash", match[1], "")
    return sorted(found, key=lambda snippet: snippet.line)
