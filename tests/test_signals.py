"""Signals of the tower against the stock tower: saliency, keys and hidden states of every layer, in every family.

What a token is made of is not asked of adafv: it is found by differentiating the stock model's features with respect to
what its layers hand on. So a wrong order, a lost [CLS] or a square too many shows, whatever the way of packing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import FamilyRow, llava, llava_images, llava_next, llava_next_images, make_inputs
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adafv.core import ImageLayout, class_attention, patch_saliency
from adafv.core.tokens import HIDDEN, KEYS, SALIENCY, Signal, hidden_of, keys_of, saliency_of
from adafv.engines.transformers.families import Family, family_of
from adafv.engines.transformers.reading import read_prompt
from adafv.engines.transformers.towers import shape_of
from adafv.errors import UnsupportedModelError

RECORDING = "recording-for-signals"


@dataclass
class Shown:
    """Images or videos of a model, as a family is asked to encode them."""

    model: Any
    family: Family
    modality: str
    visuals: dict[str, Any]
    layouts: list[ImageLayout]

    @classmethod
    def of(cls, row: FamilyRow, model: Any, modality: str) -> "Shown":
        family = family_of(model)
        images, clips = ([2, 1], [0, 0]) if modality == "image" else ([0, 0], [1, 1])
        inputs = make_inputs(row, model, images, videos_per_prompt=clips, seed=5)
        inputs = {family.named(name): value for name, value in inputs.items()}
        visuals = {name: value for name, value in inputs.items() if name in family.inputs(modality)}
        runs = read_prompt(model, family, inputs).runs(modality)
        return cls(model, family, modality, visuals, family.layouts(model, modality, visuals, runs))

    def read(self, *signals: Signal) -> dict[Signal, list[Tensor]]:
        with torch.no_grad():
            return self.family.encode(self.model, self.modality, self.visuals, self.layouts, frozenset(signals)).signals

    def features(self) -> list[Tensor]:
        """What the tower and the projector make of each image; the layers run may be the stock model's own."""
        return self.family.encode(self.model, self.modality, self.visuals, self.layouts, frozenset()).features

    @property
    def tower(self) -> Any:
        towers = self.family.towers(self.model)
        return towers[-1] if self.modality == "video" else towers[0]

    @property
    def layers(self) -> list[Any]:
        return (self.family.tower_shape or shape_of(self.tower)).layers_of(self.tower)

    def attention(self, layer: Any) -> Any:
        return layer.get_submodule((self.family.tower_shape or shape_of(self.tower)).attention)

    @property
    def class_tokens(self) -> int:
        return int((self.family.tower_shape or shape_of(self.tower)).has_class_token)


@dataclass
class Layer:
    """What one layer of the stock tower did."""

    output: Tensor
    """[all patches, E], [CLS] included, in the tower's own order."""
    batch: tuple[int, ...]
    """Leading dimensions of the output."""
    runs: list[tuple[Tensor, Tensor, Tensor, float, Tensor | None]] = field(default_factory=list)
    """Query, key, value ([B, H, N, d]), scaling and mask of each run of its attention."""


@contextmanager
def hooks(modules: list[Any], hook: Callable[..., Any]) -> Iterator[None]:
    """Call `hook(number, output)` behind each module."""

    def behind(number: int) -> Any:
        return lambda module, args, output: hook(number, output)

    handles = [module.register_forward_hook(behind(number)) for number, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def stock_layers(shown: Shown) -> list[Layer]:
    """Of the layers that run; the first entry is what went into the first of them."""
    layers, found = shown.layers, [Layer(torch.empty(0), ()) for _ in range(len(shown.layers) + 1)]
    attentions = [shown.attention(layer) for layer in layers]

    def recording(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
    ) -> Any:
        [number] = [number for number, attention in enumerate(attentions) if attention is module]
        found[number + 1].runs.append((query, key, value, options["scaling"], attention_mask))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)

    def note(number: int, output: Any) -> None:
        states = first_of(output)
        found[number] = Layer(states.flatten(0, -2), tuple(states.shape[:-1]), found[number].runs)

    AttentionInterface.register(RECORDING, recording)
    AttentionMaskInterface.register(RECORDING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config = attentions[0].config
    given = config._attn_implementation
    entering = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: note(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    config._attn_implementation_internal = RECORDING
    try:
        with torch.no_grad(), hooks(layers, lambda number, output: note(number + 1, output)):
            shown.features()
    finally:
        config._attn_implementation_internal = given
        entering.remove()
    return [layer for layer in found if layer.batch]


def patches_of_tokens(shown: Shown, deepest: int) -> list[list[Tensor]]:
    """Per image and token, the patches (of all of the call) whose output of this layer the token's features depend on."""
    states: list[Tensor] = []

    def cut(number: int, output: Any) -> Any:
        states.append(first_of(output).detach().requires_grad_())
        return (states[0], *output[1:]) if isinstance(output, tuple) else states[0]

    with torch.enable_grad(), hooks([shown.layers[deepest - 1]], cut):
        features = shown.features()
    generator = torch.Generator().manual_seed(0)
    members = []
    for image in features:
        seen = torch.randn(image.shape, generator=generator).mul(image).sum(1)
        tokens = []
        for token in seen:
            gradient = None
            if token.requires_grad:
                [gradient] = torch.autograd.grad(token, states, retain_graph=True, allow_unused=True)
            tokens.append(torch.empty(0) if gradient is None else gradient.flatten(0, -2).abs().sum(1).nonzero()[:, 0])
        members.append(tokens)
    return members


def saliency_by_patch(layer: Layer, class_tokens: int) -> Tensor:
    """[all patches], [CLS] included: run by run, image by image, among those that may look at each other."""
    outputs = iter(layer.output.split(1))
    scores = []
    for query, key, value, scaling, mask in layer.runs:
        for place in range(len(query)):
            patches = query.shape[-2]
            output = torch.cat([next(outputs) for _ in range(patches)])
            found = torch.zeros(patches)
            if class_tokens:
                found[1:] = class_attention(query[place], key[place], scaling)
                scores.append(found)
                continue
            allowed = torch.ones(patches, patches, dtype=torch.bool)
            if mask is not None:
                rows = mask.expand(len(query), -1, -1, -1)[place, 0]
                allowed = (rows if rows.dtype == torch.bool else rows > -1).expand(patches, patches)
            for together in allowed.unique(dim=0):
                if together.any():
                    states = (part[place][:, together] for part in (query, key, value))
                    found[together] = patch_saliency(*states, output[together], scaling)  # type: ignore[call-arg]
            scores.append(found)
    return torch.cat(scores)


def by_patch(layer: Layer, kind: str, class_tokens: int) -> Tensor:
    """[all patches, ...] of the stock tower."""
    if kind == "hidden":
        return layer.output
    if kind == "saliency":
        return saliency_by_patch(layer, class_tokens)
    return torch.cat([key.transpose(1, 2).flatten(0, 1) for _, key, _, _, _ in layer.runs])


def in_windows(layers: list[Layer], number: int) -> bool:
    """Whether the layer's attention sees less at a time than that of another layer."""
    return len(layers[number].runs) > min(len(layer.runs) for layer in layers[1:])


@pytest.mark.parametrize("batch", ["image", "video"])
def test_every_layer_is_that_of_the_stock_tower(any_family: FamilyRow, any_model: Any, batch: str) -> None:
    shown = Shown.of(any_family, any_model, batch)
    layers = stock_layers(shown)
    deepest, count = len(layers) - 1, len(shown.layers)
    members = patches_of_tokens(shown, deepest)
    whole = [number for number in range(1, deepest + 1) if not in_windows(layers, number)]
    expected: dict[Signal, tuple[str, int]] = {
        SALIENCY: ("saliency", whole[-1]),
        KEYS: ("keys", whole[-1]),
        HIDDEN: ("hidden", deepest),
        hidden_of(0): ("hidden", 0),
    }
    for number in range(1, deepest + 1):
        counted = [number, number - count - 1]
        expected |= {hidden_of(layer): ("hidden", number) for layer in counted}
        expected |= {keys_of(layer): ("keys", number) for layer in counted}
        if number in whole:
            expected |= {saliency_of(layer): ("saliency", number) for layer in counted}
    shown.family.check_signals(any_model, frozenset(expected))
    found = shown.read(*expected)
    assert found.keys() == expected.keys()
    for signal, (kind, number) in expected.items():
        patches = by_patch(layers[number], kind, shown.class_tokens)
        for values, layout, tokens in zip(found[signal], shown.layouts, members, strict=True):
            assert values.shape == (layout.tokens, *patches.shape[1:]), signal
            shows = layout.shows_patch
            wanted = torch.stack([patches[part].mean(0) for part, one in zip(tokens, shows, strict=True) if one])
            # A saliency is a share of the whole, so its size is one over the number of patches.
            torch.testing.assert_close(values[shows], wanted, atol=1e-6 if kind == "saliency" else 2e-5, rtol=1e-4)
    refused = [*[Signal(kind, layer) for kind in ("saliency", "keys", "hidden") for layer in (count + 1, -count - 2)]]
    refused += [saliency_of(number) for number in range(1, deepest + 1) if number not in whole]
    refused += [keys_of(0), saliency_of(0), saliency_of(-count - 1)]
    if deepest < count:
        refused += [hidden_of(-1), keys_of(count), saliency_of(deepest + 1)]
    for signal in refused:
        with pytest.raises(UnsupportedModelError, match=f"the {signal} cannot be read in {shown.family.name}: .*"):
            shown.family.check_signals(any_model, frozenset({SALIENCY, signal}))
        with pytest.raises(UnsupportedModelError, match=f"the {signal} cannot be read"):
            shown.read(signal)


def test_a_call_that_reads_an_earlier_layer_runs_none_behind_it() -> None:
    """The config says what can be read; `vision_feature_layer` of a call may say less."""
    model, visuals = llava(), {**llava_images(None, [(56, 56)] * 2), "vision_feature_layer": -3}
    family = family_of(model)
    shown = Shown(model, family, "image", visuals, family.layouts(model, "image", visuals, []))
    family.check_signals(model, {hidden_of(-2)})
    with pytest.raises(
        UnsupportedModelError, match=r"hidden of layer -2 .* the projector reads layer 2.*ask for one of 1 to 2"
    ):
        shown.read(hidden_of(-2))
    found = shown.read(HIDDEN, hidden_of(2), hidden_of(-3))
    for one, two, three in zip(*found.values(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("build", [llava, llava_next])
def test_in_training_signals_carry_no_gradient(build: Callable[..., Any]) -> None:
    model = build().train()
    model.model.vision_tower.gradient_checkpointing_enable()
    sizes = [(56, 130), (56, 56)]
    draw = llava_images if build is llava else llava_next_images
    visuals, family = draw(model, sizes), family_of(model)
    layouts = family.layouts(model, "image", visuals, [])
    signals = frozenset({SALIENCY, KEYS, HIDDEN, keys_of(1), hidden_of(0)})
    encoded = family.encode(model, "image", visuals, layouts, signals)
    assert all(part.requires_grad for part in encoded.features)
    assert not any(part.requires_grad for parts in encoded.signals.values() for part in parts)
    sum(part.square().sum() for part in encoded.features).backward()  # type: ignore[union-attr]
    assert model.model.vision_tower.get_submodule("encoder.layers.0.mlp.fc1").weight.grad.abs().sum() > 0


def test_dtypes_and_the_model_itself() -> None:
    """Saliency is float32 whatever the model is; the rest is as the tower has it. Nothing stays behind on the model."""
    model = llava(dtype=torch.bfloat16)
    visuals = {"pixel_values": llava_images(None, [(56, 56)])["pixel_values"].bfloat16()}
    family = family_of(model)
    shown = Shown(model, family, "image", visuals, family.layouts(model, "image", visuals, []))
    found = shown.read(SALIENCY, KEYS, HIDDEN)
    dtypes = {signal: values.dtype for signal, [values] in found.items()}
    assert dtypes == {SALIENCY: torch.float32, KEYS: torch.bfloat16, HIDDEN: torch.bfloat16}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
