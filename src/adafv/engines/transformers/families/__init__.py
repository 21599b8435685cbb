"""Model families: what adafv must know about a class of models, one small file each.

Every module of this package that defines a `Family` is found by itself; adding a family touches one new file and its
row in the test table.
"""

from adafv.engines.transformers.families.base import (
    MODALITIES,
    CallWithImages,
    Encoded,
    Family,
    family_of,
    found_families,
    known_families,
)

__all__ = ["MODALITIES", "CallWithImages", "Encoded", "Family", "family_of", "found_families", "known_families"]
