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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A family without videos is not asked about videos; that it refuses them is in test_families.py."""

    def exists(item: pytest.Item) -> bool:
        chosen = getattr(getattr(item, "callspec", None), "params", {})
        row = chosen.get("any_family")
        return row is None or row.videos is not None or "video" not in str(chosen.get("batch", ""))

    items[:] = [item for item in items if exists(item)]
