"""What a command, the page and a server take where nobody says: in one place, so that it can be changed in one.

The library's own functions have no such default beyond the paper's method: `AdaFV(...)` is AdaFV.
"""

METHOD = "facet"
"""The method; docs/facet.md says why."""
PAPER = "adafv"
"""The method of the paper; what `--objective` and `--variant` are options of."""


def method_or_default(named: str | None, *of_the_paper: str | None) -> str:
    """The method that is named, or the default; the paper's, where one of its own options is given without a method."""
    if named is not None:
        return named
    return METHOD if all(option is None for option in of_the_paper) else PAPER
