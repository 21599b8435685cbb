"""The releases of transformers that adafv is tested with."""

OLDEST_TESTED = "5.18.0"
NEWEST_TESTED = "5.24.0"
