"""Can patches that nobody will keep leave inside the tower? After layer l the most salient share of them goes on alone.

    python -m benchmarks.early world  --store early.jsonl --part choose [--questions 600] [--keep 0.1] [--ways drop:2:0.5 ...]
    python -m benchmarks.early photos --store early.jsonl --part choose --model DIR --photos FOLDER [FOLDER ...]
    python -m benchmarks.early saved
    python -m benchmarks.methods report --store early.jsonl --part choose --against adafv

`docs/speed.md` has the results. A way is HOW:LAYER:SHARE. "drop": the patches that [CLS] attends to most in layer LAYER go
on, the others leave. "merge": each of the others is averaged into the one that stays whose key is most like its own (one
step of token merging). "random": any patches go on, which says what the saliency of that layer knows. Behind the tower
AdaFV chooses among what is left, with the saliency of the layer that the projector reads, as always.

The stock tower runs, with hooks; nothing of it is in the library. `saved` counts the arithmetic that the true shapes would
save.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import adafv
from adafv import Pruner
from adafv.core import class_attention
from adafv.core.encoded import EncodedImage
from adafv.core.tokens import SALIENCY, Kept, VisualTokens
from adafv.engines.transformers.families.base import family_of
from adafv.engines.transformers.towers import shape_of
from adafv.methods.adafv import GeometricMean
from benchmarks.accuracy import first_answer_logits
from benchmarks.methods import PARTS, Photos, World, answered

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


@torch.no_grad()
def run(source: World | Photos, ways: Sequence[str], options: argparse.Namespace) -> None:
    done = answered([options.store]) if options.store.exists() else {}
    plain, among = (Pruner(m, options.keep, processor=source.processor) for m in ("adafv", AmongThoseLeft()))
    start, count = time.monotonic(), 0
    with options.store.open("a") as file:
        for batch in source.batches(0, 1):
            wanted = [("full", 1.0), *((word, options.keep) for word in ("adafv", *ways))]
            missing = [key for key in wanted if any(name not in done.get(key, {}) for name in batch.names)]
            if not missing:
                continue
            whole = adafv.encode(source.model, batch.inputs)
            asked = {name: value for name, value in batch.inputs.items() if name != "pixel_values"}
            for word, keep in missing:
                if word == "full":
                    given, pruner = batch.inputs, None
                elif word == "adafv":
                    given, pruner = {**asked, "images": whole}, plain
                else:
                    early = encoded_early(source.model, batch.inputs, whole, Way.of(word))
                    given, pruner = {**asked, "images": early}, among
                right, sure = source.right(first_answer_logits(source.model, given, pruner), batch)
                entry = {"method": word, "keep": keep, "names": batch.names, "images": batch.images}
                entry |= {"kinds": batch.kinds, "right": [int(each) for each in right]}
                file.write(json.dumps(entry | {"sure": [round(each, 5) for each in sure]}) + "\n")
            file.flush()
            count += len(batch.names)
            print(f"{count} questions, {time.monotonic() - start:.0f} s", flush=True)
            if time.monotonic() - start > options.seconds:
                break


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("saved")
    for name in ("world", "photos"):
        command = commands.add_parser(name)
        command.add_argument("--store", required=True, type=Path)
        command.add_argument("--part", choices=PARTS, default="choose")
        command.add_argument("--questions", type=int, default=600)
        command.add_argument("--keep", type=float, default=0.1)
        command.add_argument("--ways", nargs="+", default=WAYS)
        command.add_argument("--batch", type=int, default=100 if name == "world" else 1)
        command.add_argument("--seconds", type=float, default=float("inf"), help="no batch is begun after so many")
    commands.choices["photos"].add_argument("--model", required=True)
    commands.choices["photos"].add_argument("--photos", required=True, type=Path, nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "saved":
        saved()
        return
    if options.command == "world":
        run(World(options.questions, options.part, "llava", None, size=options.batch), options.ways, options)
    else:
        photos = Photos(options.photos, options.questions, options.part, options.model, size=options.batch)
        run(photos, options.ways, options)


if __name__ == "__main__":
    main()
