"""Which tests of the product family x mode x batch are run: every pair of two of them, not every triple.

A mode is a test function with all its parameters but the batch: forward in either positions, one way of generating, a
second turn with one kind of cache. Each family meets each of its modes once, with a batch that rotates from mode to mode
and from family to family; then what is missing is added, so that each family meets each batch and each mode each batch.
test_pairwise.py holds the selection to that.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

EVERY_FAMILY = {"test_forward", "test_generate"}
"""The functions that a slice asks of every family; see `slice_of`."""

AXES = {"any_family", "batch", "images"}
"""The parameters of a test that are no mode; `images` are batches, too."""


@dataclass(frozen=True)
class Case:
    """One test of the product."""

    function: str
    family: str
    others: tuple[Hashable, ...]
    """Its parameters that are neither family nor batch."""
    batch: str | None
    """None where the function has no batch."""

    @classmethod
    def of(cls, function: str, parameters: dict[str, Any]) -> "Case | None":
        """None: a test that does not run over the families."""
        if "any_family" not in parameters:
            return None
        others = tuple((name, str(parameters[name])) for name in sorted(parameters) if name not in AXES)
        batch = parameters.get("batch", parameters.get("images"))
        return cls(function, parameters["any_family"].name, others, None if batch is None else str(batch))

    @property
    def mode(self) -> tuple[Hashable, ...]:
        return self.function, *self.others

    def pairs(self) -> set[Any]:
        """(family, mode), (family, batch), (mode, batch); without a batch the first alone."""
        named = {"family": self.family, "mode": self.mode, "batch": self.batch}
        return set(combinations([(axis, value) for axis, value in named.items() if value is not None], 2))


def every_pair(product: Sequence[Case]) -> set[Case]:
    """A selection in which every pair of the product occurs.

    Args:
        product: as pytest collects it; a family may lack some of the batches (those with videos).
    """
    functions: dict[str, dict[str, list[Case]]] = {}
    for case in product:
        functions.setdefault(case.function, {}).setdefault(case.family, []).append(case)
    chosen: set[Case] = set()
    for number, families in enumerate(functions.values()):
        for place, cases in enumerate(families.values()):
            modes = list(dict.fromkeys(case.mode for case in cases))
            batches = list(dict.fromkeys(case.batch for case in cases))
            wanted = {(mode, batches[(i + number + place) % len(batches)]) for i, mode in enumerate(modes)}
            chosen |= {case for case in cases if (case.mode, case.batch) in wanted}
    # A family may have missed a batch, and where few have one, as those of videos, a mode may have. The first function of a
    # file comes first here; in test_oracle.py that is a cheap one.
    missing = set().union(*(case.pairs() for case in product)).difference(*(case.pairs() for case in chosen))
    for case in product:
        if missing & case.pairs():
            chosen.add(case)
            missing -= case.pairs()
    return chosen


def every_pair_of(product: Sequence[Mapping[str, Hashable]], together: int = 2) -> list[int]:
    """Of a test's parameters (name: value), the places of as few as a greedy choice finds with every pair of two values.

    Args:
        together: 2; or 1, for every value alone.
    """
    found = [set(combinations(sorted(parameters.items(), key=str), together)) for parameters in product]
    missing, chosen = set[Any]().union(*found), []
    while missing:
        best = max(range(len(found)), key=lambda place: len(found[place] & missing))
        chosen.append(best)
        missing -= found[best]
    return chosen


def slice_of(product: Sequence[Case]) -> set[Case]:
    """A thin selection, for another release of the same stock models: every family, every mode and every batch occur.

    Each family runs forward and generates once, in modes and with batches that rotate; each other mode is run once, in
    families that rotate.

    Args:
        product: as pytest collects it.
    """
    modes: dict[str, dict[tuple[Hashable, ...], list[Case]]] = {}
    for case in product:
        modes.setdefault(case.function, {}).setdefault(case.mode, []).append(case)
    chosen: set[Case] = set()
    turn = 0
    for function, of_mode in modes.items():
        if function in EVERY_FAMILY:
            names = list(of_mode)
            families = list(dict.fromkeys(case.family for cases in of_mode.values() for case in cases))
            for place, family in enumerate(families):
                cases = [case for case in of_mode[names[place % len(names)]] if case.family == family]
                chosen.add(
                    cases[place // len(names) % len(cases)]
                    if cases
                    else next(case for case in product if (case.function, case.family) == (function, family))
                )
            of_mode = {mode: cases for mode, cases in of_mode.items() if not chosen.intersection(cases)}
        for cases in of_mode.values():
            chosen.add(cases[turn % len(cases)])
            turn += 7  # neither a number of batches nor of families
    missing = {(axis, getattr(case, axis)) for case in product for axis in ("family", "batch")}
    for case in (*chosen, *product):
        mine = {("family", case.family), ("batch", case.batch)}
        if missing & mine:
            chosen.add(case)
            missing -= mine
    return chosen
