"""Maps that are true: the files a package's docstring lists, the index of docs/, every path and link of the documents."""

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from command_line import run

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "adafv"
README_LINES = 130
FOLDERS = ("src", "docs", "examples", "tests", "benchmarks", "training")
FILES = {path.name for path in ROOT.iterdir() if path.is_file()} | {
    path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()
}
DOCUMENTS = sorted(name for name in FILES if name.endswith(".md") and not name.startswith("tests/"))
PAGES = {name.removeprefix("docs/") for name in DOCUMENTS if re.fullmatch(r"docs/[^/]+\.md", name)} - {"README.md"}

_MAP_LINE = re.compile(r"^ {4}(\w+\.py|\w+/) {2,}\S", re.MULTILINE)
"""A file or folder and what it is, as a package's docstring lists them."""
_LINK = re.compile(r"\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")


def package_maps() -> dict[str, set[str]]:
    """Package -> what its docstring lists, of the packages whose docstring lists anything."""
    found = {}
    for path in sorted(PACKAGE.rglob("__init__.py")):
        listed = _MAP_LINE.findall(ast.get_docstring(ast.parse(path.read_text()), clean=False) or "")
        if listed:
            assert len(listed) == len(set(listed)), path
            found[path.parent.relative_to(ROOT).as_posix()] = set(listed)
    return found


MAPS = package_maps()


def contents(folder: Path) -> set[str]:
    """The modules and packages of a package, as a map writes them."""
    modules = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
    return modules | {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}


def text(document: str) -> str:
    return (ROOT / document).read_text()


def prose(document: str) -> str:
    """Without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", text(document), flags=re.MULTILINE | re.DOTALL)


class TestPackages:
    def test_there_are_maps(self) -> None:
        assert len(MAPS) >= 4

    @pytest.mark.parametrize("package", MAPS)
    def test_docstring_lists_every_module_and_nothing_else(self, package: str) -> None:
        assert MAPS[package] == contents(ROOT / package)

    def test_design_lists_every_package(self) -> None:
        listed = re.findall(r"^ {4}(\S+/) {2,}\S", text("docs/design.md"), re.MULTILINE)
        assert listed
        assert [name for name in listed if not (ROOT / name).is_dir()] == []
        packages = {f"src/adafv/{name}" for name in contents(PACKAGE) if name.endswith("/")}
        assert packages <= set(listed)


class TestIndex:
    def test_lists_every_page_once_with_a_line_about_it(self) -> None:
        listed = re.findall(r"^\| \[[^\]]+\]\(([^/)]+\.md)\) \| \S.*\|$", text("docs/README.md"), re.MULTILINE)
        assert sorted(listed) == sorted(PAGES)

    def test_readme_leads_there(self) -> None:
        assert "docs/README.md" in _LINK.findall(text("README.md"))


class TestPaths:
    @pytest.mark.parametrize("document", DOCUMENTS)
    def test_files_that_are_named_are_there(self, document: str) -> None:
        """`core/scores.py` may leave out where it begins; a star, or <a word>, stands for any name."""
        named = re.findall(r"`([\w./*<>-]+\.(?:py|md))(?:::\w+)*`", prose(document))
        missing = []
        for name in named:
            pattern = re.sub(r"<\w+>", "*", name.removeprefix("../"))
            if not any(fnmatch(path, pattern) or fnmatch(path, f"*/{pattern}") for path in FILES):
                missing.append(name)
        assert missing == []

    def test_files_that_the_source_names_are_there(self) -> None:
        """In comments, docstrings and messages, with the folder in front."""
        missing = [
            (path.name, name)
            for path in sorted(PACKAGE.rglob("*.py"))
            for name in re.findall(r"\b(?:docs|tests|benchmarks|training)/[\w/]+\.(?:md|py)\b", path.read_text())
            if name not in FILES
        ]
        assert missing == []

    @pytest.mark.parametrize("document", DOCUMENTS)
    def test_modules_that_are_run_are_there(self, document: str) -> None:
        named = set(re.findall(r"python -m ((?:benchmarks|training)(?:\.\w+)+)", text(document)))
        assert [name for name in named if f"{name.replace('.', '/')}.py" not in FILES] == []

    @pytest.mark.parametrize("document", DOCUMENTS)
    def test_links_lead_somewhere(self, document: str) -> None:
        broken = []
        for link in _LINK.findall(prose(document)):
            if re.match(r"\w+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = ((ROOT / document).parent / name).resolve() if name else ROOT / document
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(link)
        assert broken == []


class TestReadme:
    def test_is_short(self) -> None:
        assert len(text("README.md").splitlines()) <= README_LINES

    def test_names_every_method(self) -> None:
        methods = text("README.md").partition("## Methods\n")[2].partition("\n## ")[0]
        table = [line for line in methods.splitlines() if line.startswith("|")]
        assert sorted(re.findall(r"`([\w-]+)`", "".join(table))) == every_method()

    def test_counts_the_families(self) -> None:
        """The table is the one that `adafv families` prints: tests/test_families.py."""
        table = re.search(r"^family +images .+\n((?:.+\n)+)\n", text("docs/families.md"), re.MULTILINE)
        assert table
        assert f"{len(table[1].splitlines())} families" in text("README.md")

    def test_lists_every_example(self) -> None:
        examples = {name for name in FILES if re.fullmatch(r"examples/\w+\.py", name)}
        assert set(re.findall(r"\((examples/\w+\.py)\)", text("README.md"))) == examples


class TestMethods:
    def test_the_document_lists_every_method(self) -> None:
        """At the front of a row each, but for `downsample`, which has a section of its own."""
        rows = re.findall(r"^\| (`.*?) \|", text("docs/methods.md"), re.MULTILINE)
        assert sorted([*re.findall(r"`([\w-]+)`", " ".join(rows)), "downsample"]) == every_method()


def every_method() -> list[str]:
    """As `adafv methods` shows them."""
    return sorted(line.split()[0] for line in run("methods").stdout.splitlines() if not line.startswith(" "))


def anchors(path: Path) -> set[str]:
    """Of the headings of a document, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
