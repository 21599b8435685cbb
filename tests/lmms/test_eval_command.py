"""`adafv eval` and `lmms-eval --model adafv`, as commands."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from drawn_tasks import QUESTIONS, Drawn
from typer.testing import CliRunner

from adafv.asking.session import Session
from adafv.cli import app
from adafv.evaluation import harness


def adafv(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", *arguments])


def run(drawn: Drawn, *arguments: str) -> Any:
    done = adafv("--include", str(drawn.folder), "--batch", "4", "--device", "cpu", *arguments)
    assert done.exit_code == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def measured(drawn: Drawn, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Both kinds of tasks with two budgets: what was printed as JSON, and the folder of results."""
    folder = tmp_path_factory.mktemp("results")
    tasks = ["--tasks", "drawn_generate,drawn_choose", "--keep", "8,25%"]
    return json.loads(run(drawn, *tasks, "--output", str(folder), "--json").stdout), folder


def test_every_budget_and_task(measured: tuple[Any, Path], session: Session, drawn: Drawn) -> None:
    found, folder = measured
    runs = {(one["task"], one["keep"]): one for one in found["measured"]}
    assert set(runs) == {
        (task, keep) for task in ("drawn_generate", "drawn_choose") for keep in ("unpruned", "8", "25%")
    }
    for (task, keep), one in runs.items():
        assert one["documents"] == QUESTIONS
        assert one["main_metric"] == ("acc" if task == "drawn_choose" else "exact_match")
        assert one["score"] == one["metrics"][one["main_metric"]]
        # Nine questions, of which one shows two pictures and one none.
        assert one["pictures"] == (0 if keep == "unpruned" else QUESTIONS)
        assert one["tokens_after"] == {"unpruned": 0, "8": 8, "25%": 36}[keep] * one["pictures"]
    assert found["share_of_unpruned"]["unpruned"] == pytest.approx(100)
    assert found["published"] == []
    assert len(list(folder.glob("*.json"))) == 6


def test_answers_are_adafvs_own(measured: tuple[Any, Path], session: Session, drawn: Drawn) -> None:
    from test_in_lmms_eval import own_answers, pruner_for

    found, _ = measured
    for keep in ("8", "25%"):
        answers = own_answers(session, drawn, pruner_for(session, keep))
        right = sum(one == other for one, other in zip(answers, drawn.answers, strict=True))
        [one] = [one for one in found["measured"] if (one["task"], one["keep"]) == ("drawn_generate", keep)]
        assert one["score"] == pytest.approx(right / QUESTIONS)


def test_what_is_finished_is_not_run_again(
    measured: tuple[Any, Path], drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, folder = measured
    (folder / "drawn_choose-8.json").unlink()
    ran = []
    own = harness.Harness.run

    def noted(self: Any, model: Any, task: str, keep: str, *others: Any) -> Any:
        ran.append((task, keep))
        return own(self, model, task, keep, *others)

    monkeypatch.setattr(harness.Harness, "run", noted)
    tasks = ["--tasks", "drawn_generate,drawn_choose", "--keep", "8,25%", "--output", str(folder), "--json"]
    again = json.loads(run(drawn, *tasks).stdout)
    assert ran == [("drawn_choose", "8")]
    assert [one["score"] for one in again["measured"]] == [one["score"] for one in found["measured"]]
    ran.clear()
    run(drawn, "--tasks", "drawn_choose", "--keep", "8", "--output", str(folder), "--limit", "2")
    assert ran == [("drawn_choose", "unpruned"), ("drawn_choose", "8")]


def test_the_table(drawn: Drawn) -> None:
    done = run(drawn, "--tasks", "drawn_generate", "--keep", "8", "--limit", "3")
    lines = done.stdout.splitlines()
    assert "the first 3 questions" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["unpruned", "keep"]
    assert lines[3].split()[-1] == "8"
    assert "Published" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "drawn_genrate"], "did you mean drawn_generate"),
        (["--tasks", "mmvet"], "OPENAI_API_KEY"),
        (["--keep", "0"], "keep"),
        (["--keep", ","], "no budget"),
        (["--method", "adaf"], "did you mean adafv"),
        (["--include", "nowhere"], "no such folder"),
    ],
)
def test_refused(drawn: Drawn, arguments: list[str], message: str) -> None:
    rest = [] if arguments[0] == "--include" else ["--include", str(drawn.folder)]
    given = [] if arguments[0] == "--tasks" else ["--tasks", "drawn_generate"]
    done = adafv(*arguments, *given, *rest)
    assert done.exit_code == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


def test_data_that_cannot_be_had(drawn: Drawn) -> None:
    (drawn.folder / "drawn_nowhere.yaml").write_text(
        (drawn.folder / "drawn_generate.yaml").read_text().replace("task: drawn_generate", "task: drawn_nowhere")
        .replace(str(drawn.folder / "data"), str(drawn.folder / "nowhere"))
    )  # fmt: skip
    done = adafv("--tasks", "drawn_nowhere", "--include", str(drawn.folder))
    assert done.exit_code == 1
    assert "cannot run the task drawn_nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_lmms_evals_own_command(drawn: Drawn, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lmms_eval", "--model", "adafv", "--model_args", "pretrained=bundled,keep=8"]
    tasks = ["--tasks", "drawn_generate", "--include_path", str(drawn.folder), "--batch_size", "4", "--device", "cpu"]
    writing = ["--output_path", str(tmp_path), "--log_samples", "--limit", "3"]
    done = subprocess.run(
        [*command, *tasks, *writing], capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = tmp_path.rglob("*_results.json")
    assert "exact_match,none" in json.loads(results.read_text())["results"]["drawn_generate"]
