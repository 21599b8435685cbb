"""The models of the table, one build for all tests of a process; and what is logged."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from models import FamilyRow


def own_hooks(module: Any) -> int:
    """Less those that transformers adds by itself when a model is called first."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return sum(not hook.__module__.startswith("transformers.") for hook in hooks)


@contextmanager
def logged() -> Iterator[list[logging.LogRecord]]:
    """What reaches the root of all loggers. pytest's own `caplog` goes through thousands of them, six times a test."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def little_to_look_through() -> Iterator[None]:
    """For files that collect garbage often: what other files left alive, half a million objects, is not looked through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


BUILT: dict[tuple[str, torch.dtype], tuple[Any, Any]] = {}
"""Each model, and its state when it was built."""


@contextmanager
def shared_model(row: FamilyRow, dtype: torch.dtype = torch.float32) -> Iterator[Any]:
    """The row's model, which must come back as it was: later tests rely on it."""
    key = row.name, dtype
    if key not in BUILT:
        model = row.build(dtype=dtype)
        BUILT[key] = model, state_of(model)
    model, built = BUILT[key]
    yield model
    if state_of(model) != built:
        del BUILT[key]  # the next test gets another one
        raise AssertionError(f"a test left the shared model of {row.name} changed")


def state_of(model: Any) -> tuple[Any, ...]:
    """What a test could change of a model; a weight that is written to counts its versions.

    Without `modules()`, `parameters()` and their like, which each walk through all of the model and know names.
    """
    modules, weights, waiting, seen = [], [], [model], set()
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        inside = vars(module)
        modules.append((id(module), type(module), own_hooks(module), "forward" in inside, module.training))
        for held in (inside["_parameters"], inside["_buffers"]):
            weights += [(id(weight), weight._version) for weight in held.values() if weight is not None]
        waiting += inside["_modules"].values()
    return modules, weights, repr(vars(model.generation_config))
