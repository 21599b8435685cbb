"""Bounds and claims: right where they can be computed by hand, and wrong in at most 5 % of the data sets at the boundary."""

from collections.abc import Callable

import numpy as np
import pytest

from adafv.evaluation import statistics
from adafv.evaluation.statistics import Paired, fixed_sequences, interval, share_interval

Sample = tuple[np.ndarray, np.ndarray]


def singles(lost: int, gained: int, same: int) -> Paired:
    """One question a picture."""
    return Paired.of([-1.0] * lost + [1.0] * gained + [0.0] * same, range(lost + gained + same))


class TestBound:
    @pytest.mark.parametrize("pictures", [1, 10, 100, 299])
    def test_no_change_is_no_certainty(self, pictures: int) -> None:
        """The exact bound: with a chance of 5 % nothing happens on k pictures where it happens to 1 - 0.05^(1/k) of them."""
        unchanged = singles(0, 0, pictures)
        assert unchanged.mean == 0.0
        assert -unchanged.lower() == pytest.approx(1 - 0.05 ** (1 / pictures), rel=0.03)
        assert unchanged.upper() == pytest.approx(1 - 0.05 ** (1 / pictures), rel=0.03)

    def test_one_point_takes_299_pictures(self) -> None:
        assert singles(0, 0, 320).p_value(0.01) < 0.05
        assert singles(0, 0, 280).p_value(0.01) > 0.05
        assert singles(0, 0, 100).enough(0.01, 0.05) == pytest.approx(299, abs=9)

    def test_is_that_of_clopper_and_pearson_for_right_and_wrong(self) -> None:
        """3 of 50 lost: the one-sided upper bound is 0.1477 (a quantile of Beta(4, 47))."""
        assert -Paired.of([-1.0] * 3 + [0.0] * 47, range(50), best=0.0).lower() == pytest.approx(0.1477, abs=0.002)

    def test_is_the_usual_one_where_there_is_much(self) -> None:
        random = np.random.default_rng(1)
        values = random.choice([-1.0, 0.0, 1.0], 5000, p=[0.1, 0.82, 0.08]).tolist()
        mean, half = interval(values, range(5000))
        low, high = Paired.of(values, range(5000)).interval()
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.0008)

    def test_questions_on_one_picture_count_once(self) -> None:
        """Ten questions on each of 30 pictures that all go the same way are 30 observations, not 300."""
        values = [-1.0] * 10 + [0.0] * 290
        together = Paired.of(values, [number // 10 for number in range(300)])
        assert together.pictures == 30
        alone = singles(1, 0, 29)
        assert together.lower() == pytest.approx(alone.lower(), abs=0.003)
        assert together.lower() < Paired.of(values, range(300)).lower() - 0.05

    def test_same_seed_same_number(self) -> None:
        assert singles(2, 1, 60).interval() == singles(2, 1, 60).interval()

    def test_thirds_are_found_equal(self) -> None:
        """Sums of thirds differ in the last digit; were they taken apart, two thousand pictures would take minutes."""
        made = Paired.of([1 / 3, 1 / 3, -1 / 3, 0.1, 0.2, -0.3], ["a", "a", "a", "b", "b", "b"])
        assert made.sums.tolist() == [0.333333333, 0.0]

    def test_refuses_what_lies_outside(self) -> None:
        with pytest.raises(ValueError, match="outside"):
            Paired.of([0.5], ["a"], best=0.0)
        with pytest.raises(ValueError, match="at least one"):
            Paired.of([], [])


class TestEnough:
    def test_so_many_pass(self) -> None:
        few = singles(2, 2, 96)
        needed = few.enough(0.02, 0.05)
        assert needed is not None
        assert needed > 100
        times = needed / 100
        more = singles(round(2 * times), round(2 * times), round(96 * times))
        assert more.p_value(0.02) == pytest.approx(0.05, abs=0.01)

    def test_none_where_too_much_was_lost(self) -> None:
        assert singles(5, 0, 95).enough(0.01, 0.05) is None
        assert singles(5, 0, 95).enough_to_refute(0.01, 0.05) is not None
        assert singles(0, 0, 95).enough_to_refute(0.01, 0.05) is None

    def test_as_if_by_chance(self) -> None:
        mirrored = singles(5, 0, 95).mirrored()
        assert mirrored.mean == 0.0
        assert mirrored.enough(0.01, 0.05) is not None


def alike(pictures: int, lost: float, gained: float) -> Callable[[np.random.Generator], Sample]:
    """One question a picture."""

    def draw(random: np.random.Generator) -> Sample:
        chance = random.random(pictures)
        return np.where(chance < lost, -1.0, np.where(chance < lost + gained, 1.0, 0.0)), np.ones(pictures)

    return draw


def together(pictures: int, loss: float, gained: float, most: int) -> Callable[[np.random.Generator], Sample]:
    """One to `most` questions a picture, which all go the same way."""

    def draw(random: np.random.Generator) -> Sample:
        sizes = random.integers(1, most + 1, pictures).astype(float)
        chance = random.random(pictures)
        return np.where(chance < loss + gained, -sizes, np.where(chance < loss + 2 * gained, sizes, 0.0)), sizes

    return draw


def on_the_large_ones(pictures: int, loss: float) -> Callable[[np.random.Generator], Sample]:
    """Few pictures have many questions, and only these go wrong: most data sets hardly show it."""

    def draw(random: np.random.Generator) -> Sample:
        large = random.random(pictures) < 0.05
        sizes = np.where(large, 20.0, 1.0)
        wrong = large & (random.random(pictures) < loss * (0.05 * 20 + 0.95) / (0.05 * 20))
        return -sizes * wrong, sizes

    return draw


class TestClaims:
    """Data sets of which exactly as much is lost as must not be: the claim that less is lost is wrong there."""

    SETS = 400

    @pytest.mark.parametrize(
        ("loss", "draw"),
        [
            (0.01, alike(300, 0.01, 0.0)),  # the usual interval would have no width in 5 % of these
            (0.01, alike(1000, 0.01, 0.0)),
            (0.01, alike(300, 0.06, 0.05)),
            (0.05, alike(20, 0.05, 0.0)),
            (0.05, alike(60, 0.10, 0.05)),
            (0.05, alike(1000, 0.15, 0.10)),
            (0.05, together(100, 0.05, 0.1, 6)),
            (0.01, together(320, 0.01, 0.0, 6)),
            (0.05, on_the_large_ones(50, 0.05)),
            (0.05, on_the_large_ones(300, 0.05)),
        ],
    )
    def test_wrong_in_at_most_one_of_twenty(
        self, loss: float, draw: Callable[[np.random.Generator], Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(statistics, "DRAWS", 2000)
        wrong = sum(
            Paired(*draw(np.random.default_rng(number)), seed=number).p_value(loss) <= 0.05
            for number in range(self.SETS)
        )
        # As many as 5 % would give in all but one of a thousand such tests.
        assert wrong <= 0.05 * self.SETS + 3.1 * (0.05 * 0.95 * self.SETS) ** 0.5

    def test_the_usual_interval_would_fail(self) -> None:
        """So the test above can fail: 1 of 20 pictures lost, and a claim wherever mean plus 1.645 errors is below it."""
        wrong = 0
        for number in range(self.SETS):
            sums, _ = alike(20, 0.05, 0.0)(np.random.default_rng(number))
            mean, half = interval(sums.tolist(), range(20))
            wrong += mean - half * 1.645 / 1.96 > -0.05
        assert wrong > 0.3 * self.SETS

    def test_looking_at_many_budgets_is_no_better(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Five budgets, the largest of which is safe and the others lose exactly what must not be lost."""
        monkeypatch.setattr(statistics, "DRAWS", 1000)
        wrong = 0
        for number in range(300):
            random = np.random.default_rng(number)
            samples = [alike(400, 0.0, 0.0)(random), *(alike(400, 0.10, 0.05)(random) for _ in range(4))]
            p_values = [Paired(*sample, seed=number).p_value(0.05) for sample in samples]
            [steps] = fixed_sequences([p_values])
            wrong += any(step is not None and step.passed for step in steps[1:])
        assert wrong <= 0.05 * 300 + 3.1 * (0.05 * 0.95 * 300) ** 0.5


class TestSequences:
    def test_ends_at_the_first_that_fails(self) -> None:
        [steps] = fixed_sequences([[0.01, 0.04, 0.2, 0.001]])
        assert [step.passed if step else None for step in steps] == [True, True, False, None]
        assert [step.level for step in steps if step] == [pytest.approx(0.05)] * 3

    def test_methods_share_the_level(self) -> None:
        """Holm: what one has no use for any more goes to the others."""
        first, second = fixed_sequences([[0.02, 0.01], [0.04, 0.2]])
        assert [step.passed for step in first if step] == [True, True]
        assert [step.level for step in first if step] == [pytest.approx(0.025)] * 2
        assert [(step.passed, step.level) for step in second if step] == [
            (True, pytest.approx(0.05)),
            (False, pytest.approx(0.05)),
        ]

    def test_none_gets_more_while_another_is_open(self) -> None:
        first, second = fixed_sequences([[0.03], [0.03]])
        assert [step.passed for step in [*first, *second] if step] == [False, False]

    def test_nothing_to_test(self) -> None:
        assert fixed_sequences([]) == []
        assert fixed_sequences([[]]) == [[]]


def test_shares_that_never_differ_are_no_certainty() -> None:
    """The rule of three, by pictures; where something differs it is the usual interval."""
    assert share_interval([1.0] * 8, [0, 0, 1, 1, 2, 2, 3, 3]) == (1.0, 0.75)
    assert share_interval([0.0, 0.0], [0, 1]) == (0.0, 1.0)
    mixed = [1.0, 0.0, 1.0, 1.0]
    assert share_interval(mixed, range(4)) == interval(mixed, range(4))
