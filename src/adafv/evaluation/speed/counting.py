"""Counting what a call asks of a device, stage by stage: operations, arithmetic, bytes, waits, memory.

Every operation of PyTorch passes through a dispatch mode, on any device. So it needs no profiler, and the counts of a
laptop are those of a server where the same code runs.
"""

import math
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from adafv.evaluation.speed.stages import Stages

WAITS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"})
"""What reads a value, or makes a tensor whose size depends on one: the host waits for the device."""
_EMPTY = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"})
_LOOKUPS = frozenset({"embedding", "index", "index_select", "gather", "index_put", "index_put_"})
"""They read as much of their first argument as they return, not all of it."""


@dataclass
class Counts:
    """What one stage asked for."""

    operations: int = 0
    """Without views and without memory that nothing is written to: on a GPU each is a launch, at least."""
    flops: float = 0.0
    """Of matrix products, convolutions and attention; a multiplication and an addition are two. Causal attention counts in
    full, as PyTorch's own counter has it."""
    bytes: float = 0.0
    """Read and written, each operand of each operation once: what moves where nothing is fused and nothing is cached."""
    weights: float = 0.0
    """Of these bytes, those that are parameters of the model."""
    waits: int = 0
    """How often the host waits for the device: what reads a value, and on CUDA what PyTorch reports beside it."""
    on_host: int = 0
    """Operations on the host's own tensors, where the device is another: they are in none of the numbers above."""


class Living:
    """Bytes of memory behind tensors: of those it was told of, what has not been given back."""

    def __init__(self) -> None:
        self.bytes = 0
        self.made_in: dict[str, int] = defaultdict(int)
        """Of `bytes`, by the stage that asked for them."""
        self.peaks: dict[str, int] = defaultdict(int)
        """The most at once, of whatever stage, while the stage was on."""
        self._seen: dict[int, Any] = {}

    @property
    def peak(self) -> int:
        """The most at once."""
        return max(self.peaks.values(), default=0)

    def saw(self, tensor: Tensor, stage: str = "") -> None:
        """A tensor that is there; memory that is known already counts once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            self.bytes -= size
            self.made_in[stage] -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.made_in[stage] += size
        self.bytes += size
        self.peaks[stage] = max(self.peaks[stage], self.bytes)


class Counting(TorchDispatchMode):
    """Counts per stage of `stages`, and tracks the bytes that are alive.

    Args:
        stages: the listener that knows which stage is on.
        device: whose operations count.
        model: whose parameters are told apart; None: none.
    """

    def __init__(self, stages: Stages, device: torch.device, model: Any = None) -> None:
        super().__init__()
        self.stages = stages
        self._device = device.type
        self.counts: dict[str, Counts] = defaultdict(Counts)
        self.living = Living()
        parameters = [] if model is None else list(model.parameters())
        self._weights = {each.untyped_storage()._cdata for each in parameters}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_of((args, kwargs))
        out = func(*args, **kwargs)
        made = tensors_of(out)
        name = func.overloadpacket.__name__
        new = new_among(made, given)
        for each in new:
            if each.device.type == self._device:
                self.living.saw(each, self.stages.current)
        count = self.counts[self.stages.current]
        if name in WAITS or _reads_a_mask(name, args) or _comes_to_the_host(given, made):
            count.waits += 1
        if (not new and not func._schema.is_mutable) or name in _EMPTY:
            return out
        if all(each.device.type != self._device for each in (*given, *made)):
            count.on_host += 1
            return out
        count.operations += 1
        count.flops += _flops(func, name, args, kwargs, out)
        looked_up = name in _LOOKUPS
        for place, each in enumerate(given):
            size = min(_bytes(each), sum(map(_bytes, made))) if looked_up and place == 0 else _bytes(each)
            count.bytes += size
            if each.untyped_storage()._cdata in self._weights:
                count.weights += size
        count.bytes += sum(map(_bytes, made))
        return out


def tensors_of(values: Any) -> list[Tensor]:
    """Those in arguments or results, however nested."""
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def new_among(made: list[Tensor], given: list[Tensor]) -> list[Tensor]:
    """What an operation made of its own: neither views of what it was given nor that itself."""
    held = {each.untyped_storage()._cdata for each in given}
    return [each for each in made if each.untyped_storage()._cdata not in held]


def _bytes(tensor: Tensor) -> int:
    """Of what an operation reads or writes; what is expanded is read once."""
    count = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return count * tensor.element_size()


def _reads_a_mask(name: str, args: Any) -> bool:
    return name in ("index", "index_put", "index_put_") and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )


def _comes_to_the_host(given: list[Tensor], made: list[Tensor]) -> bool:
    return any(each.device.type == "cpu" for each in made) and any(each.device.type != "cpu" for each in given)


def _flops(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> float:
    if name.startswith("_scaled_dot_product"):
        query, key, value = args[:3]
        *batch, queries, width = query.shape
        return 2.0 * math.prod(batch) * queries * key.shape[-2] * (width + value.shape[-1])
    if name == "linear":
        return 2.0 * args[0].numel() * args[1].shape[0]
    counter = flop_registry.get(func.overloadpacket)
    return float(counter(*args, **kwargs, out_val=out)) if counter is not None else 0.0


@contextmanager
def counted_waits(stages: Stages, counts: dict[str, int]) -> Iterator[None]:
    """Within, every wait of the host for a CUDA device is counted per stage, as PyTorch reports them. They are more than
    `Counting` sees: also copies to the device from memory that is not pinned."""
    before = torch.cuda.get_sync_debug_mode()

    def heard(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            counts[stages.current] = counts.get(stages.current, 0) + 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = heard
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
