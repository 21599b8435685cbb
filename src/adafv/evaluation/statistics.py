"""Differences between two ways of answering the same questions, and claims about them.

**What is counted.** The same questions are answered in both ways, so differences are paired. Questions on one picture go
right and wrong together, so pictures are what is independent: all that follows counts pictures.

**The bound.** Of k pictures with n_c questions and summed differences S_c each, the mean difference per question is S / n.
Weights of the pictures are drawn at random, W ~ Dirichlet(1, ..., 1), with one picture more, as large as the largest, on
which everything went as badly as it can. The quantile of the weighted means is the bound: Gaffke's bound for the mean of
a bounded variable (2005, with Learned-Miller and Thomas, arXiv 1905.06208, who conjecture that it holds for every
distribution; no counterexample is known, and tests/test_statistics.py looks for one where it matters), with
pictures for values. Where a question is right or wrong and every picture has one, it is exactly Clopper's and
Pearson's; with many pictures it is as wide as the usual interval.
It has no way to become empty: where *no* answer changed on k pictures, the bound is 1 - 0.05^(1/k), three in k, and not 0 as
the variance of equal numbers would say. So 1 point with 95 % confidence takes 299 pictures at least.

**Several budgets.** They are tested from the largest down, each at the full level, up to the first that fails (a fixed
sequence: Maurer, Hothorn and Lehmacher 1995). The order is set by the number of tokens, not by what was measured, so
the chance of one wrong claim among all is at most 5 % however many budgets are looked at.

**Several methods.** Each starts with 5 % / their number; a method that has passed at all its budgets hands its share on to
the others (Holm 1979, for sequences: Bretz and others 2009). Again, one wrong claim among all in at most 5 %.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

CONFIDENCE = 0.95
DRAWS = 40_000
"""Of weights. The p-value 0.05 then has a standard error of 0.001."""
_ENOUGH = 1e6
"""Times the pictures there are; where so many more would not tell, it is said that more do not help."""


def interval(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float]:
    """Mean over all questions and half the width of its 95 % interval, from the variance between groups.

    The usual interval: good where there are many groups and some values differ. Claims are made by `Paired`.

    Args:
        groups: of each value, what it shares its luck with: its picture.
    """
    mean = sum(values) / len(values)
    deviations: dict[Hashable, float] = {}
    for value, group in zip(values, groups, strict=True):
        deviations[group] = deviations.get(group, 0.0) + value - mean
    clusters = len(deviations)
    variance = sum(deviation**2 for deviation in deviations.values()) * clusters / max(1, clusters - 1)
    return mean, 1.96 * math.sqrt(variance) / len(values)


def share_interval(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float]:
    """The same of shares, or of differences between them, from -1 to 1: that nothing varied is no certainty.

    Half the width is then that of the rule of three, 3 / groups: what never happened in n groups may happen in 3 of n.
    """
    mean, half = interval(values, groups)
    return mean, min(1.0, 3 / len(set(groups))) if half < 1e-9 else half


@dataclass(frozen=True)
class Paired:
    """Differences between two ways of answering, per question in [-1, 1], and the pictures that they stand on.

    Args:
        sums, sizes: [k] of each picture: its summed differences, and its questions.
        worst, best: what a difference can be at the extremes.
        seed: of the drawn weights.
    """

    sums: np.ndarray
    sizes: np.ndarray
    worst: float = -1.0
    best: float = 1.0
    seed: int = 0

    @classmethod
    def of(
        cls,
        differences: Sequence[float],
        groups: Sequence[Hashable],
        *,
        worst: float = -1.0,
        best: float = 1.0,
        seed: int = 0,
    ) -> "Paired":
        """Of one difference per question (other minus reference), each with its picture."""
        if not differences:
            raise ValueError("there is no difference to count; give at least one question")
        places: dict[Hashable, int] = {}
        numbers = [places.setdefault(group, len(places)) for group in groups]
        values = np.asarray(differences, dtype=np.float64)
        if values.min() < worst or values.max() > best:
            raise ValueError(f"differences lie in {values.min():g} to {values.max():g}, outside {worst:g} to {best:g}")
        sums, sizes = np.zeros(len(places)), np.zeros(len(places))
        np.add.at(sums, numbers, values)
        np.add.at(sizes, numbers, 1.0)
        # Thirds add up differently in another order; equal pictures are to be found as such.
        return cls(np.round(sums, 9), sizes, worst, best, seed)

    @property
    def mean(self) -> float:
        """Mean difference per question."""
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def pictures(self) -> int:
        return len(self.sums)

    def lower(self, confidence: float = CONFIDENCE) -> float:
        """The one-sided lower bound of the mean difference: no more is lost than this, with so much confidence."""
        return float(np.quantile(self._means(self.worst), 1 - confidence, method="lower"))

    def upper(self, confidence: float = CONFIDENCE) -> float:
        """The one-sided upper bound of the mean difference."""
        return float(np.quantile(self._means(self.best), confidence, method="higher"))

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """The two-sided interval of the mean difference, from two one-sided ones."""
        side = 1 - (1 - confidence) / 2
        return self.lower(side), self.upper(side)

    def p_value(self, loss: float) -> float:
        """Of the one-sided test of "`loss` or more is lost", 0 <= loss: small where that is hard to believe."""
        return float((self._means(self.worst) <= -loss).mean())

    def enough(self, loss: float, level: float) -> int | None:
        """About how many pictures would pass the test at this level, if they go on as they did.

        Where the true difference is what was measured, the chance to pass with so many is about a half.

        Returns:
            None where no number would: as much was lost as must not be, or more.
        """
        if -self.mean >= loss:
            return None
        return self._times(lambda times: float((self._means(self.worst, times) <= -loss).mean()) <= level)

    def enough_to_refute(self, loss: float, level: float) -> int | None:
        """The same for the opposite claim, that more than `loss` is lost; None where less was, or about so much."""
        if -self.mean <= loss:
            return None
        return self._times(lambda times: float((self._means(self.best, times) >= -loss).mean()) <= level)

    def mirrored(self) -> "Paired":
        """As if as many answers changed, and by as much, but as often for the better as for the worse."""
        return Paired(
            np.concatenate([self.sums, -self.sums]), np.concatenate([self.sizes] * 2), self.worst, self.best, self.seed
        )

    def _times(self, passes: Callable[[float], bool]) -> int | None:
        """Pictures at which `passes` begins to hold, given how often each of those that are there is met."""

        high = 1.0
        while not passes(high):
            high *= 2
            if high > _ENOUGH:
                return None
        low = high / 2 if high > 1 else 0.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (low, middle) if passes(middle) else (middle, high)
        return math.ceil(high * self.pictures)

    def _means(self, extreme: float, times: float = 1.0) -> np.ndarray:
        """[DRAWS] weighted mean differences, with one picture more at an extreme.

        Args:
            times: as if every picture had been met so often.
        """
        added, above, below = self._drawn if times == 1.0 else self._draw(times)
        largest = self.sizes.max()
        return (above + added * extreme * largest) / (below + added * largest)

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._draw(1.0)

    def _draw(self, times: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[DRAWS] each: the weight of the picture that is added, and the weighted sums of differences and of sizes.

        Dirichlet(1, ..., 1) are exponential numbers over their sum, and those of equal pictures add up to one gamma number.
        """
        kinds, counts = np.unique(np.stack([self.sums, self.sizes]), axis=1, return_counts=True)
        random = np.random.default_rng(self.seed)
        added = random.standard_exponential(DRAWS)
        above, below = np.zeros(DRAWS), np.zeros(DRAWS)
        for (total, size), count in zip(kinds.T, counts, strict=True):
            weight = random.standard_gamma(count * times, DRAWS)
            above += weight * total
            below += weight * size
        return added, above, below


@dataclass(frozen=True)
class Step:
    """One test of the sequence of a method."""

    p_value: float
    level: float
    """At which it was tested."""
    passed: bool


def fixed_sequences(p_values: Sequence[Sequence[float]], level: float = 1 - CONFIDENCE) -> list[list[Step | None]]:
    """Test several sequences of hypotheses so that one wrong claim among all has at most the chance `level`.

    Args:
        p_values: per method, in the order in which its budgets are tested.

    Returns:
        Per method and budget the test; None where it was not tested, as one before it failed.
    """
    found: list[list[Step | None]] = [[None] * len(sequence) for sequence in p_values]
    places = [0] * len(p_values)
    open_still = {number for number, sequence in enumerate(p_values) if sequence}
    while open_still:
        share = level / len(open_still)
        finished = set()
        for number in sorted(open_still):
            while places[number] < len(p_values[number]):
                p_value = p_values[number][places[number]]
                passed = p_value <= share
                found[number][places[number]] = Step(p_value, share, passed)
                if not passed:
                    break
                places[number] += 1
            else:
                finished.add(number)
        if not finished:
            break
        open_still -= finished
    return found
