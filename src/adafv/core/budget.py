"""How many visual tokens stay: the one type of a budget, and the one reading of what people write for it."""

import math
import operator
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from adafv.errors import BudgetError

MOST_TOKENS = 2**31 - 1
"""A number of tokens above is a mistake; one up to it is stored in any integer on its way to a worker."""

_LONGEST = 60
"""Letters of a budget that is text; every number that means one is shorter."""
_WAYS = 'give a number of tokens (64), a share (0.1 or "10%"), or "all"'
_SHARE = 'a share lies above 0 and not above 1 (100 %, or "all"); a number of tokens is written without a point (64)'
_NUMBER = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]{1,3})?)( ?%)?")
_WHOLE = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True, eq=False)
class Budget:
    """How many tokens of an image stay.

    A number of tokens is an upper bound on those of an image over all its crops: an image that has fewer keeps all. A share
    is one of the image's tokens, rounded to the nearest and never below one.

    Two budgets are equal where they mean the same for every image: one token (1) is not everything (1.0).
    """

    keep: int | float
    """A number of tokens (int, 1 or more), or a share of them (float, above 0, up to 1.0)."""

    def __post_init__(self) -> None:
        if type(self.keep) not in (int, float):
            raise BudgetError(f"a Budget holds a plain int or float, not {_shown(self.keep)}; use Budget.of")
        _plain(self.keep, "keep")

    @classmethod
    def of(cls, value: "Budget | int | float | str", name: str = "keep") -> "Budget":
        """Read what somebody gave: 64, 0.1, 1.0, integers and floats of NumPy and PyTorch, "64", "0.1", "10%", "all".

        Args:
            name: of the option, for the message.

        Raises:
            BudgetError: it is none of these, or keeps nothing; the message says what would be one.
        """
        return value if isinstance(value, Budget) else cls(_plain(value, name))

    @property
    def keeps_all(self) -> bool:
        """Whether every token of any image stays; 1.0 does, 1 does not."""
        return isinstance(self.keep, float) and self.keep == 1.0

    def tokens(self, available: int) -> int:
        """K for an image of `available` (N) tokens; 1 <= K <= N."""
        if isinstance(self.keep, float):
            return max(1, math.floor(self.keep * available + 0.5))
        return min(self.keep, available)

    def within(self, most: "Budget") -> bool:
        """Whether this is none above `most`, whatever the size of an image.

        Raises:
            BudgetError: one is a number and the other a share, which do not compare.
        """
        if most.keeps_all:
            return True
        if type(self.keep) is not type(most.keep):
            raise BudgetError(f"{self} and {most} do not compare; give two numbers of tokens, or two shares")
        return self.keep <= most.keep

    @property
    def key(self) -> str:
        """The same as text that no other budget has, for names in caches and for JSON; `of` reads it back exactly."""
        return repr(self.keep)

    def __str__(self) -> str:
        """As people write it: "64", "10 %", "all"; `of` reads it back exactly."""
        if self.keeps_all:
            return "all"
        if isinstance(self.keep, int):
            return str(self.keep)
        percent = Decimal(repr(self.keep)).scaleb(2).normalize()
        return f"{percent:{'f' if percent > Decimal('1e-6') else 'e'}} %"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Budget) and self.key == other.key

    def __hash__(self) -> int:
        return hash((Budget, self.key))


def _plain(value: Any, name: str) -> int | float:
    """`value` as a number that is in range."""
    given = f"{name}={_shown(value)}"
    if isinstance(value, str):
        value = _read(value, given)
    # A truth value of NumPy would be the share 1.0 below, one of PyTorch the number 1.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        raise BudgetError(f"{given} is a truth value; {_WAYS}")
    try:
        count = operator.index(value)
    except TypeError:
        pass
    else:
        if count < 1:
            raise BudgetError(f"{given}: at least one visual token per image must stay; give 1 or more")
        if count > MOST_TOKENS:
            raise BudgetError(f'{given}: no image has so many visual tokens; "all" keeps every one')
        return count
    try:
        if isinstance(value, (bytes, bytearray)):
            raise TypeError
        share = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last one of tensors that hold many
        raise BudgetError(f"{given} is not a budget; {_WAYS}") from None
    if not 0.0 < share <= 1.0:  # nor is NaN
        raise BudgetError(f"{given}: {_SHARE}")
    return share


def _read(text: str, given: str) -> int | float:
    """The number that is written, of any size; a decimal fraction as exactly as a float can be."""
    written = text.lower()
    if written == "all":
        return 1.0
    found = _NUMBER.fullmatch(written) if len(written) <= _LONGEST else None
    if found is None:
        raise BudgetError(f"{given} is not a budget; {_WAYS}")
    number, percent = found.groups()
    if percent is None and _WHOLE.fullmatch(number):
        return int(number)
    return float(Decimal(number).scaleb(-2) if percent else number)


def _shown(value: Any) -> str:
    """For a message, which must stay short."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python writes
        text = f"a number of type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 20]}... ({len(text)} characters)"
