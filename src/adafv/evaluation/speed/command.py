"""`adafv bench speed` as a function: models and methods in, one result out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from adafv.core.budget import Budget
from adafv.errors import OptionError
from adafv.evaluation.speed.choosing import choices, measure_methods
from adafv.evaluation.speed.report import SCHEMA, machine
from adafv.evaluation.speed.run import Options, measure
from adafv.evaluation.speed.shapes import DTYPES, subject
from adafv.methods import method_named
from adafv.printable import shortened

ALL = "all"


def bench_speed(
    models: Sequence[str],
    *,
    budgets: Sequence[str] = (),
    beside: Sequence[str] = (),
    alone: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "bfloat16",
    batch: int = 1,
    rounds: int = 10,
    decode: int = 8,
    layers: int | None = None,
    picture: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure models, and methods alone; see `report.py` for what comes back.

    Raises:
        OptionError, BudgetError, LoadError: an option is wrong; found before anything is built.
    """
    check_device(device)
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r}; known are: {', '.join(DTYPES)}")
    if min(batch, rounds) < 1 or decode < 0:
        raise OptionError("batch and rounds are 1 or more, decode is 0 or more")
    kept = [Budget.of(each).keep for each in budgets]
    for name in [*beside, *alone]:
        method, colon, _ = name.partition(":")
        if colon:
            raise OptionError(
                f"{shortened(name)}: methods are timed with the options that they have by default; give {method}"
            )
    for name in beside:
        method_named(name)
    named = [] if list(alone) == [ALL] else list(alone)
    choices(named)
    result: dict[str, Any] = {"schema": SCHEMA, "machine": machine(device), "models": [], "methods": [], "failed": []}
    for name in models:
        progress(f"{name}: building")
        built = subject(name, device, dtype, picture, layers=layers)
        progress(f"{name}: warming up and counting")
        options = Options(budgets=kept, methods=beside, batch=batch, rounds=rounds, decode=decode)
        result["models"].append(measure(built, options, progress))
        del built
    if alone:
        progress("methods: measuring")
        result["methods"].append(measure_methods(named, device, batch=batch, dtype=DTYPES[dtype], rounds=rounds))
    return result


def check_device(device: str) -> None:
    """Raise OptionError where there is no such device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise OptionError(f"device={device!r}; give cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError("device='cuda', but PyTorch finds no CUDA here; give cpu")
