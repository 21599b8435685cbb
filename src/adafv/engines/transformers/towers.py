"""Vision towers, and how their saliency is read without touching them.

For one call a *twin* of the tower is built: new Python objects for the modules on the way to the tapped layer, the same
parameters, buffers and all other modules. In the twin, layers that nothing reads are left out, the tapped layer's
attention names an attention function of ours in a config of its own, and the read layers hand over their output. The
model itself is never written to, so nothing must be undone, two threads do not meet, and an exception leaves no trace.

Why not output_attentions=True: transformers then falls back to eager attention in every layer, which takes about a third
more time (`python -m benchmarks.overhead --only tower`) and holds the full attention maps. Why not forward hooks on the
model: they are shared by all threads, and skipping the dead layers with them would need an exception as control flow.
"""

import copy
import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from adafv.core import class_attention, patch_saliency
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
    attention: str
    has_class_token: bool = True

    @property
    def score(self) -> Score:
        return class_score if self.has_class_token else patch_score

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
    _read_layers(feature_layers, len(list(tower.get_submodule(shape.layers).children())))


class Tap:
    """A twin of a tower in which one layer's attention is tapped; everything else runs as it does in the stock tower.

    For towers of any kind; `TappedTower` also leaves out the layers that nothing reads.

    Args:
        tower: the model's vision tower; it is not changed.
        attention: path of the tapped attention module inside it, such as "blocks.31.attn".
        score: what to make of its query and key.

    Use `tower` in place of the model's; after a call `scores` holds what `score` made of each run of the attention, in
    the order of the runs (packed towers run it once per image).
    """

    def __init__(self, tower: nn.Module, attention: str, score: Score) -> None:
        tower = uncompiled(tower)
        path, _, name = attention.rpartition(".")
        self._layer = _TappedLayer(tower.get_submodule(path), name, score)
        self.tower: Any = _with(tower, path.split("."), self._layer.twin)

    @property
    def scores(self) -> list[Tensor]:
        """Raises UnsupportedModelError where the attention was never asked."""
        return self._layer.scores


class TappedTower:
    """Stands in for a model's `vision_tower` during one call: same hidden states, plus the saliency, less the dead layers.

    Args:
        tower: the model's vision tower; it is not changed.
        feature_layers: `vision_feature_layer` of the model: which hidden states the projector reads.
        saliency: whether to read the saliency of the deepest of those layers.
        shape: of a tower that is not in `TOWERS`.

    After a call, `saliency` holds [crops, patches] float32.
    """

    def __init__(
        self, tower: nn.Module, feature_layers: int | list[int], saliency: bool, shape: TowerShape | None = None
    ) -> None:
        tower = uncompiled(tower)
        shape = shape_of(tower) if shape is None else shape
        layers: list[Any] = list(tower.get_submodule(shape.layers).children())
        self._states: list[Tensor | None] = [None] * (len(layers) + 1)
        self._tapped: _TappedLayer | None = None

        read = _read_layers(feature_layers, len(layers))
        deepest = max(read)
        self._complete = deepest == len(layers)
        layers = layers[:deepest]
        if saliency:
            self._tapped = _TappedLayer(layers[deepest - 1], shape.attention, shape.score)
            layers[deepest - 1] = self._tapped.twin
        for index in read:
            layers[index - 1] = twin_of(layers[index - 1])
            layers[index - 1].register_forward_hook(self._record(index))
        self._twin = _with(tower, shape.layers.split("."), nn.ModuleList(layers))
        self._twin.register_forward_hook(self._hand_out, prepend=True)

    def _hand_out(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Let the tower return the states that are read: FSDP2 gathers its weights again when their gradients arrive."""
        output.hidden_states = tuple(state for state in self._states if state is not None)
        return output

    def _record(self, index: int) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            self._states[index] = output[0] if isinstance(output, tuple) else output

        return record

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

    @property
    def saliency(self) -> Tensor:
        """Raises UnsupportedModelError where the attention was never asked."""
        assert self._tapped is not None
        return self._tapped.scores[-1]


def with_tower(base: nn.Module, name: str, tower: TappedTower) -> Any:
    """A twin of a base model whose only difference is its tower, held as `name`; so stock methods of the model can be run."""
    twin = twin_of(base)
    twin.__dict__[name] = tower
    return twin


def with_tap(base: nn.Module, name: str, attention: str, saliency: bool) -> tuple[Any, Tap | None]:
    """A twin of a base model, and if saliency is asked for, the tap in its tower; for towers without [CLS].

    Args:
        name: attribute of the base model that holds the tower.
        attention: see `Tap`.
    """
    if not saliency:
        return twin_of(base), None
    tap = Tap(getattr(base, name), attention, patch_score)
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

        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = device_hook.pre_forward(twin, *args, **kwargs)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not device_hook.no_grad):
                output = type(twin).forward(twin, *args, **kwargs)
            return device_hook.post_forward(twin, output)

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
    """A twin of a layer whose attention is tapped: `twin` runs as the layer does, and then `scores` are there."""

    def __init__(self, layer: nn.Module, attention: str, score: Score) -> None:
        self._score = score
        self._runs: list[_Attended] = []
        self._scores: list[Tensor] = []
        self.twin: Any = _with(layer, attention.split("."), self._tapped(layer.get_submodule(attention)))
        self.twin.register_forward_hook(self._end_of_layer)

    @property
    def scores(self) -> list[Tensor]:
        if not self._scores:
            raise UnsupportedModelError(
                "the tower's attention did not run through transformers' attention interface, so there is no saliency; "
                "was a forward method of the tower replaced?"
            )
        return self._scores

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
    def _end_of_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        features: Tensor = (output[0] if isinstance(output, tuple) else output).detach()
        shapes = [(*run.query.shape[:-3], run.query.shape[-2]) for run in self._runs]
        parts = features.flatten(0, -2).split([math.prod(shape) for shape in shapes])
        self._scores += [
            self._score(run.query, run.key, run.value, part.unflatten(0, shape), run.scaling, run.mask)
            for run, part, shape in zip(self._runs, parts, shapes, strict=True)
        ]
        self._runs.clear()


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
