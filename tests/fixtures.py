"""Fixtures of all tests: the models of the families."""

import os
import sys
from collections.abc import Iterator
from typing import Any

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
from sharing import shared_model

torch.set_num_threads(1)


def often(*names: str) -> list[Any]:
    """Every family as a value of a test's `any_family`: those named in every run, the others before a release."""
    return [pytest.param(row, id=row.name, marks=() if row.name in names else pytest.mark.release) for row in FAMILIES]


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
