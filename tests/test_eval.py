"""What `adafv eval` makes of results, and what it says where there is no lmms-eval; with it, see tests/lmms."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from command_line import run

from adafv.evaluation import harness
from adafv.evaluation.harness import UNPRUNED, Result
from adafv.evaluation.published import PUBLISHED, TASKS, published_for

NEXT = "llava-hf/llava-v1.6-vicuna-7b-hf"


def result(task: str, keep: str, value: float, *, pictures: int = 0, after: int = 0, **metrics: float) -> Result:
    named = {TASKS[task][1] if task in TASKS else "acc": value}
    return Result(task, keep, 10, {"other": 0.5} | named | metrics, {}, 1.0, pictures, 10 * after, after)


RESULTS = [
    result("gqa", UNPRUNED, 0.62),
    result("mme", UNPRUNED, 1500.0),
    result("gqa", "640", 0.60, pictures=10, after=6400),
    result("mme", "640", 1400.0, pictures=10, after=6000),
]


def test_published_means_are_those_of_the_numbers() -> None:
    """So that no number was mistyped: the paper's mean is that of the shares of its unpruned row."""
    whole, *pruned = (row for row in PUBLISHED[0].rows if row.scores)
    assert len(pruned) == 3
    for row in pruned:
        shares = [row.scores[task] / whole.scores[task] for task in TASKS]
        assert 100 * sum(shares) / len(shares) == pytest.approx(row.mean, abs=0.006)


def test_numbers_are_published_for_the_model_they_are_about() -> None:
    assert published_for(NEXT) == list(PUBLISHED)
    assert published_for(f"/models/{NEXT.partition('/')[2]}/") == list(PUBLISHED)
    assert published_for("llava-hf/llava-1.5-7b-hf") == []


def test_share_of_unpruned() -> None:
    assert harness.share_of_unpruned(RESULTS, UNPRUNED) == 100
    assert harness.share_of_unpruned(RESULTS, "640") == pytest.approx(50 * (60 / 62 + 14 / 15))
    assert harness.share_of_unpruned(RESULTS[2:], "640") is None


def test_table() -> None:
    lines = harness.as_text(RESULTS, published_for(NEXT), "Measured: a model").splitlines()
    assert lines[:4] == [
        "Measured: a model",
        "                              GQA   MME-P  mean %  kept",
        "unpruned                     62.0  1500.0   100.0   all",
        "keep 640                     60.0  1400.0    95.1   620",
    ]
    assert lines[5].startswith("Published, not measured here: arXiv 2501.09532")
    assert lines[6].split() == ["unpruned,", "2,880", "62.9", "1513.8", "100.0"]
    assert lines[7].split()[-3:] == ["62.0", "1509.4", "98.5"]


def test_json() -> None:
    found = json.loads(json.dumps(harness.as_json(RESULTS, published_for(NEXT), {"model": NEXT})))
    assert found["schema"] == harness.SCHEMA
    assert [(one["main_metric"], one["score"]) for one in found["measured"]] == [
        ("exact_match", 62.0),
        ("mme_perception_score", 1500.0),
        ("exact_match", 60.0),
        ("mme_perception_score", 1400.0),
    ]


def test_metrics_are_read_without_filters_and_errors() -> None:
    given = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "acc_stderr_clt,none": 0.2,
        "n,none": "N/A",
        "samples": 3,
    }
    assert harness._numbers(given, errors=False) == {"acc": 0.5}
    assert harness._numbers(given, errors=True) == {"acc": 0.1}


def test_results_in_files_are_taken_if_settings_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "gqa-640.json"
    path.write_text(json.dumps({"made_with": {"limit": 3}, "result": asdict(RESULTS[2])}))
    assert harness._known(path, {"limit": 3}) == RESULTS[2]
    assert harness._known(path, {"limit": None}) is None
    path.write_text("{")
    assert harness._known(path, {"limit": 3}) is None


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is installed here")
def test_without_lmms_eval() -> None:
    done = run("eval", "--tasks", "pope")
    assert done.exit_code == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: adafv eval runs lmms-eval, which is not installed here; run: pip install")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--keep", "0,8"], "keep"), (["--tasks", ","], "names no task"), (["--dtype", "int4"], "--dtype")],
)
def test_refused(arguments: list[str], message: str) -> None:
    done = run("eval", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
