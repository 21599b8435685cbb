"""What measures the bundled model: alignment, accuracy against budget, curves of training."""

import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from adafv.evaluation.world.details import DETAIL_KINDS
from adafv.evaluation.world.questions import QUESTION_KINDS
from adafv.evaluation.world.scenes import HELD_OUT
from benchmarks import alignment, budgets, details
from benchmarks.alignment import MEASURES, area, areas, summary
from benchmarks.budgets import Answerer, Asked, held_out_questions, majority, report, run
from training import curves
from training.stages import Pupil

numbers = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8)


class TestArea:
    @given(numbers, numbers)
    def test_counts_pairs(self, positive: list[float], negative: list[float]) -> None:
        won = sum((one > two) + 0.5 * (one == two) for one in positive for two in negative)
        assert area(torch.tensor(positive), torch.tensor(negative)) == pytest.approx(
            won / (len(positive) * len(negative))
        )

    def test_interval_counts_scenes(self) -> None:
        """The same four areas say less where they come from two scenes."""
        apart = summary([(0, 0.2), (1, 0.2), (2, 0.8), (3, 0.8)])
        together = summary([(0, 0.2), (0, 0.2), (1, 0.8), (1, 0.8)])
        assert apart.startswith("0.500 ± ")
        assert float(apart.split()[-1]) < float(together.split()[-1])

    def test_untrained_words_find_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(alignment, "sample_scene", partial(alignment.sample_scene, photos=False))
        found = areas(Pupil().eval(), scenes=12)
        assert set(MEASURES) <= found.keys()
        mean = sum(value for _, value in found["word"]) / len(found["word"])
        assert 0.3 < mean < 0.7


class TestHeldOutQuestions:
    def test_all_kinds_alike_and_always_the_same(self) -> None:
        asked = held_out_questions(240, photos=False)
        assert asked == held_out_questions(240, photos=False)
        counts = Counter(question.kind for _, question in asked)
        assert set(counts) == set(QUESTION_KINDS)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert all(scene.split == "test" for scene, _ in asked)

    def test_every_scene_holds_a_pair_that_training_never_showed(self) -> None:
        for scene, _ in held_out_questions(50, photos=False):
            kinds = {thing.kind for thing in scene.things}
            assert any(pair <= kinds for pair in HELD_OUT)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer()


class TestBudgets:
    def test_a_budget_of_everything_changes_no_answer(self, answerer: Answerer) -> None:
        questions = held_out_questions(40, photos=False)
        right = run(questions, answerer, [("adafv (joint)", 1.0), ("random", 0.05)])
        assert right["adafv (joint) @ 1.0"] == right["full"]
        assert {len(found) for found in right.values()} == {40}
        # Told apart from a model that does not look: blanking the picture, or nearly all of it, costs answers.
        assert sum(right["full"]) > sum(right["blank"]) + 10
        assert sum(right["full"]) > sum(right["random @ 0.05"])

    def test_majority_is_the_best_that_one_answer_a_kind_can_do(self) -> None:
        asked = [Asked(n, "colour", "", answer, False) for n, answer in enumerate(("red", "red", "blue"))]
        asked.append(Asked(3, "presence", "", "yes", False))
        assert majority(asked) == [True, True, False, True]

    def test_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        arguments = ["--questions", "24", "--keep", "0.1", "--only", "adafv (joint)", "saliency", "--processes", "1"]
        written = tmp_path / "answers.json"
        monkeypatch.setattr(
            sys, "argv", ["budgets", *arguments, "--no-photos", "--dtype", "bfloat16", "--json", str(written)]
        )
        budgets.main()
        shown = capsys.readouterr().out
        assert "24 questions about test scenes" in shown
        assert "saliency" in shown
        assert written.exists()

    def test_report_pairs_against_saliency(self) -> None:
        asked = [Asked(n, kind, "", "yes", n % 2 == 0) for n, kind in enumerate([*QUESTION_KINDS] * 2)]
        everything = [True] * len(asked)
        right = {
            "full": everything,
            "blank": everything,
            "majority": everything,
            "adafv (joint) @ 0.1": everything,
            "saliency @ 0.1": [False] * len(asked),
        }
        console = Console(width=160, record=True)
        report(asked, right, console)
        assert "+100.0 ± 0.0" in console.export_text()


class TestDetails:
    def test_all_kinds_alike_and_always_the_same(self) -> None:
        asked = details.detailed_questions(100, photos=False)
        assert asked == details.detailed_questions(100, photos=False)
        counts = Counter(question.kind for _, question in asked)
        assert set(counts) == {*QUESTION_KINDS, *DETAIL_KINDS}
        assert set(counts.values()) == {10}
        assert all(scene.split == "test" for scene, _ in asked)

    @pytest.mark.release  # seventeen seconds; test_command runs them all on ten questions
    def test_each_run_sees_what_it_is_named_after(self) -> None:
        """On plain scenes, where the bundled model needs no crops; a blank picture tells it nothing."""
        questions = held_out_questions(20, photos=False)
        right = details.measure(questions, None, 1)
        assert set(right) == set(details.RUNS)
        assert {len(found) for found in right.values()} == {20}
        for name in ("single view", "crops", "thumbnail"):
            assert sum(right[name]) > sum(right["blank"]) + 4

    def test_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        written = tmp_path / "details.json"
        arguments = ["--questions", "10", "--plain", "0", "--processes", "1", "--no-photos", "--json", str(written)]
        monkeypatch.setattr(sys, "argv", ["details", *arguments])
        details.main()
        shown = capsys.readouterr().out
        assert "scenes with details: 10 questions" in shown
        assert "thumbnail alone" in shown
        assert written.exists()


def test_curves_of_the_shipped_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["curves", str(Path(curves.__file__).parent / "shipped-run")])
    curves.main()
    shown = capsys.readouterr().out
    assert "together: 1450 steps" in shown
    assert "tower: 1400 steps" in shown


def test_curves_of_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path)])
    with pytest.raises(SystemExit, match="train first"):
        curves.main()


def test_a_curve_rises_where_its_values_rise() -> None:
    assert curves.curve([0.0, 1.0, 2.0, 3.0]) == "▁▃▆█"
    assert len(curves.curve([1.0] * 500)) == curves.WIDTH
