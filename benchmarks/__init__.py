"""Benchmarks of adafv, run from the root of the repository: `python -m benchmarks.search`."""
