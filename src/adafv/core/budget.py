"""How many visual tokens `keep` means."""

import math
import operator

from adafv.errors import BudgetError


def check_keep(keep: int | float) -> int | float:
    """Return `keep` as a plain int (tokens per image) or float (share of an image's tokens), or raise BudgetError."""
    if isinstance(keep, bool):
        raise BudgetError(f"keep={keep} is a truth value; give a number of tokens (64) or a share (0.1)")
    try:
        count = operator.index(keep)  # type: ignore[arg-type]
    except TypeError:
        pass
    else:
        if count < 1:
            raise BudgetError(f"keep={count}: at least one visual token per image must stay; give keep=1 or more")
        return count
    try:
        share = float(keep)
    except (TypeError, ValueError):
        raise BudgetError(f"keep={keep!r} is not a number; give a number of tokens (64) or a share (0.1)") from None
    if math.isnan(share) or not 0.0 < share <= 1.0:
        raise BudgetError(
            f"keep={share}: a share must lie above 0 and not above 1 (1.0 keeps everything); "
            "for a number of tokens give an int, such as keep=64"
        )
    return share


def tokens_to_keep(keep: int | float, tokens: int) -> int:
    """The number of tokens K that `keep` leaves of an image that has `tokens` (N) of them; 1 <= K <= N.

    An int is an upper bound on the tokens of the image, over all its crops: a smaller image keeps all that it has. A float
    is a share of N, rounded to the nearest token and never below one.

    Raises:
        BudgetError: `keep` is out of range, or not a number.
    """
    keep = check_keep(keep)
    if isinstance(keep, float):
        return max(1, math.floor(keep * tokens + 0.5))
    return min(keep, tokens)
