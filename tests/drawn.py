"""How many examples hypothesis draws of a test: all before a release, a quarter in every run (other ones each time)."""

import os
from typing import Any

from hypothesis import settings


def examples(count: int, **options: Any) -> settings:
    """In the place of `settings(max_examples=count, deadline=None)`."""
    few = max(15, count // 4)
    return settings(max_examples=count if os.environ.get("ADAFV_WHOLE") else few, deadline=None, **options)
