"""What layers of the tower attend to and give, as vLLM computes it.

vLLM's towers end in the layer that is read, and each of their layers gives query, key and value to one
`MMEncoderAttention`, positions applied. A hook in front of that module sees them, whatever kernel runs inside it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

from adafv.core import ImageLayout
from adafv.core.encoded import EncodedImage
from adafv.core.layers import TowerLayers
from adafv.core.tokens import Signal
from adafv.errors import UnsupportedModelError


@dataclass(frozen=True)
class Attended:
    """One run of a tapped layer."""

    query: Tensor
    """[B, H, N, d] all heads, also where tensor parallelism gives each worker some."""
    key: Tensor
    value: Tensor
    features: Tensor
    """[B, N, D] output of the layer."""
    scaling: float


class Tap:
    """Records what layers of a tower attend to and give, while it is open.

    Args:
        layers: of the tower, as many as are run.
        attention: path of the `MMEncoderAttention` in a layer.
        numbered: the same layers, as signals name them.
        signals: what to record; nothing is tapped where there are none.
        class_tokens: tokens in front of the patches of every crop.

    Raises:
        UnsupportedModelError: a signal cannot be read.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        attention: str,
        numbered: TowerLayers,
        signals: Collection[Signal],
        class_tokens: int = 0,
    ) -> None:
        for signal in signals:
            if reason := numbered.unreadable(signal):
                raise UnsupportedModelError(f"the {signal} cannot be read in vLLM: {reason}")
        self._class_tokens = class_tokens
        self._places = {signal: numbered.place(signal) for signal in signals}
        wanted: dict[int, set[str]] = {}
        for index, kind in self._places.values():
            wanted.setdefault(max(index, 1), set()).add(kind if index else "embeddings")
        self._layers = {
            index: _TappedLayer(layers[index - 1], layers[index - 1].get_submodule(attention), kinds)
            for index, kinds in wanted.items()
        }

    def __enter__(self) -> "Tap":
        for layer in self._layers.values():
            layer.open()
        return self

    def __exit__(self, *exception: Any) -> None:
        for layer in self._layers.values():
            layer.close()

    def read(
        self, score: Callable[[Attended], Tensor], to_tokens: Callable[[Tensor], list[Tensor]]
    ) -> dict[Signal, list[Tensor]]:
        """What was recorded, per image: saliency [N] float32, keys [N, H, d], hidden [N, E]. It is forgotten then.

        Args:
            score: from a run of a layer to the saliency of its patches.
            to_tokens: from values per patch to values per token: [all patches, C], in the tower's order and without
                [CLS], to [N, C] per image, for any C.

        Raises:
            RuntimeError: a layer did not run, or ran past the hooks.
        """
        found = {}
        for signal, (index, kind) in self._places.items():
            layer = self._layers[max(index, 1)]
            if kind == "saliency":
                patches = torch.cat([score(run).flatten() for run in layer.recorded(layer.runs)]).unsqueeze(-1)
                found[signal] = [tokens.squeeze(-1) for tokens in to_tokens(patches)]
            elif kind == "keys":
                keys = self._patches([run.key.transpose(1, 2) for run in layer.recorded(layer.runs)])
                found[signal] = [tokens.unflatten(1, keys.shape[1:]) for tokens in to_tokens(keys.flatten(1))]
            else:
                found[signal] = to_tokens(self._patches(layer.recorded(layer.outputs if index else layer.inputs)))
        for layer in self._layers.values():
            layer.clear()
        return found

    def _patches(self, runs: Sequence[Tensor]) -> Tensor:
        """Runs of [B, N, ...], [CLS] included -> [all patches, ...]."""
        return torch.cat([run[:, self._class_tokens :].flatten(0, 1) for run in runs])


class _TappedLayer:
    """One layer of the tower, and what it attended to, was given and gave since it was opened."""

    def __init__(self, layer: nn.Module, attention: nn.Module, kinds: Collection[str]) -> None:
        self._attention: Any = attention
        self._kinds = kinds
        self.clear()
        self.close()
        if not {"saliency", "keys"}.isdisjoint(kinds):
            attention.register_forward_pre_hook(self._enter, with_kwargs=True)
        forward = layer.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._open and "embeddings" in kinds:
                self.inputs.append(next(iter((*args, *kwargs.values()))).clone())
            output = forward(*args, **kwargs)
            if self._open:
                self._leave(output)
            return output

        # Not a hook: layers that vLLM could compile have a `__call__` of their own, which runs no hooks.
        layer.forward = recorded  # type: ignore[method-assign]

    def open(self) -> None:
        """Begin anew."""
        self.clear()
        self._open = True

    def clear(self) -> None:
        """Forget what was recorded."""
        self.runs: list[Attended] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def close(self) -> None:
        """Record no more; what was recorded stays."""
        self._open = False
        self._states: tuple[Tensor, Tensor, Tensor] | None = None

    @staticmethod
    def recorded(found: list[Any]) -> list[Any]:
        """The same; raises RuntimeError where nothing was recorded."""
        if not found:
            raise RuntimeError("the tapped layer of the vision tower did not run, so nothing was read off it")
        return found

    def _enter(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (self._by_head(given[name]) for name in ("query", "key", "value"))
            self._states = (query, key, value)

    def _leave(self, output: Any) -> None:
        features = output[0] if isinstance(output, tuple) else output
        features = features.clone()  # the layer behind it may write over its input
        if "hidden" in self._kinds:
            self.outputs.append(features)
        if self._states is not None:
            self.runs.append(Attended(*self._states, features, self._attention.scale))
            self._states = None

    def _by_head(self, states: Tensor) -> Tensor:
        """[B, N, H * d] or [B, N, H, d], of this worker's heads -> [B, H, N, d], all heads."""
        if states.dim() == 3:
            states = states.unflatten(-1, (-1, self._attention.head_size))
        states = states.transpose(1, 2)
        if get_tensor_model_parallel_world_size() > 1:
            states = tensor_model_parallel_all_gather(states.contiguous(), dim=1)
        return states


def encoded_images(
    features: Sequence[Tensor], signals: dict[Signal, list[Tensor]], layouts: Sequence[ImageLayout]
) -> list[EncodedImage]:
    """Features, signals and layouts of several images, image by image."""
    return [
        EncodedImage(part, {signal: values[i] for signal, values in signals.items()}, layout)
        for i, (part, layout) in enumerate(zip(features, layouts, strict=True))
    ]
