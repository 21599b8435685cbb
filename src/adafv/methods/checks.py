"""Checks of options that several methods have."""

from adafv.errors import OptionError


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise OptionError unless `value` is one of those."""
    if value not in known:
        raise OptionError(f"{name}={value!r}; known are: {', '.join(known)}")


def check_sign(sign: int) -> None:
    """Raise OptionError unless it is 1 or -1."""
    if sign not in (1, -1):
        raise OptionError(f"sign={sign!r}; give 1, or -1: tokens that are unlike the text count as relevant")


def check_budget_share(name: str, value: float) -> None:
    """Raise OptionError unless it is a share of the budget."""
    if not 0 <= value <= 1:
        raise OptionError(f"{name}={value}; give a share of the budget, 0 to 1")
