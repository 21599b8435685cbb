"""The attention of the tower's layer that the projector reads, as vLLM computes it.

vLLM's towers end in the layer that is read, and each of their layers gives query, key and value to one
`MMEncoderAttention`, positions applied. A hook in front of that module sees them, whatever kernel runs inside it.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather


@dataclass(frozen=True)
class Attended:
    """One run of the tapped layer."""

    query: Tensor
    """[B, H, N, d] all heads, also where tensor parallelism gives each worker some."""
    key: Tensor
    value: Tensor
    features: Tensor
    """[B, N, D] output of the layer."""
    scaling: float


class Tap:
    """Records what one layer of a tower attends to, while it is open.

    Args:
        layer: of the tower.
        attention: its `MMEncoderAttention`.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module) -> None:
        self._attention: Any = attention
        self._open = False
        self._states: tuple[Tensor, Tensor, Tensor] | None = None
        self._runs: list[Attended] = []
        attention.register_forward_pre_hook(self._enter, with_kwargs=True)
        forward = layer.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._leave(output)
            return output

        # Not a hook: layers that vLLM could compile have a `__call__` of their own, which runs no hooks.
        layer.forward = recorded  # type: ignore[method-assign]

    def __enter__(self) -> "Tap":
        self._open, self._states, self._runs = True, None, []
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open, self._states = False, None

    def runs(self) -> list[Attended]:
        """What was recorded, in the order in which the layer ran; it is forgotten then.

        Raises:
            RuntimeError: the layer did not run, or ran past the hooks.
        """
        if not self._runs:
            raise RuntimeError("the tapped layer of the vision tower did not run, so there is no saliency")
        runs, self._runs = self._runs, []
        return runs

    def _enter(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (self._by_head(given[name]) for name in ("query", "key", "value"))
            self._states = (query, key, value)

    def _leave(self, output: Any) -> None:
        if self._open and self._states is not None:
            features = output[0] if isinstance(output, tuple) else output
            # The layer behind it may write over its input.
            self._runs.append(Attended(*self._states, features.clone(), self._attention.scale))
            self._states = None

    def _by_head(self, states: Tensor) -> Tensor:
        """[B, N, H * d] or [B, N, H, d], of this worker's heads -> [B, H, N, d], all heads."""
        if states.dim() == 3:
            states = states.unflatten(-1, (-1, self._attention.head_size))
        states = states.transpose(1, 2)
        if get_tensor_model_parallel_world_size() > 1:
            states = tensor_model_parallel_all_gather(states.contiguous(), dim=1)
        return states
