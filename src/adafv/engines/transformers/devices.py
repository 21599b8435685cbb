"""Where things are: the host stays the host, and weights that are sharded are gathered before we use them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from adafv.errors import UnsupportedCallError


def host_by_default() -> AbstractContextManager[object]:
    """A context in which new tensors are made on the host; free where they are already.

    Scripts that call `torch.set_default_device("cuda")` change where every new tensor is made, ours too. What is read of a
    prompt, and what is counted before the tower runs, belongs on the host; so our own code runs with the host as the default
    device, as it does where nobody set one. The stock model is called with the caller's default.
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


@contextmanager
def sharded_parts_ready(model: Any) -> Iterator[None]:
    """Within, what we run of a model sharded by FSDP2 outside its own forward has its weights; nothing for other models.

    `fully_shard` gathers the weights of a part when the part is called. We call the tower, but we also run the projector and
    look up embeddings, whose weights belong to whatever around them was sharded: the base model, or the whole model.

    Raises:
        UnsupportedCallError: gradients would be lost. The gradients of a part are reduced when its own backward ends, and
            those of the projector come later where the part is not the whole model.
    """
    base = model.model
    around: list[Any] = [part for part in (model, base, getattr(base, "language_model", None)) if _is_sharded(part)]
    if around:
        trained = any(p.requires_grad for name, p in base.named_parameters() if not name.startswith("language_model."))
        if base in around and torch.is_grad_enabled() and trained:
            raise UnsupportedCallError(
                "with the base model sharded by fully_shard on its own, gradients of the projector would be lost; shard the "
                "layers, the tower and the whole model instead, not model.model, or run under torch.no_grad()"
            )
        root: Any = around[0]
        root._get_fsdp_state()._lazy_init()  # else the tower, called first, would take itself for the root
        for part in around:
            part.unshard()
    yield


def spread_over_processes(module: Any) -> bool:
    """Whether several processes must call this very module together: its weights are gathered from all of them."""
    wrapped = any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__)
    return wrapped or _is_sharded(module) or any(hasattr(weight, "ds_id") for weight in module._parameters.values())


def _is_sharded(module: Any) -> bool:
    """Whether `fully_shard` was called on this very module."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
