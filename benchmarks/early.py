"""Can patches that nobody will keep leave inside the tower? After layer l the most salient share of them goes on alone.

    python -m benchmarks.early --store early.jsonl --part choose [--count 600] [--keep 10%] [--ways drop:2:0.5 ...]
    python -m benchmarks.early PHOTOS --store photos.jsonl --model DIR --choices Yes,No
    python -m benchmarks.early --saved

`docs/speed.md` has the results. A way is HOW:LAYER:SHARE. "drop": the patches that [CLS] attends to most in layer LAYER go
on, the others leave. "merge": each of the others is averaged into the one that stays whose key is most like its own (one
step of token merging). "random": any patches go on, which says what the saliency of that layer knows. Behind the tower
AdaFV chooses among what is left, with the saliency of the layer that the projector reads, as always.

The stock tower runs, with hooks; nothing of it is in the library. `saved` counts the arithmetic that the true shapes would
save.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from adafv.core import Budget, class_attention
from adafv.core.encoded import EncodedImage
from adafv.core.tokens import SALIENCY, Kept, VisualTokens
from adafv.engines.transformers.families.base import family_of
from adafv.engines.transformers.towers import shape_of
from adafv.evaluation.accuracy import ways_of
from adafv.evaluation.answers import Configuration
from adafv.evaluation.first_token import FirstTokenAsker
from adafv.methods.adafv import GeometricMean
from benchmarks.choosing import answer, loaded, options_of

WAYS = [f"{how}:{layer}:{share}" for share in (0.5, 0.25) for layer in (1, 2, 3, 4) for how in ("drop", "merge")]
GONE = -1.0
"""Saliency of a patch that left: no other is negative."""


@dataclass(frozen=True)
class Way:
    """Which patches leave, and where."""

    how: str
    layer: int
    share: float

    @classmethod
    def of(cls, text: str) -> "Way":
        how, layer, share = text.split(":")
        if how not in ("drop", "merge", "random"):
            raise ValueError(f"{text}: a way is drop, merge or random, as drop:2:0.5")
        return cls(how, int(layer), float(share))


@dataclass(frozen=True)
class AmongThoseLeft(GeometricMean):
    """AdaFV, of the patches that reached the end of the tower."""

    way: Way = Way("drop", 1, 1.0)

    name = "among those left"

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        there = tokens.saliency >= 0
        signals = {SALIENCY: tokens.saliency.clamp_min(0)}
        return super().select(replace(tokens, candidates=tokens.candidates & there, signals=signals), keep)


@dataclass
class _Run:
    """One run of the tower."""

    kept: Tensor | None = None
    """[B, M] long, the patches that went on."""
    saliency: Tensor | None = None
    """[B, M] of the layer that is read."""
    states: Tensor | None = None
    """[B, M, E], its output."""
    given: dict[int, Tensor] = field(default_factory=dict)


def _asked(layer: Any, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(what [CLS] attends to [B, N], keys [B, N, H * d]) of a layer that was given `hidden`."""
    norm = layer.layer_norm1 if hasattr(layer, "layer_norm1") else layer.layernorm_before
    normed = norm(hidden)
    query, key = attention.q_proj(normed[:, :1]), attention.k_proj(normed)
    size = attention.head_dim
    queries, keys = (each.unflatten(-1, (-1, size)).transpose(1, 2) for each in (query, key))
    return class_attention(queries, keys, size**-0.5), key[:, 1:]


def _rows(values: Tensor, places: Tensor) -> Tensor:
    """[B, N, E] at [B, M] -> [B, M, E]."""
    return values.gather(1, places.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _merged(patches: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
    keys = normalize(keys.float(), dim=-1)
    goes_to = (keys @ _rows(keys, kept).transpose(1, 2)).argmax(-1)
    own = torch.arange(kept.shape[1]).expand_as(kept)
    goes_to = goes_to.scatter(1, kept, own)
    share = torch.nn.functional.one_hot(goes_to, kept.shape[1]).to(patches).transpose(1, 2)
    return (share @ patches) / share.sum(-1, keepdim=True)


@contextmanager
def leaving(tower: Any, way: Way, read: int) -> Iterator[_Run]:
    """Within, patches leave the tower as `way` says, and the layer numbered `read` is written down."""
    run, shape = _Run(), shape_of(tower)
    layers = shape.layers_of(tower)

    def before(index: int) -> Any:
        def remember(module: Any, args: Any, kwargs: Any) -> None:
            run.given[index] = args[0] if args else kwargs["hidden_states"]

        return remember

    def attention_of(index: int) -> tuple[Tensor, Tensor]:
        layer = layers[index - 1]
        return _asked(layer, layer.get_submodule(shape.attention), run.given[index])

    def part(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        attention, keys = attention_of(way.layer)
        if way.how == "random":
            attention = torch.rand(attention.shape, generator=torch.Generator().manual_seed(way.layer))
        most = max(1, round(way.share * attention.shape[1]))
        run.kept = attention.topk(most, dim=-1).indices.sort(dim=-1).values
        patches = hidden[:, 1:]
        stays = _merged(patches, keys, run.kept) if way.how == "merge" else _rows(patches, run.kept)
        hidden = torch.cat((hidden[:, :1], stays), dim=1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def end(module: Any, args: Any, output: Any) -> None:
        run.saliency = attention_of(read)[0]
        run.states = (output[0] if isinstance(output, tuple) else output)[:, 1:]

    with ExitStack() as hooks:
        for index in {way.layer, read}:
            hooks.callback(layers[index - 1].register_forward_pre_hook(before(index), with_kwargs=True).remove)
        hooks.callback(layers[read - 1].register_forward_hook(end).remove)
        hooks.callback(layers[way.layer - 1].register_forward_hook(part).remove)
        yield run


def encoded_early(model: Any, inputs: dict[str, Any], whole: Any, way: Way) -> Any:
    """What `adafv.encode` made of the images (`whole`), as it would be if patches left on the way."""
    family, tower = family_of(model), model.model.vision_tower
    layers = len(shape_of(tower).layers_of(tower))
    wanted = family.feature_layers(model)
    assert isinstance(wanted, int)
    read = wanted % (layers + 1)
    if not 1 <= way.layer < read:
        raise ValueError(f"patches leave after a layer from 1 to {read - 1}, not after {way.layer}")
    with leaving(tower, way, read) as run:
        tower(inputs["pixel_values"])
    assert run.states is not None
    assert run.saliency is not None
    assert run.kept is not None
    features, images = family.project(model, run.states), []
    for image, rows, saliency, kept in zip(whole.images["image"], features, run.saliency, run.kept, strict=True):
        all_rows = torch.zeros_like(image.features).index_copy(0, kept, rows)
        all_saliency = torch.full_like(image.saliency, GONE).index_copy(0, kept, saliency)
        images.append(EncodedImage(all_rows, {SALIENCY: all_saliency}, image.layout))
    return replace(whole, images={"image": images}, signals=frozenset({SALIENCY}))


class EarlyAsker(FirstTokenAsker):
    """A model whose patches leave the tower early, where a way's method is one of `AmongThoseLeft`."""

    _way: Way | None = None

    def _answers(self, asked: Any, pictures: Any, way: Configuration, ways: Any) -> Any:
        self._way = way.method.way if isinstance(way.method, AmongThoseLeft) else None
        return super()._answers(asked, pictures, way, ways)

    def _encoded(self, names: Any, inputs: Any, pictures: Any, ways: Any) -> Any:
        whole = super()._encoded(names, inputs, pictures, ways)
        if self._way is None:
            return whole
        with torch.no_grad():
            return encoded_early(self.session.model, inputs, whole, self._way)


def saved() -> None:
    """CLIP-L/336, of which 23 layers run; with Vicuna-7B, whose 6.6e9 weights are read by every column."""
    width, inner, layers, patches, words = 1024, 4096, 23, 576, 54

    def layer(tokens: int) -> float:
        return 2.0 * tokens * (4 * width**2 + 2 * width * inner) + 4.0 * tokens**2 * width

    print("share left | after layer | tower | LLaVA-1.5-7B, 58 kept | LLaVA-NeXT-7B, 144 kept")
    whole = layers * layer(1 + patches)
    for share in (0.5, 0.25):
        for after in (4, 8, 12, 16):
            tower = after * layer(1 + patches) + (layers - after) * layer(1 + round(share * patches))
            totals = []
            for crops, kept in ((1, 58), (5, 144)):
                prefill = 2 * 6.6e9 * (words + kept)
                totals.append((crops * tower + prefill) / (crops * whole + prefill))
            print(f"{share:.0%} | {after} of {layers} | {tower / whole:.2f} | {totals[0]:.2f} | {totals[1]:.2f}")


def main() -> None:
    if sys.argv[1:] == ["--saved"]:
        saved()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", default="10%")
    parser.add_argument("--ways", nargs="+", default=WAYS)
    options = options_of(parser, 600)
    budget = Budget.of(options.keep)
    asked = [*ways_of(["adafv"], [budget])]
    asked += [Configuration(word, budget, AmongThoseLeft(way=Way.of(word))) for word in options.ways]
    asker = EarlyAsker(loaded(options), choices=options.choices, suffix=options.suffix)
    answer(asker, asked, options, ["adafv"])


if __name__ == "__main__":
    main()
