"""How many tokens stay behind each cut inside a language model, so that a budget is met."""

from collections.abc import Sequence
from itertools import pairwise

from adafv.errors import BudgetError

BUDGETS = ("last", "mean")
"""What K counts: tokens behind the last cut, or tokens per layer in the mean over all layers of the language model."""


def shrinking(depth: int, tokens: int, keep: int, layers: Sequence[int], budget: str = "last") -> list[int]:
    """Tokens that stay behind each cut; the same share of what is there goes at every one of them.

    Args:
        depth: L, decoder layers of the language model.
        tokens: N, of the image.
        keep: K, 0 < K < N.
        layers: of the cuts: from which on tokens are gone; ascending, 1 to L - 1.
        budget: "last": K tokens stay behind the last cut; "mean": the mean over the L layers is K or less, by less than one
            token.

    Returns:
        One number for each cut, at least 1, none above the one in front of it.

    Raises:
        BudgetError: the layers in front of the first cut alone take more than a mean of K.
    """
    count = len(layers)
    if budget == "last":
        inner = [max(keep, round(tokens * (keep / tokens) ** ((step + 1) / count))) for step in range(count - 1)]
        return [*inner, keep]
    spans = [end - start for start, end in pairwise((*layers, depth))]
    left = depth * keep - layers[0] * tokens  # tokens x layers behind the first cut
    if left < depth - layers[0]:
        least = -(-(layers[0] * tokens + depth - layers[0]) // depth)
        raise BudgetError(
            f"keep={keep} as the mean over {depth} layers cannot be met: the first {layers[0]} see all {tokens} tokens; give "
            f"at least {least}, or let keep count the tokens behind the last cut: budget=last"
        )

    def taken(share: float) -> float:
        return sum(span * max(1.0, tokens * share ** (step + 1)) for step, span in enumerate(spans))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) <= left else (low, middle)
    counts = [max(1, int(tokens * low ** (step + 1))) for step in range(count - 1)]
    spent = sum(span * number for span, number in zip(spans, counts, strict=False))
    counts.append(max(1, min(counts[-1] if counts else tokens, (left - spent) // spans[-1])))
    return counts
