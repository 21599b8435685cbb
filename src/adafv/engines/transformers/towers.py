"""Vision towers, and how their saliency, keys and hidden states are read without touching them.

For one call a *twin* of the tower is built: new Python objects for the modules on the way to the tapped layers, the same
parameters, buffers and all other modules. In the twin, layers that nothing reads are left out, a tapped layer's
attention names an attention function of ours in a config of its own, and the read layers hand over their output. The
model itself is never written to, so nothing must be undone, two threads do not meet, and an exception leaves no trace.

Why not output_attentions=True: transformers then falls back to eager attention in every layer, which takes about a third
more time (`adafv bench speed`, the published way) and holds the full attention maps. Why not forward hooks on the
model: they are shared by all threads, and skipping the dead layers with them would need an exception as control flow.
"""

import copy
import math
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from adafv.core import class_attention, patch_saliency
from adafv.core.layers import TowerLayers
from adafv.core.select import MIX_TOKENS
from adafv.core.tokens import READ, Signal
from adafv.errors import UnsupportedModelError

TAPPED_ATTENTION = "adafv_tapped"
"""Name of our attention function in transformers' registry; only twins ever name it."""

Score = Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
"""From query, key, value [..., H, N, d], output [..., N, D], scaling and mask of a layer to its saliency [..., N]."""


def class_score(
    query: Tensor, key: Tensor, value: Tensor, features: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """Saliency of a tower whose token 0 is [CLS]: see `adafv.core.class_attention`."""
    return class_attention(query, key, scaling)


def patch_score(
    query: Tensor, key: Tensor, value: Tensor, features: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """Saliency of a tower without [CLS]: see `adafv.core.patch_saliency`. A patch that nothing may look at is padding."""
    padding = None
    if mask is not None:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        padding = ~allowed.flatten(1, -2).any(dim=1)
    return patch_saliency(query, key, value, features, scaling, padding)


@dataclass(frozen=True)
class TowerShape:
    """Where a tower class keeps its layers, and a layer its attention."""

    layers: str
    """Path of the list of layers in the tower, such as "encoder.layers"."""
    attention: str
    """Path of the attention in a layer."""
    has_class_token: bool = True
    whole: Callable[[Any], Sequence[int]] | None = None
    """Of a tower that attends in windows in some layers: which of them, counted from 0, look at the whole image."""

    @property
    def score(self) -> Score:
        return class_score if self.has_class_token else patch_score

    def layers_of(self, tower: Any) -> list[Any]:
        """The layers of this tower, in order."""
        return list(uncompiled(tower).get_submodule(self.layers).children())

    def numbered(self, tower: Any, feature_layers: int | list[int] = -1) -> TowerLayers:
        """The layers of this tower as signals name them, where the projector reads these hidden states."""
        count = len(self.layers_of(tower))
        whole = None if self.whole is None else [layer + 1 for layer in self.whole(tower)]
        return TowerLayers(count, max(_read_layers(feature_layers, count)), whole)

    @property
    def strategy(self) -> str:
        """The `vision_feature_select_strategy` with which the tower's tokens are its patches."""
        return "default" if self.has_class_token else "full"


TOWERS = {
    "CLIPVisionModel": TowerShape("encoder.layers", "self_attn"),
    "ViTModel": TowerShape("layers", "attention"),
    "SiglipVisionModel": TowerShape("encoder.layers", "self_attn", has_class_token=False),
    "InternVLVisionModel": TowerShape("encoder.layer", "attention"),
    "Idefics3VisionTransformer": TowerShape("encoder.layers", "self_attn", has_class_token=False),
    "SmolVLMVisionTransformer": TowerShape("encoder.layers", "self_attn", has_class_token=False),
    "JanusVisionModel": TowerShape("encoder.layers", "self_attn", has_class_token=False),
    "QianfanOCRVisionModel": TowerShape("layers", "attention"),
}
"""Towers of one crop after the other, whose attention goes through transformers' attention interface."""


def shape_of(tower: nn.Module) -> TowerShape:
    """Where this tower keeps its layers, also where FSDP2 has given it a class of its own.

    Raises:
        UnsupportedModelError: it is none of `TOWERS`.
    """
    for cls in type(uncompiled(tower)).__mro__:
        if cls.__name__ in TOWERS:
            return TOWERS[cls.__name__]
    raise UnsupportedModelError(
        f"the vision tower {type(tower).__name__} is not supported; supported are: {', '.join(TOWERS)}"
    )


def check_tower(tower: nn.Module, feature_layers: int | list[int], strategy: str) -> None:
    """Raise UnsupportedModelError unless the saliency of this tower can be read and its tokens are its patches."""
    tower = uncompiled(tower)
    shape = shape_of(tower)
    expected = shape.strategy
    if strategy != expected:
        consequence = (
            "passes [CLS] to the language model as a visual token"
            if expected == "default"
            else "cuts off a patch of a tower that has no [CLS]"
        )
        raise UnsupportedModelError(
            f"vision_feature_select_strategy={strategy!r} {consequence}; only {expected!r} is supported with "
            f"{type(tower).__name__}"
        )
    _read_layers(feature_layers, len(shape.layers_of(tower)))


class Tap:
    """A twin of a tower in which layers are tapped; everything else runs as it does in the stock tower.

    For towers of any kind; `TappedTower` also leaves out the layers that nothing reads.

    Args:
        tower: the model's vision tower; it is not changed.
        shape: where its layers are.
        signals: what to read, see `adafv.core.layers` for which layer they are of.
        feature_layers: which hidden states the projector reads.

    Use `tower` in place of the model's; after a call, `read` gives the signals.

    Raises:
        UnsupportedModelError: a signal cannot be read.
    """

    def __init__(
        self,
        tower: nn.Module,
        shape: TowerShape,
        signals: Collection[Signal],
        feature_layers: int | list[int] = -1,
    ) -> None:
        self.tower: Any = tower if not signals else uncompiled(tower)
        numbered, layers = shape.numbered(tower, feature_layers), shape.layers_of(tower)
        if READ in signals:
            raise UnsupportedModelError(
                f"what the projector reads cannot be mixed with {type(tower).__name__}: {MIX_TOKENS}"
            )
        for signal in signals:
            if reason := numbered.unreadable(signal):
                raise UnsupportedModelError(f"the {signal} cannot be read off {type(tower).__name__}: {reason}")
        self._places = {signal: numbered.place(signal) for signal in signals}
        wanted: dict[int, set[str]] = {}
        for index, kind in self._places.values():
            wanted.setdefault(max(index, 1), set()).add(kind if index else "embeddings")
        self._layers = {index: _TappedLayer(shape, kinds) for index, kinds in wanted.items()}
        for index, layer in self._layers.items():
            twin = layer.twin_of(layers[index - 1])
            self.tower = _with(self.tower, [*shape.layers.split("."), str(index - 1)], twin)

    def read(self, to_tokens: Callable[[Tensor], list[Tensor]]) -> dict[Signal, list[Tensor]]:
        """The signals, per image: saliency [N] float32, keys [N, H, d], hidden [N, E].

        Args:
            to_tokens: from values per patch to values per token: [all patches, C], in the tower's order and without
                [CLS], to [N, C] per image, for any C.

        Raises:
            UnsupportedModelError: the attention was never asked.
        """
        found = {}
        for signal, (index, kind) in self._places.items():
            layer = self._layers[max(index, 1)]
            tokens = to_tokens(layer.patches(kind if index else "embeddings"))
            if kind == "saliency":
                tokens = [part.squeeze(-1) for part in tokens]
            elif kind == "keys":
                tokens = [part.unflatten(-1, (layer.heads, -1)) for part in tokens]
            found[signal] = tokens
        return found


class TappedTower:
    """Stands in for a model's `vision_tower` during one call: same hidden states, plus signals, less the dead layers.

    Args:
        tower: the model's vision tower; it is not changed.
        feature_layers: `vision_feature_layer` of the model: which hidden states the projector reads.
        signals: see `Tap`.
        shape: of a tower that is not in `TOWERS`.

    After a call, `read` gives the signals.
    """

    def __init__(
        self,
        tower: nn.Module,
        feature_layers: int | list[int],
        signals: Collection[Signal],
        shape: TowerShape | None = None,
    ) -> None:
        tower = uncompiled(tower)
        shape = shape_of(tower) if shape is None else shape
        tap = Tap(tower, shape, set(signals) - {READ}, feature_layers)
        self._signals, self._class_tokens, self._tap = signals, int(shape.has_class_token), tap
        layers = shape.layers_of(tap.tower)
        self._states: list[Tensor | None] = [None] * (len(layers) + 1)

        self._layers_read = read = _read_layers(feature_layers, len(layers))
        deepest = max(read)
        self._complete = deepest == len(layers)
        layers = layers[:deepest]
        for index in read:
            layers[index - 1] = twin_of(layers[index - 1])
            layers[index - 1].register_forward_hook(_recording(self._states, index))
        self._twin = _with(tap.tower, shape.layers.split("."), nn.ModuleList(layers))
        self._twin.register_forward_hook(_handing_out(self._states), prepend=True)

    def read(self, to_tokens: Callable[[Tensor], list[Tensor]]) -> dict[Signal, list[Tensor]]:
        """The signals, as `Tap.read`; of what the projector reads, the states of all its layers side by side."""
        found = self._tap.read(to_tokens)
        if READ in self._signals:
            states = [self._states[index][:, self._class_tokens :] for index in self._layers_read]  # type: ignore[index]
            found[READ] = to_tokens(torch.cat(states, dim=-1).flatten(0, -2))
        return found

    def __call__(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        kwargs |= {"output_hidden_states": False, "output_attentions": False, "return_dict": True}
        output = self._twin(pixel_values, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state if self._complete else None,
            hidden_states=tuple(self._states),  # type: ignore[arg-type]
        )

    @property
    def patch_size(self) -> Any:
        """Some models ask their tower for it."""
        return self._twin.patch_size


def _handing_out(states: list[Tensor | None]) -> Callable[..., Any]:
    """A hook that lets the tower return the states that are read: FSDP2 gathers its weights again when their gradients
    arrive. It knows the list alone: one that knew the twin, which knows its hooks, would keep all states until Python
    collects its garbage."""

    def hand_out(module: nn.Module, args: Any, output: Any) -> Any:
        output.hidden_states = tuple(state for state in states if state is not None)
        return output

    return hand_out


def _recording(states: list[Tensor | None], index: int) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        states[index] = output[0] if isinstance(output, tuple) else output

    return record


def with_tower(base: nn.Module, name: str, tower: TappedTower) -> Any:
    """A twin of a base model whose only difference is its tower, held as `name`; so stock methods of the model can be run."""
    twin = twin_of(base)
    twin.__dict__[name] = tower
    return twin


def with_tap(base: nn.Module, name: str, shape: TowerShape, signals: Collection[Signal]) -> tuple[Any, Tap]:
    """A twin of a base model whose tower, held as `name`, is tapped, and the tap."""
    tap = Tap(getattr(base, name), shape, signals)
    return twin_of(base, **{name: tap.tower}), tap


def patch_grid(tower: nn.Module, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of patches that the tower makes of one crop of height x width pixels."""
    patch_height, patch_width = patch_size(tower)
    return height // patch_height, width // patch_width


def patch_size(tower: nn.Module) -> tuple[int, int]:
    """(height, width) of one patch, in pixels."""
    size = tower.config.patch_size  # type: ignore[union-attr]
    return (size, size) if isinstance(size, int) else tuple(size)  # type: ignore[return-value,arg-type]


def scale_down(pixel_values: Tensor, tower: nn.Module, grid: tuple[int, int]) -> Tensor:
    """[images, 3, H, W] scaled to `grid` (rows, columns) patches of the tower, antialiased.

    Raises:
        UnsupportedModelError: the tower is offloaded; transformers then cannot interpolate its position embeddings.
    """
    if any(parameter.is_meta for parameter in tower.parameters()):
        raise UnsupportedModelError(
            "down-sampling interpolates the position embeddings of the vision tower, which is offloaded; keep "
            "model.vision_tower on a device in device_map, or use another method"
        )
    height, width = (count * size for count, size in zip(grid, patch_size(tower), strict=True))
    scaled = nn.functional.interpolate(
        pixel_values.float(), size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return scaled.to(pixel_values.dtype)


def twin_of(module: nn.Module, **modules: nn.Module) -> Any:
    """A second object for `module` with the same parameters, buffers and submodules, except those in `modules`.

    Hooks registered on the twin stay on the twin. Accelerate's device hooks, which replace `forward` on the object, are
    bound anew so that they run the twin.
    """
    twin = object.__new__(module.__class__)  # FSDP2 runs the constructor in `__new__`
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = {**module._modules, **modules}
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        if hooks in module.__dict__:
            twin.__dict__[hooks] = OrderedDict(module.__dict__[hooks])
    twin.__dict__["_compiled_call_impl"] = None
    if twin.__dict__.pop("forward", None) is not None:
        device_hook = module.__dict__.get("_hf_hook")
        if device_hook is None:
            raise UnsupportedModelError(
                f"the forward method of {type(module).__name__} in the vision tower was replaced on the object; "
                "adafv cannot read the saliency through it. Use module.compile() rather than "
                "module.forward = torch.compile(module.forward)"
            )

        itself = weakref.ref(twin)  # or it would hold itself, and what its hooks have recorded

        def forward(*args: Any, **kwargs: Any) -> Any:
            me = itself()
            assert me is not None
            args, kwargs = device_hook.pre_forward(me, *args, **kwargs)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not device_hook.no_grad):
                output = type(me).forward(me, *args, **kwargs)
            return device_hook.post_forward(me, output)

        twin.__dict__["forward"] = forward
    return twin


@dataclass
class _Attended:
    """One run of a tapped attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    mask: Tensor | None


class _TappedLayer:
    """What a tapped layer attends to and gives: the twin of the layer runs as the layer does, and then it is there.

    The twin knows this object, and not the reverse; see `_handing_out`.

    Args:
        kinds: what to read, of "saliency", "keys", "hidden" (its output) and "embeddings" (its input).
    """

    def __init__(self, shape: TowerShape, kinds: Collection[str]) -> None:
        self._shape = shape
        self._runs: list[_Attended] = []
        self._found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
        self.heads = 0

    def twin_of(self, layer: nn.Module) -> Any:
        """A twin of the layer that is read."""
        twin = twin_of(layer)
        if not {"saliency", "keys"}.isdisjoint(self._found):
            attention = self._tapped(layer.get_submodule(self._shape.attention))
            twin = _with(layer, self._shape.attention.split("."), attention)
        twin.register_forward_hook(self._end_of_layer, with_kwargs=True)
        return twin

    def patches(self, kind: str) -> Tensor:
        """[all patches, C], run after run, without [CLS]: packed towers run the attention once per image."""
        found = self._found[kind]
        if not found:
            raise UnsupportedModelError(
                "the tower's attention did not run through transformers' attention interface, so there is no saliency and "
                "there are no keys; was a forward method of the tower replaced?"
            )
        return found[0] if len(found) == 1 else torch.cat(found)

    def _tapped(self, attention: nn.Module) -> nn.Module:
        config = attention.config
        default = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
        twin = twin_of(attention)
        twin.__dict__["adafv_runs"] = self._runs
        twin.__dict__["adafv_stock"] = attention
        twin.__dict__["adafv_attention"] = ALL_ATTENTION_FUNCTIONS.get_interface(
            config._attn_implementation,  # type: ignore[union-attr,arg-type]
            default,  # type: ignore[arg-type]
        )
        twin.__dict__["config"] = copy.copy(config)
        twin.__dict__["config"]._attn_implementation_internal = TAPPED_ATTENTION
        return twin  # type: ignore[no-any-return]

    @torch.no_grad()
    def _end_of_layer(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        features: Tensor = (output[0] if isinstance(output, tuple) else output).detach()
        if "hidden" in self._found:
            self._add("hidden", features)
        if "embeddings" in self._found:
            self._add("embeddings", (args[0] if args else kwargs["hidden_states"]).detach())
        shapes = [(*run.query.shape[:-3], run.query.shape[-2]) for run in self._runs]
        if "keys" in self._found:
            for run in self._runs:
                self.heads = run.key.shape[-3]
                self._add("keys", run.key.transpose(-2, -3).flatten(-2))
        if "saliency" in self._found:
            parts = features.flatten(0, -2).split([math.prod(shape) for shape in shapes])
            for run, part, shape in zip(self._runs, parts, shapes, strict=True):
                score = self._shape.score(
                    run.query, run.key, run.value, part.unflatten(0, shape), run.scaling, run.mask
                )
                self._found["saliency"].append(score.flatten().unsqueeze(-1))
        self._runs.clear()

    def _add(self, kind: str, values: Tensor) -> None:
        """Of [..., patches, C]."""
        patches = values[..., 1:, :] if self._shape.has_class_token else values
        self._found[kind].append(patches.flatten(0, -2))


def _tapped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    module.adafv_runs.append(_Attended(query.detach(), key.detach(), value.detach(), scaling, attention_mask))
    # The stock module goes along: flash attention looks up its kernel by the name in the module's config.
    return module.adafv_attention(module.adafv_stock, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(TAPPED_ATTENTION, _tapped_attention)


def _with(module: nn.Module, path: list[str], replacement: nn.Module) -> Any:
    """A twin of `module` in which the submodule at `path` is another."""
    if len(path) > 1:
        replacement = _with(getattr(module, path[0]), path[1:], replacement)
    return twin_of(module, **{path[0]: replacement})


def _read_layers(feature_layers: int | list[int], layers: int) -> list[int]:
    """The hidden states that are read, as positive indices; hidden state i is the output of layer i - 1."""
    wanted = [feature_layers] if isinstance(feature_layers, int) else list(feature_layers)
    read = [index if index >= 0 else index + layers + 1 for index in wanted]
    if not all(1 <= index <= layers for index in read):
        raise UnsupportedModelError(
            f"vision_feature_layer={feature_layers} does not name the output of one of the tower's {layers} layers"
        )
    return read


def uncompiled(tower: nn.Module) -> nn.Module:
    """The module inside torch.compile(tower); the twin runs uncompiled."""
    return getattr(tower, "_orig_mod", tower)
