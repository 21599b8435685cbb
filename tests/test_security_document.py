"""SECURITY.md promises what the source holds: its numbers are those of the source, and its tests are there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "SECURITY.md").read_text()
NAMES = re.findall(r"`(adafv(?:\.\w+)+\.[A-Z_]+)`", TEXT)
NUMBERS = re.findall(r"`(adafv(?:\.\w+)+\.[A-Z_]+)` = ([\d,]+)", TEXT)


def value(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    if module == "adafv.page.app":
        pytest.importorskip("gradio")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize(("name", "number"), NUMBERS)
def test_limits(name: str, number: str) -> None:
    assert value(name) == int(number.replace(",", ""))


def test_every_limit_has_its_number() -> None:
    without = set(NAMES) - {name for name, _ in NUMBERS}
    assert all(isinstance(value(name), tuple) for name in without)
    assert len(NUMBERS) > 10


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(tests/[\w./]+)`", TEXT))))
def test_tests_are_there(path: str) -> None:
    assert "def test_" in (ROOT / path).read_text()
