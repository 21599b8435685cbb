"""How many tokens stay: every way to say it means the same, for the library, the command line, the page and a server."""

import json
import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processors import chat, photo, processor, speaking_model

import adafv
from adafv import AdaFV, Pruner, compress
from adafv.core.budget import MOST_TOKENS, Budget
from adafv.errors import BudgetError

COUNTS = st.integers(1, MOST_TOKENS)
SHARES = st.floats(0.0, 1.0, exclude_min=True)
BUDGETS = st.builds(Budget, COUNTS | SHARES)
IMAGES = st.integers(1, 20_000)


@pytest.mark.parametrize(
    ("given", "keep"),
    [
        (64, 64),
        (1, 1),
        (0.1, 0.1),
        (1.0, 1.0),
        ("64", 64),
        ("+64", 64),
        ("1", 1),
        ("0.1", 0.1),
        (".5", 0.5),
        ("1e-3", 0.001),
        ("10%", 0.1),
        ("10 %", 0.1),
        ("12.5%", 0.125),
        ("12.3%", 0.123),
        ("100%", 1.0),
        ("1.0", 1.0),
        ("all", 1.0),
        ("All", 1.0),
        (Budget(64), 64),
        (numpy.int64(64), 64),
        (numpy.uint8(64), 64),
        (numpy.float64(0.1), 0.1),
        (numpy.float32(0.5), 0.5),
        (torch.tensor(64), 64),
        (torch.tensor(0.5), 0.5),
        (Fraction(1, 4), 0.25),
    ],
    ids=repr,
)
def test_understood(given: Any, keep: float) -> None:
    budget = Budget.of(given)
    assert (budget.keep, type(budget.keep)) == (keep, type(keep))


NONE = [
    *(0, -3, 0.0, -0.5, 1.01, 1.5, 64.0, math.nan, math.inf, -math.inf, True, False, None, 1j, b"1", [3], {}, (64,)),
    *("", " ", "0", "-1", "0.0", "1.5", "64.0", "0%", "101%", "-10%", "%", "inf", "nan", "ten", "64 tokens", "1e400"),
    *(" 10 %", "10% ", " 64", "64\n", "10  %", "10%%", "1_0", "0x10", "1/2", "\u0663", "\ud83d", "9" * 100, "e5", "."),
    *(MOST_TOKENS + 1, 10**400, 10**5000, -(10**5000), str(MOST_TOKENS + 1), "1e999999999%", "1e-999%"),
    *(numpy.True_, torch.tensor(True), torch.tensor([1, 2]), torch.tensor([0.1, 0.2]), numpy.array([0.1, 0.2])),
    *(numpy.float64("nan"), torch.tensor(0)),
]


def short(value: Any) -> str:
    """A value as part of a test's name."""
    return "huge" if isinstance(value, int) and abs(value) > 10**300 else ascii(value)[:24]


@pytest.mark.parametrize("given", NONE, ids=short)
@pytest.mark.parametrize("name", ["keep", "max_keep"])
def test_refused_with_what_would_be_one(given: Any, name: str) -> None:
    with pytest.raises(BudgetError, match=rf"^{name}=.*(64|1 or more|all)") as error:
        Budget.of(given, name)
    said = str(error.value)
    assert len(said) < 250
    assert "\n" not in said


def test_only_plain_numbers_inside() -> None:
    for value in ("64", numpy.int64(64), numpy.float64(0.1), True, None):
        with pytest.raises(BudgetError, match=r"use Budget\.of"):
            Budget(value)  # type: ignore[arg-type]
    for out_of_range in (0, 1.5, math.nan):
        with pytest.raises(BudgetError, match=r"^keep="):
            Budget(out_of_range)


@given(BUDGETS)
def test_what_is_written_is_read_back_exactly(budget: Budget) -> None:
    for written in (str(budget), budget.key, json.loads(json.dumps(budget.keep)), str(budget).replace(" ", "")):
        read = Budget.of(written)
        assert read == budget
        assert type(read.keep) is type(budget.keep)
    assert Budget.of(budget) is budget


@pytest.mark.parametrize(
    ("keep", "written"),
    [
        (64, "64"),
        (1, "1"),
        (1.0, "all"),
        (0.1, "10 %"),
        (0.125, "12.5 %"),
        (0.07, "7 %"),
        (1e-9, "1e-7 %"),
        (1e-6, "0.0001 %"),
    ],
)
def test_as_people_write_it(keep: float, written: str) -> None:
    assert str(Budget(keep)) == written


@given(BUDGETS, BUDGETS)
def test_equal_where_they_mean_the_same(one: Budget, other: Budget) -> None:
    same = type(one.keep) is type(other.keep) and one.keep == other.keep
    assert (one == other) is (one.key == other.key) is (str(one) == str(other)) is same
    assert hash(one) == hash(Budget(one.keep))
    assert len({one, Budget(one.keep), other}) == (1 if same else 2)


def test_one_token_is_not_everything() -> None:
    assert Budget(1) != Budget(1.0)
    assert {Budget(1): "one", Budget(1.0): "all"} == {Budget(1.0): "all", Budget(1): "one"}
    assert len({Budget(1), Budget(1.0)}) == 2
    assert Budget(64) != 64
    assert [Budget(1).keeps_all, Budget(1.0).keeps_all, Budget(MOST_TOKENS).keeps_all] == [False, True, False]


@given(COUNTS, IMAGES)
def test_a_number_is_an_upper_bound(count: int, available: int) -> None:
    assert Budget(count).tokens(available) == min(count, available)


@given(SHARES, IMAGES)
def test_a_share_is_rounded_to_the_nearest_and_never_to_none(share: float, available: int) -> None:
    kept = Budget(share).tokens(available)
    assert 1 <= kept <= available
    exact = Fraction(share) * available
    assert abs(kept - exact) <= Fraction(1, 2) + Fraction(1, 10**9) or (kept == 1 and exact < 1)


def test_shares_of_a_picture() -> None:
    assert [Budget(share).tokens(576) for share in (0.1, 0.05, 0.25, 1e-9, 1.0)] == [58, 29, 144, 1, 576]
    assert Budget.of(numpy.float32(0.5)).tokens(9) == 5  # a half is rounded up


@given(BUDGETS, BUDGETS, IMAGES)
def test_within(budget: Budget, most: Budget, available: int) -> None:
    if not most.keeps_all and type(budget.keep) is not type(most.keep):
        with pytest.raises(BudgetError, match="do not compare"):
            budget.within(most)
    elif budget.within(most):
        assert budget.tokens(available) <= most.tokens(available)
    else:
        assert most.keep < budget.keep


@given(BUDGETS)
def test_everything_is_within_all_and_each_within_itself(budget: Budget) -> None:
    assert budget.within(Budget(1.0))
    assert budget.within(budget)


@pytest.mark.parametrize("keep", ["10%", "all", "4", Budget(4), numpy.int64(4)], ids=str)
def test_the_library_takes_each(keep: Any) -> None:
    model = speaking_model("llava")
    assert AdaFV(keep).settings.budget == Pruner("saliency", keep).settings.budget == Budget.of(keep)
    assert AdaFV(keep).settings.keep == Budget.of(keep).keep
    made = processor("llava")
    inputs = made(images=photo(), text=made.apply_chat_template(chat("What is it?")), return_tensors="pt")
    record = compress(model, inputs, keep).record
    assert record is not None
    assert record.tokens_after == [Budget.of(keep).tokens(record.tokens_before[0])]


@pytest.mark.parametrize("keep", [0, 1.5, "many", True])
def test_the_library_refuses_in_the_same_words(keep: Any) -> None:
    with pytest.raises(BudgetError) as expected:
        Budget.of(keep)
    for attempt in (lambda: AdaFV(keep), lambda: Pruner("uniform", keep)):
        with pytest.raises(BudgetError) as error:
            attempt()
        assert str(error.value) == str(expected.value)


def test_a_budget_is_read_without_torch() -> None:
    """So that a command line answers a mistake at once."""
    program = "import sys; from adafv.core.budget import Budget; Budget.of('10%'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_exported() -> None:
    assert adafv.Budget is Budget
