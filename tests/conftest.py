"""Shared settings: no network, quiet transformers, one thread (small models are slower with two that wait for each other)."""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

if folder := os.environ.get("ADAFV_TORCHVISION"):
    # The registry has torchvision for CUDA alone. Its image operations run without its compiled part, if two of that
    # part's operations are known by name.
    sys.path.append(folder)
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from models import FAMILIES, FamilyRow

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=[row for row in FAMILIES if row.deep], ids=lambda row: row.name)
def family(request: pytest.FixtureRequest) -> FamilyRow:
    """The families over which the tests of the wrapper run; what depends on the family is in test_oracle.py."""
    return request.param


@pytest.fixture(scope="module")
def model(family: FamilyRow) -> Any:
    """A model of the family, shared by the tests of a file: wrap it, but do not change it."""
    return family.build()


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda row: row.name)
def any_family(request: pytest.FixtureRequest) -> FamilyRow:
    """Every family of the table."""
    return request.param


@pytest.fixture(scope="module")
def any_model(any_family: FamilyRow) -> Any:
    """A model of the family, shared by the tests of a file: wrap it, but do not change it."""
    return any_family.build()


@pytest.fixture(scope="module")
def any_rough_model(any_family: FamilyRow) -> Any:
    """The same in bfloat16."""
    return any_family.build(dtype=torch.bfloat16)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A family without videos is not asked about videos; that it refuses them is in test_families.py.

    Of the product family x way of generating x batch, every pair of two is run, not every triple: each family in each way
    with one batch, which rotates. ADAFV_WHOLE=1 runs the product (`make test-whole`), as before a release.
    """

    def parameters(item: pytest.Item) -> dict[str, Any]:
        return getattr(getattr(item, "callspec", None), "params", {})

    def exists(item: pytest.Item) -> bool:
        chosen = parameters(item)
        row = chosen.get("any_family")
        return row is None or row.videos is not None or "video" not in str(chosen.get("batch", ""))

    items[:] = [item for item in items if exists(item)]
    if os.environ.get("ADAFV_WHOLE"):
        return
    places = {row.name: place for place, row in enumerate(FAMILIES)}
    batches: dict[Any, list[str]] = {}
    modes: dict[str, int] = {}
    product = [item for item in items if {"any_family", "mode", "batch"} <= parameters(item).keys()]
    for item in product:
        chosen = parameters(item)
        modes.setdefault(chosen["mode"], len(modes))
        of_row = batches.setdefault(chosen["any_family"].name, [])
        if chosen["batch"] not in of_row:
            of_row.append(chosen["batch"])

    def rotates_here(item: pytest.Item) -> bool:
        chosen = parameters(item)
        name = chosen["any_family"].name
        return chosen["batch"] == batches[name][(modes[chosen["mode"]] + places[name]) % len(batches[name])]

    left_out = {id(item) for item in product if not rotates_here(item)}
    items[:] = [item for item in items if id(item) not in left_out]
