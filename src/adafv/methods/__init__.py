"""Ways to choose the visual tokens that stay: one small file each.

Every module of this package that defines a `Method` is found by itself; adding a method touches one new file and its
test. `methods/base.py` is the whole interface.
"""

from adafv.core.tokens import Cut, Kept, Plan, VisualTokens
from adafv.methods.base import Method, found_methods, known_methods, method_named

__all__ = ["Cut", "Kept", "Method", "Plan", "VisualTokens", "found_methods", "known_methods", "method_named"]
