"""What a call costs a device besides tower, projector and language model, in every family; see test_operations.py."""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FamilyRow, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from adafv import compress, encode
from adafv.engines.transformers.families import family_of
from adafv.evaluation.speed.counting import new_among, tensors_of

MOST = 200
"""Operations that make something new, those on the host's copy of the prompt included."""


class Counted(TorchDispatchMode):
    """Counts operations that make something new, unless it is told to look away."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []
        self.looks = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.looks and new_among(tensors_of(out), tensors_of((args, kwargs))):
            self.made.append(func.overloadpacket.__name__)
        return out


@contextmanager
def stock_positions_left_out(model: Any, count: Counted, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Positions in time, height and width are the stock model's own code, which runs on the host: some 35 a prompt."""
    kind = type(family_of(model))
    positions = kind.positions

    def unseen(*args: Any) -> Any:
        count.looks = False
        try:
            return positions(*args)
        finally:
            count.looks = True

    with monkeypatch.context() as patch:
        patch.setattr(kind, "positions", unseen)
        yield


@contextmanager
def waits_heard() -> Iterator[list[str]]:
    """Where in adafv the host waited for the device, a line each, as PyTorch warns of them."""
    waits: list[str] = []

    def heard(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            steps = [step for step in traceback.extract_stack() if "/adafv/" in step.filename]
            waits.append(
                " < ".join(f"{Path(step.filename).name}:{step.lineno} {step.line}" for step in steps[::-1][:4])
            )

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = heard
        yield waits


@pytest.mark.parametrize("batch", [1, 8])
def test_few_operations(any_family: FamilyRow, any_model: Any, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one picture, and of eight prompts about it. Encoded before, so that tower and projector do not run."""
    inputs = make_inputs(any_family, any_model, [1])
    with torch.no_grad():
        encoded = encode(any_model, inputs)
        given = {
            name: value.repeat(batch, 1) if isinstance(value, torch.Tensor) and value.dim() == 2 else value
            for name, value in inputs.items()
            if "pixel" not in name
        }
        given["images"] = encoded if batch == 1 else encoded.repeated(batch)
        for crops in ("all", 1) if family_of(any_model).chooses_crops else ("all",):
            count = Counted()
            with stock_positions_left_out(any_model, count, monkeypatch), count:
                short = compress(any_model, given, 0.3, crops=crops)
            assert len(short.record.images) == batch
            assert len(count.made) <= MOST, (crops, count.made)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_call_waits_once_for_a_gpu(any_family: FamilyRow) -> None:
    """For the prompt, and once more where crops are chosen; what was kept and how good it is is read when somebody looks.
    Whether weights are still those that the images were encoded with is read with the prompt."""
    model = any_family.build()
    plain = make_inputs(any_family, model, [1])  # asks the model how many tokens an image has: on the CPU
    model.to("cuda")
    inputs = {name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in plain.items()}
    sizes = {
        "image_grid_thw",
        "image_sizes",
        "image_merge_sizes",
        "image_position_ids",
        "grid_thws",
        "batch_num_images",
    }
    on_host = {name: inputs[name].cpu() for name in sizes & inputs.keys() if isinstance(inputs[name], torch.Tensor)}
    with torch.no_grad():
        given = {**inputs, "images": encode(model, inputs), **on_host}
        for crops in ("all", 1) if family_of(model).chooses_crops else ("all",):
            compress(model, given, 0.3, crops=crops)
            torch.cuda.synchronize()
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            asked = {name: value for name, value in given.items() if "pixel" not in name}
            try:
                with waits_heard() as waits:
                    compress(model, asked, 0.3, crops=crops)
            finally:
                torch.cuda.set_sync_debug_mode(before)
            assert len(waits) == (1 if crops == "all" else 2), "\n".join(waits)
