"""Shared settings: no network, quiet transformers, one thread (small models are slower with two that wait for each other)."""

import gc
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
sys.path.insert(0, str(Path(__file__).parent))

import forking
import pytest
from pairwise import Case, every_pair, every_pair_of, slice_of

LONGEST = [
    "oracle",
    "ways_of_calling",
    "page",
    "page_attacks",
    "cli",
    "accuracy",
    "greedy_methods",
    "core",
    "training",
    "every_family",
    "modes",
    "testbed",
    "contract",
    "merging_methods",
    "inside_methods",
    "encoded",
    "finetuning",
    "processors",
]
"""Files that take longest. They are begun first, so that no process is left with one of them when the others are done."""


def pytest_configure(config: pytest.Config) -> None:
    """The process that hands tests out to others (pytest-xdist) collects none, so it is spared ten seconds of imports.

    Until all is collected nobody looks for garbage: imports leave none, and looking through them takes six seconds more.
    """
    gc.disable()
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        config.option.tx = forking.workers(config.option.tx)
        forking.start_parent(*forking.FOR_WORKERS)
    else:
        import fixtures

        config.pluginmanager.register(fixtures, "adafv fixtures")


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage, by a test neither, looks through it again."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Its plugin imports hypothesis, for two seconds, to sum up what it did, if only to say that it did nothing."""
    if "hypothesis" not in sys.modules:
        session.config.pluginmanager.unregister(name="hypothesispytest")


def pytest_unconfigure() -> None:
    forking.end()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A family without videos is not asked about videos; that it refuses them is in test_families.py.

    Of the product family x mode x batch, every pair is run, not every triple: see pairwise.py. With ADAFV_WHOLE=1
    (`make test-all`) the product is, as before a release; and so is what is marked "release". With ADAFV_SLICE=1 every
    family, every mode and every batch is run once, for another release of transformers.
    """

    def exists(parameters: dict[str, Any]) -> bool:
        row = parameters.get("any_family")
        return row is None or row.videos is not None or "video" not in str(parameters.get("batch", ""))

    def case(item: pytest.Item) -> Case | None:
        return Case.of(getattr(item, "originalname", item.name), parameters_of(item))

    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    items[:] = [item for item in items if exists(parameters_of(item))]
    if os.environ.get("ADAFV_WHOLE"):
        return
    items[:] = [item for item in items if item.get_closest_marker("release") is None]
    marked: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        for mark, together in (("pairs", 2), ("each", 1)):
            if item.get_closest_marker(mark):
                marked.setdefault((item.nodeid.partition("[")[0], together), []).append(item)
    for (_, together), same in marked.items():
        named = [{name: repr(value) for name, value in parameters_of(item).items()} for item in same]
        left_out = {id(item) for item in same} - {id(same[place]) for place in every_pair_of(named, together)}
        items[:] = [item for item in items if id(item) not in left_out]
    of_product = {id(item): found for item in items if (found := case(item)) is not None}
    chosen = (slice_of if os.environ.get("ADAFV_SLICE") else every_pair)(list(of_product.values()))
    items[:] = [item for item in items if id(item) not in of_product or of_product[id(item)] in chosen]


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})
