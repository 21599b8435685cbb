"""The selection that `make test` runs of the product family x mode x batch: as pytest collects it, and by itself."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from pairwise import EVERY_FAMILY, Case, every_pair, every_pair_of, slice_of

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
    monkeypatch.delenv("ADAFV_SLICE", raising=False)
    selected = collected(name)
    monkeypatch.setenv("ADAFV_WHOLE", "1")
    product = collected(name)
    is_a_slice(slice_of(product), product)
    assert set(selected) < set(product)
    assert len(selected) == len(set(selected))
    assert pairs(selected) == pairs(product)
    # Some of the modes alone, told by their parts: were a mode less than it is, all pairs of it would still be there.
    modes = {case.mode for case in product}
    assert {case.mode for case in selected} == modes
    if name == "test_oracle.py":
        assert ("test_generate", ("mode", "beams")) in modes
        assert ("test_second_turn", ("cache", "static"), ("positions", "original")) in modes
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


def test_pairs_of_any_parameters() -> None:
    product = [dict(zip("abc", values)) for values in itertools.product(range(2), range(3), range(4))]
    chosen = [product[place] for place in every_pair_of(product)]
    for one, two in itertools.combinations("abc", 2):
        assert {(case[one], case[two]) for case in chosen} == {(case[one], case[two]) for case in product}
    assert 12 <= len(chosen) < 16


def test_each_value_of_any_parameters() -> None:
    product = [dict(zip("ab", values)) for values in itertools.product(range(3), range(5))]
    chosen = [product[place] for place in every_pair_of(product, together=1)]
    assert {case["a"] for case in chosen} == set(range(3))
    assert {case["b"] for case in chosen} == set(range(5))
    assert len(chosen) == 5


def is_a_slice(selected: set[Case], product: list[Case]) -> None:
    assert selected < set(product)
    for value in ("family", "mode", "batch"):
        assert {getattr(case, value) for case in selected} == {getattr(case, value) for case in product}
    of_every_family = {(case.function, case.family) for case in product if case.function in EVERY_FAMILY}
    assert of_every_family <= {(case.function, case.family) for case in selected}
    assert len(selected) < len(product) / 10


def test_a_slice_of_few() -> None:
    product = [Case("test_forward", family, (mode,), batch) for family in "abc" for mode in "mn" for batch in "xyz"]
    product += [Case("ask", family, (mode,), None) for family in "ab" for mode in "opqrs"]
    selected = slice_of(product)
    assert {case.family for case in selected if case.function == "test_forward"} == set("abc")
    assert {case.mode for case in selected} == {case.mode for case in product}
    assert {case.batch for case in selected} == {*"xyz", None}
    assert len(selected) <= 3 + 5 + 1
