"""Shared settings: no network, quiet transformers, one thread (small models are slower with two that wait for each other)."""

import os
import sys
from collections.abc import Iterator
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
from pairwise import Case, every_pair
from sharing import shared_model

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=[row for row in FAMILIES if row.deep], ids=lambda row: row.name)
def family(request: pytest.FixtureRequest) -> FamilyRow:
    """The families over which the tests of the wrapper run; what depends on the family is in test_oracle.py."""
    return request.param


@pytest.fixture
def model(family: FamilyRow) -> Iterator[Any]:
    """A model of the family, shared by all tests of this process: wrap it, but do not change it."""
    with shared_model(family) as found:
        yield found


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda row: row.name)
def any_family(request: pytest.FixtureRequest) -> FamilyRow:
    """Every family of the table."""
    return request.param


@pytest.fixture
def any_model(any_family: FamilyRow) -> Iterator[Any]:
    """A model of the family, shared by all tests of this process: wrap it, but do not change it."""
    with shared_model(any_family) as found:
        yield found


@pytest.fixture
def any_rough_model(any_family: FamilyRow) -> Iterator[Any]:
    """The same in bfloat16."""
    with shared_model(any_family, torch.bfloat16) as found:
        yield found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A family without videos is not asked about videos; that it refuses them is in test_families.py.

    Of the product family x mode x batch, every pair is run, not every triple: see pairwise.py. With ADAFV_WHOLE=1
    (`make test-all`) the product is, as before a release; and so is what is marked "release".
    """

    def exists(parameters: dict[str, Any]) -> bool:
        row = parameters.get("any_family")
        return row is None or row.videos is not None or "video" not in str(parameters.get("batch", ""))

    def case(item: pytest.Item) -> Case | None:
        return Case.of(getattr(item, "originalname", item.name), parameters_of(item))

    items[:] = [item for item in items if exists(parameters_of(item))]
    if os.environ.get("ADAFV_WHOLE"):
        return
    items[:] = [item for item in items if item.get_closest_marker("release") is None]
    of_product = {id(item): found for item in items if (found := case(item)) is not None}
    chosen = every_pair(list(of_product.values()))
    items[:] = [item for item in items if id(item) not in of_product or of_product[id(item)] in chosen]


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})
