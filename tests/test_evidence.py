"""What measures the bundled model: alignment, selections that were tried, curves of training."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import choosing
from training import alignment, curves
from training.alignment import MEASURES, area, areas, summary
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


def test_candidates_are_asked_beside_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    store = tmp_path / "answers.jsonl"
    arguments = ["--count", "40", "--part", "all", "--keep", "10%", "--methods", "adafv", "a-product", "--no-photos"]
    monkeypatch.setattr(sys, "argv", ["choosing", *arguments, "--batch", "40", "--store", str(store)])
    choosing.main()
    shown = capsys.readouterr().out
    assert "200 of 200 answers" in shown
    [row] = [line for line in shown.splitlines() if line.startswith("| a-product |")]
    assert "±" in row
    choosing.main()  # nothing is asked twice
    again = capsys.readouterr().out
    assert again.count("of 200 answers") == 1
    assert row in again


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
