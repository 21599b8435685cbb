"""The guard of a refactoring says "the same" of the same code, and sees a kept token, an answer or a number that is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sameness import BUDGETS, CONFIGURATIONS, SERVERS, differences, main, plan, without_padding

CASE = {"kept": [[1, 2, 3], [4, 5]], "answers": [[7, 2], [8, 2]], "objective": [0.5, None], "certificate": [0.0, None]}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handful of questions, with every method's defaults."""
    file = tmp_path_factory.mktemp("sameness") / "before.json"
    assert main(["write", str(file), "--questions", "6"]) == 0
    return file


def test_the_same_code_is_the_same(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = tmp_path / "again.json"
    assert main(["write", str(again), "--questions", "6"]) == 0
    capsys.readouterr()
    assert main(["compare", str(written), str(again)]) == 0
    cases = json.loads(written.read_text())["cases"]
    kept = sum(len(case.get("kept", [])) for case in cases.values())
    assert kept > 20
    assert {len(case["kept"]) for case in cases.values()} > {1}  # batches as well as single prompts
    assert f"0 of {kept} kept sets differ" in capsys.readouterr().out


def test_another_search_is_not(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "split.json"
    assert main(["write", str(other), "--questions", "6", "--objective", "split"]) == 0
    capsys.readouterr()
    assert main(["compare", str(written), str(other)]) == 1
    printed = capsys.readouterr().out
    assert "objective: None -> split" in printed
    assert "kept 0: " in printed
    assert main(["compare", str(written), str(other), "--allow", "answers"]) == 1
    assert main(["compare", str(written), str(other), "--allow"]) == 0


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, {"kept": 0, "answers": 0, "numbers": 0}),
        ({"kept": [[1, 2, 4], [4, 5]]}, {"kept": 1, "answers": 0, "numbers": 0}),
        ({"kept": [[1, 2, 3]]}, {"kept": 1, "answers": 0, "numbers": 0}),
        ({"kept": [[4, 5], [1, 2, 3]]}, {"kept": 2, "answers": 0, "numbers": 0}),
        ({"answers": [[7, 2], [9, 2]]}, {"kept": 0, "answers": 1, "numbers": 0}),
        ({"objective": [0.500001, None]}, {"kept": 0, "answers": 0, "numbers": 0}),
        ({"objective": [0.500002, None]}, {"kept": 0, "answers": 0, "numbers": 1}),
        ({"certificate": [0.0, 0.0]}, {"kept": 0, "answers": 0, "numbers": 1}),
        ({"certificate": [float("nan"), None]}, {"kept": 0, "answers": 0, "numbers": 1}),
    ],
    ids=str,
)
def test_what_differs_is_counted(change: dict[str, Any], found: dict[str, int]) -> None:
    compared, lines = differences({"call": CASE}, {"call": CASE | change})
    assert {what: len(some) for what, some in lines.items()} == found
    assert compared == {"kept": 2, "answers": 2, "numbers": 4}


@pytest.mark.parametrize("after", [{}, {"call": {"refused": "BudgetError"}}], ids=["not there", "refused"])
def test_a_call_that_one_side_lacks_differs(after: dict[str, Any]) -> None:
    for one, two in (({"call": CASE}, after), (after, {"call": CASE})):
        _, lines = differences(one, two)
        # A number that is None stands for none, there as well as here.
        assert {what: len(some) for what, some in lines.items()} == {"kept": 2, "answers": 2, "numbers": 2}
    refusal = {"call": {"refused": "BudgetError"}}
    assert not any(differences(refusal, refusal)[1].values())
    assert differences(refusal, {"call": {"refused": "PromptError"}})[1]["kept"]


@pytest.mark.parametrize(("entry", "value"), [("questions", 7), ("engine", "vllm")])
def test_files_of_other_questions_do_not_compare(written: Path, tmp_path: Path, entry: str, value: Any) -> None:
    content = json.loads(written.read_text())
    content["header"][entry] = value
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    assert main(["compare", str(written), str(other)]) == 2


def test_500_questions_ask_with_everything() -> None:
    everything = {(label, keep) for label in CONFIGURATIONS for keep in BUDGETS}
    for name, batches in {"llava": 83, "llava-next": 28}.items():
        assert {pair for asked in plan([*CONFIGURATIONS], name, batches) for pair in asked} == everything
    assert {*SERVERS["llava"], *SERVERS["llava-next"]} <= {*CONFIGURATIONS}


def test_padding_is_no_part_of_an_answer() -> None:
    assert without_padding([5, 0, 2, 0, 0], 0) == [5, 0, 2]
    assert without_padding([5, 2], None) == [5, 2]
