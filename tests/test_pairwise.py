"""The selection that `make test` runs of the product family x mode x batch: as pytest collects it, and by itself."""

from pathlib import Path
from typing import Any

import pytest
from pairwise import EVERY_BATCH, Case, every_pair

OVER_FAMILIES = ["test_oracle.py", "test_ways_of_calling.py"]


class Collected:
    """A plugin that remembers the tests of the product that were collected."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
            case = Case.of(getattr(item, "originalname", item.name), parameters)
            if case is not None:
                self.cases.append(case)


def collected(name: str) -> list[Case]:
    found = Collected()
    arguments = ["--collect-only", "-qq", "--no-header", "-p", "no:cacheprovider", str(Path(__file__).parent / name)]
    assert pytest.main(arguments, plugins=[found]) == pytest.ExitCode.OK
    return found.cases


def pairs(cases: list[Case]) -> set[Any]:
    return set().union(*(case.pairs() for case in cases))


@pytest.mark.parametrize("name", OVER_FAMILIES)
def test_every_pair_is_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAFV_WHOLE", raising=False)
    selected = collected(name)
    monkeypatch.setenv("ADAFV_WHOLE", "1")
    product = collected(name)
    assert set(selected) < set(product)
    assert len(selected) == len(set(selected))
    assert pairs(selected) == pairs(product)
    # Some of the modes alone, told by their parts: were a mode less than it is, all pairs of it would still be there.
    modes = {case.mode for case in product}
    assert {case.mode for case in selected} == modes
    if name == "test_oracle.py":
        assert ("test_generate", ("mode", "beams")) in modes
        assert ("test_second_turn", ("cache", "static"), ("positions", "original")) in modes
        assert {case.function for case in product} > EVERY_BATCH
        assert len(selected) < len(product) / 2


def test_a_pair_that_is_left_out_is_missed() -> None:
    """The two tests above can fail: without any one of its tests, a smallest selection lacks a pair."""
    product = [Case("ask", family, ((mode, 1),), batch) for family in "abc" for mode in "mn" for batch in "xyz"]
    selected = every_pair(product)
    assert pairs(list(selected)) == pairs(product)
    alone = [case for case in selected if pairs(list(selected - {case})) != pairs(product)]
    assert alone


def test_a_batch_that_few_families_have() -> None:
    product = [Case("ask", "images", (mode,), "one") for mode in "mnop"]
    product += [Case("ask", "videos", (mode,), batch) for mode in "mnop" for batch in ("one", "video")]
    assert pairs(list(every_pair(product))) == pairs(product)
