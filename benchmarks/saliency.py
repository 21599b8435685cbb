"""Which score says what is salient in a tower without [CLS]? Candidates against boxes, and against questions.

    python -m benchmarks.saliency areas    --testbed MODEL --photos FOLDER [--scenes 200]
    python -m benchmarks.saliency accuracy --testbed MODEL --photos FOLDER [--questions 1200] [--keep 0.1 0.05]
    python -m benchmarks.saliency accuracy --read PART.json [PART.json ...]
    python -m benchmarks.saliency cost

`docs/saliency.md` has the results and what was chosen.

Why an emulation. The towers at hand have [CLS]. A tower without it is emulated: [CLS] is left out of the queries and
the keys before a score is computed, so the softmax runs over patches alone; the tower's own forward pass stays as it
is. The attention of the real [CLS] is the reference. What this cannot show: a tower that grew up without [CLS] may put
its sinks elsewhere.

Why two halves. With thirty candidates at three depths the best of them is partly lucky. Pictures with an even number
choose, the others confirm; every table shows both halves.

- areas: AUC of each candidate against the boxes of any object ("any": one value per picture) and of each kind of object
  that is in the picture ("kind": one value per kind; its boxes against everything else); and the share of the ten
  percent of patches with the highest score that lie in a box ("top"); and the share of the kinds that have at least one
  of the five percent of patches with the highest score ("reached"). 177 photographs, and drawn scenes.
- accuracy: questions answered with the tokens that a score keeps, by itself and as the saliency in AdaFV's mixture.
  All configurations answer a batch before the next batch begins.
- cost: the time of `patch_saliency` and of cheaper formulas over the time of the tower, measured in turns.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from adafv import Pruner
from adafv.asking.session import Session
from adafv.bundled import bundled_model
from adafv.core import class_attention
from adafv.core.received import patch_saliency, received_attention, sinks
from adafv.core.tokens import SALIENCY, WORDS, Signal
from adafv.evaluation.drawn import held_out, side_for
from adafv.evaluation.statistics import interval
from adafv.evaluation.world.scenes import render, sample_scene
from adafv.images import load_image
from adafv.methods import Kept, Method, VisualTokens, method_named
from training.batches import normalised, patches_in, pixels

PROBE = "adafv_saliency_probe"
SUFFIX = " Answer the question using a single word or phrase."
BATCH = 20
DEPTHS = (0, -2, -4)
"""Layers that are tried, counted from the one whose output the projector reads."""


@dataclass
class Layer:
    """What one layer of the tower shows: [CLS] first, then N patches."""

    query: Tensor
    """[B, H, 1 + N, d] float32, and so are key and value."""
    key: Tensor
    value: Tensor
    scaling: float
    hidden: Tensor
    """[B, 1 + N, D] float32, the layer's output."""

    @cached_property
    def logits(self) -> Tensor:
        """[B, H, N, N] of patches alone: the emulation of a tower without [CLS]."""
        return self.query[:, :, 1:] @ self.key[:, :, 1:].transpose(-1, -2) * self.scaling

    @cached_property
    def attention(self) -> Tensor:
        return self.logits.softmax(dim=-1)

    @cached_property
    def heads(self) -> Tensor:
        """[B, H, N]: attention received by each patch in each head, mean over the queries."""
        return self.attention.mean(dim=-2)

    @cached_property
    def features(self) -> Tensor:
        """[B, N, D]."""
        return self.hidden[:, 1:]


_probed: list[tuple[Tensor, Tensor, Tensor, float]] = []


def _probe(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    _probed.append((query.float(), key.float(), value.float(), scaling))
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(PROBE, _probe)


@torch.no_grad()
def probe(tower: Any, pixel_values: Tensor) -> list[Layer]:
    """Run the tower as it is and note every layer."""
    given = tower.config._attn_implementation
    tower.set_attn_implementation(PROBE)
    _probed.clear()
    states = tower(pixel_values, output_hidden_states=True).hidden_states[1:]
    tower.set_attn_implementation(given)
    found = [Layer(*parts, state.float()) for parts, state in zip(_probed, states, strict=True)]
    _probed.clear()
    return found


def _outliers(values: Tensor) -> Tensor:
    """Above the median by more than five robust standard deviations, [B, N] bool."""
    middle = values.median(dim=-1, keepdim=True).values
    spread = 1.4826 * (values - middle).abs().median(dim=-1, keepdim=True).values
    return values > middle + 5 * spread


def _sinks(layer: Layer) -> Tensor:
    return sinks(layer.features)


def _last(layer: Layer, score: Tensor) -> Tensor:
    """The score, with the sinks behind all other patches."""
    return score.masked_fill(_sinks(layer), 0.0)


def _heads_without(layer: Layer, sinks: Tensor) -> Tensor:
    """[B, H, N]: attention received where `sinks` ([B, N] bool) are neither keys nor queries."""
    attention = layer.logits.masked_fill(sinks[:, None, None], float("-inf")).softmax(dim=-1)
    queries = (~sinks).float()[:, None, :, None]
    return (attention * queries).sum(dim=-2) / queries.sum(dim=-2)


def _apart(values: Tensor) -> Tensor:
    """Distance of each row from the mean of the rows. [..., N, d] -> [..., N]"""
    return (values - values.mean(dim=-2, keepdim=True)).norm(dim=-1)


def _query_deviation(layer: Layer) -> Tensor:
    return _apart(layer.query[:, :, 1:]).mean(dim=1)


def _key_deviation(layer: Layer) -> Tensor:
    return _apart(layer.key[:, :, 1:]).mean(dim=1)


def _value_deviation(layer: Layer) -> Tensor:
    return _apart(layer.value[:, :, 1:]).mean(dim=1)


def _unlike_the_mean(layer: Layer) -> Tensor:
    return 1 - cosine_similarity(layer.features, layer.features.mean(dim=1, keepdim=True), dim=-1)


def _received(layer: Layer) -> Tensor:
    return layer.heads.mean(dim=1)


def _no_diagonal(layer: Layer) -> Tensor:
    itself = torch.eye(layer.logits.shape[-1], dtype=torch.bool)
    return layer.logits.masked_fill(itself, float("-inf")).softmax(dim=-1).mean(dim=(1, 2))


def _clipped(layer: Layer) -> Tensor:
    return layer.heads.minimum(layer.heads.quantile(0.9, dim=-1, keepdim=True)).mean(dim=1)


def _page_rank(layer: Layer) -> Tensor:
    attention = layer.attention.mean(dim=1)
    return (attention.mean(dim=-2).unsqueeze(-2) @ attention)[:, 0]


def _mean_query(layer: Layer) -> Tensor:
    """Also the geometric mean over the queries of the attention received in a head: both are exp(mean logit)."""
    mean = layer.query[:, :, 1:].mean(dim=-2, keepdim=True)
    return (mean @ layer.key[:, :, 1:].transpose(-1, -2) * layer.scaling).softmax(dim=-1).mean(dim=1)[:, 0]


def _centred_queries(layer: Layer) -> Tensor:
    """What all queries share is taken out of them: it is what points at a sink."""
    query = layer.query[:, :, 1:]
    logits = (query - query.mean(dim=-2, keepdim=True)) @ layer.key[:, :, 1:].transpose(-1, -2) * layer.scaling
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def _heads_from_unlike(layer: Layer) -> Tensor:
    weight = _unlike_the_mean(layer)
    weight = weight / weight.sum(dim=-1, keepdim=True)
    return (weight[:, None, None] @ layer.attention)[:, :, 0]


def _lift(layer: Layer) -> Tensor:
    """Received from queries unlike the mean over received from all: a sink gets the same from both."""
    return _heads_from_unlike(layer).mean(dim=1) / _received(layer)


def _leave_one_out(layer: Layer, norm: bool) -> Tensor:
    """How far the layer's attention output would move, were the patch not there: a / (1 - a) * |value - output|."""
    attention, value = layer.attention, layer.value[:, :, 1:]
    moved = attention / (1 - attention).clamp_min(1e-6) * torch.cdist(attention @ value, value)
    return moved.square().sum(dim=(1, 2)).sqrt() if norm else moved.mean(dim=(1, 2))


def _sharp_rows(layer: Layer) -> Tensor:
    entropy = -(layer.attention * layer.attention.clamp_min(1e-12).log()).sum(dim=-1).mean(dim=1)
    return entropy.amax(dim=-1, keepdim=True) - entropy


def _patch_saliency(layer: Layer) -> Tensor:
    query, key, value = (part[:, :, 1:] for part in (layer.query, layer.key, layer.value))
    return patch_saliency(query, key, value, layer.features, layer.scaling)


def _class(layer: Layer) -> Tensor:
    return class_attention(layer.query, layer.key, layer.scaling)


REFERENCE = "[CLS] attention"
RECEIVED = "received"
CHOSEN = "received x value deviation^2, without sinks"
"""`adafv.core.received.patch_saliency`."""
SCORES: dict[str, Callable[[Layer], Tensor]] = {
    REFERENCE: _class,
    # Attention received, mean over heads and queries, and other means.
    RECEIVED: _received,
    "received, no self-attention": _no_diagonal,
    "received, max over queries": lambda layer: layer.attention.mean(dim=1).amax(dim=-2),
    "received, norm over queries": lambda layer: layer.attention.square().sum(dim=-2).sqrt().mean(dim=1),
    "received, spread over queries": lambda layer: layer.attention.std(dim=-2).mean(dim=1),
    "received, max over heads": lambda layer: layer.heads.amax(dim=1),
    "received, median over heads": lambda layer: layer.heads.median(dim=1).values,
    "received, min over heads": lambda layer: layer.heads.amin(dim=1),
    "received, geometric over heads": lambda layer: layer.heads.clamp_min(1e-12).log().mean(dim=1).exp(),
    "mean query": _mean_query,
    # The same with sinks held down.
    "received, clipped at 90 % per head": _clipped,
    "received, without sinks by norm": lambda layer: _heads_without(layer, _sinks(layer)).mean(dim=1),
    "received, without sinks by mass": lambda layer: _heads_without(layer, _outliers(_received(layer))).mean(dim=1),
    "received, centred queries": _centred_queries,
    # Some queries count more.
    "received, twice (page rank)": _page_rank,
    "received, from unlike queries": lambda layer: _heads_from_unlike(layer).mean(dim=1),
    "received, lift": _lift,
    # What is received, weighted by what is sent.
    "received x value norm": lambda layer: (layer.heads * layer.value[:, :, 1:].norm(dim=-1)).mean(dim=1),
    "received x value deviation": lambda layer: (layer.heads * _apart(layer.value[:, :, 1:])).mean(dim=1),
    "received x feature deviation": lambda layer: _received(layer) * _apart(layer.features),
    "received x value deviation^2": lambda layer: (layer.heads * _apart(layer.value[:, :, 1:]).square()).mean(dim=1),
    CHOSEN: _patch_saliency,
    "from unlike x value deviation, without sinks": lambda layer: _last(
        layer, (_heads_from_unlike(layer) * _apart(layer.value[:, :, 1:])).mean(dim=1)
    ),
    "leave one out, mean": lambda layer: _leave_one_out(layer, norm=False),
    "leave one out, norm": lambda layer: _leave_one_out(layer, norm=True),
    "leave one out, norm, without sinks": lambda layer: _last(layer, _leave_one_out(layer, norm=True)),
    # No attention at all.
    "value deviation": _value_deviation,
    "value deviation, without sinks": lambda layer: _last(layer, _value_deviation(layer)),
    "key deviation": _key_deviation,
    "query deviation": _query_deviation,
    "query x key deviation": lambda layer: _query_deviation(layer) * _key_deviation(layer),
    "value x key deviation": lambda layer: _value_deviation(layer) * _key_deviation(layer),
    "attention output deviation": lambda layer: _apart(layer.attention @ layer.value[:, :, 1:]).mean(dim=1),
    "feature deviation": lambda layer: _apart(layer.features),
    "feature unlike the mean (cosine)": _unlike_the_mean,
    "sharpness of the patch's own attention": _sharp_rows,
    "feature norm": lambda layer: layer.features.norm(dim=-1),
    "value norm": lambda layer: layer.value[:, :, 1:].norm(dim=-1).mean(dim=1),
    "key norm": lambda layer: layer.key[:, :, 1:].norm(dim=-1).mean(dim=1),
    "query norm": lambda layer: layer.query[:, :, 1:].norm(dim=-1).mean(dim=1),
}
OVER_LAYERS = (
    REFERENCE,
    RECEIVED,
    CHOSEN,
    "value deviation",
    "query x key deviation",
    "leave one out, norm, without sinks",
)
"""Scores that are also summed over the layers at all depths, each layer's normalised to sum 1."""
RANDOM = "random"
CENTRE = "distance to the border"
"""Looks at nothing: what the habit of photographers to put things in the middle is worth."""


def named(score: str, depth: int) -> str:
    return score if depth == 0 else f"{score} @ {depth}"


def scores_of(layers: list[Layer], tapped: int) -> dict[str, Tensor]:
    """Every candidate, [B, N], non-negative. `tapped` is the index of the layer whose output the projector reads."""
    found = {named(name, depth): score(layers[tapped + depth]) for depth in DEPTHS for name, score in SCORES.items()}
    for name in OVER_LAYERS:
        parts = [found[named(name, depth)] for depth in DEPTHS]
        parts = [part / part.sum(dim=-1, keepdim=True) for part in parts]
        found[f"{name}, three layers"] = torch.stack(parts).mean(dim=0)
    tokens = layers[tapped].features.shape[1]
    side = round(tokens**0.5)
    found[RANDOM] = torch.rand(tokens, generator=torch.Generator().manual_seed(0)).expand(
        len(layers[tapped].hidden), -1
    )
    place = torch.minimum(torch.arange(side), side - 1 - torch.arange(side)).float()
    found[CENTRE] = torch.minimum(place[:, None], place[None]).flatten().expand(len(layers[tapped].hidden), -1)
    return found


def tapped_layer(model: Any) -> int:
    """Index of the layer whose output the projector reads."""
    layer = model.config.vision_feature_layer
    count = model.config.vision_config.num_hidden_layers
    return int((layer if layer >= 0 else layer + count + 1) - 1)


@dataclass
class Found:
    """One world's values: per measure and candidate, one value per thing measured."""

    title: str
    values: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    pictures: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, measure: str, picture: int, values: dict[str, float]) -> None:
        self.pictures[measure].append(picture)
        for name, value in values.items():
            self.values[measure][name].append(value)

    def cell(self, measure: str, name: str, half: int | None = None, minus: str | None = None) -> str:
        """Mean and 95 % interval, times 100; of the pictures whose number is `half` modulo 2; against another."""
        pictures = self.pictures[measure]
        chosen = [i for i, picture in enumerate(pictures) if half is None or picture % 2 == half]
        if not chosen:
            return ""
        values = self.values[measure]
        differences = [values[name][i] - (values[minus][i] if minus else 0.0) for i in chosen]
        mean, width = interval(differences, [pictures[i] for i in chosen])
        return f"{100 * mean:{'+' if minus else ''}.1f} ± {100 * width:.1f}"

    def mean(self, measure: str, name: str, half: int) -> float:
        pictures, values = self.pictures[measure], self.values[measure][name]
        chosen = [value for value, picture in zip(values, pictures, strict=True) if picture % 2 == half]
        return sum(chosen) / len(chosen)


def _areas(scores: dict[str, Tensor], there: Tensor) -> dict[str, float]:
    """AUC of every candidate ([N]) for the patches in `there` ([N] bool) against all others."""
    stacked = torch.stack([scores[name] for name in scores])
    inside, outside = stacked[:, there].unsqueeze(-1), stacked[:, ~there].unsqueeze(-2)
    area = ((inside > outside).float() + 0.5 * (inside == outside).float()).mean(dim=(1, 2))
    return dict(zip(scores, area.tolist(), strict=True))


def _measure(found: Found, picture: int, scores: dict[str, Tensor], boxes: dict[str, Tensor]) -> None:
    """Add the areas of one picture; `boxes` holds the patches of each kind, [N] bool."""
    every = torch.stack([*boxes.values()]).any(dim=0)
    if 0 < every.sum() < every.numel():
        found.add("any", picture, _areas(scores, every))
        keep = round(every.numel() / 10)
        tops = {name: float(every[score.topk(keep).indices].float().mean()) for name, score in scores.items()}
        found.add("top", picture, tops)
        keep = round(every.numel() / 20)
        reached = {}
        for name, score in scores.items():
            chosen = score.topk(keep).indices
            reached[name] = sum(float(there[chosen].any()) for there in boxes.values()) / len(boxes)
        found.add("reached", picture, reached)
    for there in boxes.values():
        if 0 < there.sum() < there.numel():
            found.add("kind", picture, _areas(scores, there))


def patches_of_boxes(boxes: Sequence[Sequence[float]], width: int, height: int, side: int) -> Tensor:
    """[side * side] bool: patches with their middle in one of the boxes (left, top, right, bottom), in pixels."""
    middle = (torch.arange(side) + 0.5) / side
    inside = torch.zeros(side, side, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        rows = (middle * height >= top) & (middle * height < bottom)
        columns = (middle * width >= left) & (middle * width < right)
        inside |= rows[:, None] & columns[None]
    return inside.flatten()


def loaded(folder: str = "", dtype: str = "float32") -> Session:
    """A model of the testbed, or the bundled one."""
    return Session.load(folder or str(bundled_model()), dtype, torch.device("cpu"))


@torch.no_grad()
def first_logits(session: Session, inputs: Any, pruner: Pruner | None = None) -> Tensor:
    """[batch, vocabulary], of the first token of each answer."""
    with nullcontext() if pruner is None else pruner(session.model):
        logits: Tensor = session.model(**inputs, logits_to_keep=1).logits[:, -1]
    return logits


def photo_areas(testbed: str, photos: Path) -> Found:
    session = loaded(testbed, "bfloat16")
    tower, tapped = session.model.model.vision_tower, tapped_layer(session.model)
    found = Found("photographs")
    corners, sharpest = 0, 0.0
    facts = json.loads((photos / "images.json").read_text())
    for number, (name, about) in enumerate(facts.items()):
        image = session.processor.image_processor(load_image(str(photos / "images" / name)), return_tensors="pt")
        layers = probe(tower, image["pixel_values"].to(session.model.dtype))
        scores = {name: score[0] for name, score in scores_of(layers, tapped).items()}
        side = round(scores[REFERENCE].numel() ** 0.5)
        kinds: dict[str, list[list[float]]] = defaultdict(list)
        for kind, *box in about["boxes"]:
            kinds[kind].append(box)
        boxes = {kind: patches_of_boxes(of, about["width"], about["height"], side) for kind, of in kinds.items()}
        _measure(found, number, scores, boxes)
        corners += int(scores[RECEIVED].argmax()) in (0, side - 1, side * (side - 1), side * side - 1)
        sharpest += float(scores[RECEIVED].amax() / scores[RECEIVED].sum()) / len(facts)
    print(f"photographs: most received by a corner in {corners} of {len(facts)}; its mean share {sharpest:.3f}")
    return found


def scene_areas(scenes: int) -> Found:
    model = loaded().model
    tower, tapped = model.model.vision_tower, tapped_layer(model)
    found = Found("drawn scenes")
    for number in range(scenes):
        scene = sample_scene("validation", number)
        images, [boxes] = pixels([scene], Random(number))
        scores = {name: score[0] for name, score in scores_of(probe(tower, normalised(images)), tapped).items()}
        kinds: dict[str, Tensor] = {}
        for thing, box in zip(scene.things, boxes, strict=True):
            there = patches_in(box)
            kinds[thing.kind] = kinds[thing.kind] | there if thing.kind in kinds else there
        _measure(found, number, scores, kinds)
    return found


MEASURES = ("any", "kind", "top", "reached")


def report_areas(worlds: list[Found], rows: int, console: Console) -> None:
    columns = [(world, measure) for world in worlds for measure in MEASURES]
    names = [*worlds[0].values["any"]]
    halves = [
        {name: sum(world.mean(measure, name, half) for world, measure in columns) / len(columns) for name in names}
        for half in (0, 1)
    ]
    names.sort(key=lambda name: -halves[0][name])
    shown = [name for place, name in enumerate(names) if place < rows or name in (REFERENCE, RECEIVED, RANDOM, CENTRE)]
    for minus in (None, RECEIVED):
        title = "times 100, all pictures, 95 % intervals; means of the choosing and the confirming half"
        table = Table(title=title + (f"; minus {minus}, paired" if minus else ""))
        table.add_column("score")
        for heading in ("choosing", "confirming", *(f"{world.title}: {measure}" for world, measure in columns)):
            table.add_column(heading, justify="right")
        for name in shown:
            means = [f"{100 * (half[name] - (half[minus] if minus else 0)):.1f}" for half in halves]
            table.add_row(name, *means, *(world.cell(measure, name, None, minus) for world, measure in columns))
        console.print(table)


@dataclass(frozen=True)
class Given(Method):
    """Saliency that was computed elsewhere: kept by itself, or mixed as AdaFV mixes."""

    mixed: bool = False
    scores: list[Tensor] = field(default_factory=list)
    """One entry, [images, N] or [1, N] for a batch about one picture; replaced before each call."""

    name = "given"
    summary = "saliency that was computed elsewhere"

    @property
    def needs(self) -> frozenset[Signal]:  # type: ignore[override]
        return frozenset({WORDS} if self.mixed else ())

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        saliency = self.scores[0].expand(tokens.features.shape[0], -1)
        return method_named("adafv" if self.mixed else "saliency").select(
            replace(tokens, signals={SALIENCY: saliency}), keep
        )


@dataclass
class Arm:
    """One configuration: a score, alone or mixed, at a budget."""

    score: str
    mixed: bool
    keep: float
    pruner: Pruner
    scores: list[Tensor]

    @property
    def name(self) -> str:
        return f"{'mixed' if self.mixed else 'alone'} @ {self.keep}"


def arms_of(scores: Sequence[str], keeps: Sequence[float], processor: Any) -> list[Arm]:
    made = []
    for keep in keeps:
        for mixed in (False, True):
            for score in scores:
                given: list[Tensor] = []
                pruner = Pruner(Given(mixed, given), keep, processor=processor)
                made.append(Arm(score, mixed, keep, pruner, given))
    return made


def _give(arms: list[Arm], scores: dict[str, Tensor], seed: int) -> None:
    shape = scores[REFERENCE].shape
    scores = scores | {RANDOM: torch.rand(shape, generator=torch.Generator().manual_seed(seed))}
    for arm in arms:
        arm.scores[:] = [scores[arm.score]]


def photo_answers(
    testbed: str, photos: Path, names: Sequence[str], keeps: Sequence[float], share: tuple[int, int]
) -> Found:
    session = loaded(testbed, "bfloat16")
    tower, tapped = session.model.model.vision_tower, tapped_layer(session.model)
    arms = arms_of(names, keeps, session.processor)
    words = [session.processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No")]
    by_image: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in (photos / "presence.jsonl").read_text().splitlines():
        question = json.loads(line)
        by_image[question["image"]].append(question)
    found = Found("photographs")
    start = time.monotonic()
    # The same numbers as in `photo_areas`, so that a picture is in the same half of both.
    numbers = {name: number for number, name in enumerate(json.loads((photos / "images.json").read_text()))}
    wanted = [image for image in by_image if numbers[image] % share[1] == share[0]]
    for done, image in enumerate(wanted, 1):
        questions = by_image[image]
        picture = load_image(str(photos / "images" / image))
        inputs = session.batch([picture] * len(questions), [question["text"] + SUFFIX for question in questions])
        labels = [question["label"] == "yes" for question in questions]
        _give(arms, scores_of(probe(tower, inputs["pixel_values"][:1]), tapped), numbers[image])

        def right(logits: Tensor, labels: list[bool] = labels) -> list[float]:
            yes, no = logits[:, words].unbind(-1)
            return [float(answer == label) for answer, label in zip((yes > no).tolist(), labels, strict=True)]

        full = right(first_logits(session, inputs))
        given = [(arm, right(first_logits(session, inputs, arm.pruner))) for arm in arms]
        _add_answers(found, [numbers[image]] * len(labels), full, given)
        if done % 20 == 0:
            print(f"{done} photographs, {time.monotonic() - start:.0f} s", flush=True)
    return found


def scene_answers(count: int, names: Sequence[str], keeps: Sequence[float], share: tuple[int, int]) -> Found:
    session = loaded()
    tower, tapped = session.model.model.vision_tower, tapped_layer(session.model)
    arms = arms_of(names, keeps, session.processor)
    found = Found("drawn scenes")
    questions = [asked for asked in held_out(count) if asked[0].number % share[1] == share[0]]
    start = time.monotonic()
    for first in range(0, len(questions), BATCH):
        batch = questions[first : first + BATCH]
        images = [render(scene, side_for(session.model))[0] for scene, _ in batch]
        inputs = session.batch(images, [question.text for _, question in batch])
        _give(arms, scores_of(probe(tower, inputs["pixel_values"]), tapped), first)

        def right(logits: Tensor, batch: Any = batch) -> list[float]:
            said = [session.processor.decode([token]) for token in logits.argmax(-1).tolist()]
            return [float(word == question.answer) for word, (_, question) in zip(said, batch, strict=True)]

        full = right(first_logits(session, inputs))
        given = [(arm, right(first_logits(session, inputs, arm.pruner))) for arm in arms]
        _add_answers(found, [scene.number for scene, _ in batch], full, given)
        if (first // BATCH) % 10 == 9:
            print(f"{first + BATCH} questions, {time.monotonic() - start:.0f} s", flush=True)
    return found


def read_parts(files: Sequence[Path]) -> list[Found]:
    """What `--json` wrote, put together: a long run can be split with `--share`."""
    worlds: dict[str, Found] = {}
    for file in files:
        for title, written in json.loads(file.read_text()).items():
            world = worlds.setdefault(title, Found(title))
            for measure, pictures in written["pictures"].items():
                world.pictures[measure] += pictures
                for name, values in written["values"][measure].items():
                    world.values[measure][name] += values
    return [*worlds.values()]


def _add_answers(found: Found, pictures: list[int], full: list[float], given: list[tuple[Arm, list[float]]]) -> None:
    for measure in dict.fromkeys(arm.name for arm, _ in given):
        found.pictures[measure] += pictures
        found.values[measure]["full"] += full
    for arm, values in given:
        found.values[arm.name][arm.score] += values


def report_answers(world: Found, console: Console) -> None:
    for measure, values in world.values.items():
        table = Table(title=f"{world.title}, {measure}: percent right of {len(values['full'])} questions")
        for heading in ("score", "all", "- received", "- [CLS]", "choosing: - received", "confirming: - received"):
            table.add_column(heading, justify="left" if heading == "score" else "right")
        for name in values:
            cells = [world.cell(measure, name)]
            for half, other in ((None, RECEIVED), (None, REFERENCE), (0, RECEIVED), (1, RECEIVED)):
                cells.append("" if name == other else world.cell(measure, name, half, other))
            table.add_row(name, *cells)
        console.print(table)


def _siglip(layers: int, side: int) -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=side,
        patch_size=14,
        vision_use_head=False,
    )
    torch.manual_seed(0)
    return SiglipVisionModel(config).eval().to(torch.bfloat16)


@torch.no_grad()
def cost(rounds: int, side: int, console: Console) -> None:
    """The scores on one layer of SigLIP-so400m (16 heads of 72; 729 patches at 378 pixels) over the time of its 27 layers.

    Three layers are run and their time is scaled: a tower's time is its layers' time.
    """
    layers = 3
    tower = _siglip(layers, side)
    images = torch.randn(1, 3, side, side, dtype=torch.bfloat16)
    tower.set_attn_implementation(PROBE)
    _probed.clear()
    tower(images)
    scaling = _probed[-1][3]
    query, key, value = (part.bfloat16() for part in _probed[-1][:3])
    features = torch.randn(1, query.shape[-2], 1152, dtype=torch.bfloat16)
    _probed.clear()
    tower.set_attn_implementation("sdpa")

    def mean_query() -> Tensor:
        mean = query.float().mean(dim=-2, keepdim=True)
        return (mean @ key.float().transpose(-1, -2) * scaling).softmax(dim=-1).mean(dim=-3)

    timed: dict[str, Callable[[], Any]] = {
        "patch_saliency": lambda: patch_saliency(query, key, value, features, scaling),
        "received_attention": lambda: received_attention(query, key, scaling),
        "mean query": mean_query,
        "value deviation": lambda: _apart(value.float()).mean(dim=1),
    }
    ratios: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, score in timed.items():
            start = time.perf_counter()
            tower(images)
            middle = time.perf_counter()
            score()
            ratios[name].append((time.perf_counter() - middle) / ((middle - start) * 27 / layers))
    shape = f"{(side // 14) ** 2} patches, 27 layers of SigLIP-so400m"
    table = Table(title=f"Time of a score over that of the tower ({shape}), median and quartiles of {rounds}")
    table.add_column("score")
    table.add_column("ratio", justify="right")
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        table.add_row(name, f"{100 * middle:.2f} % ({100 * low:.2f} to {100 * high:.2f})")
    console.print(table)


FINALISTS = (REFERENCE, RECEIVED, RANDOM, CHOSEN)


def main() -> None:
    parser = argparse.ArgumentParser(description="Saliency for towers without [CLS].")
    parser.add_argument("section", choices=("areas", "accuracy", "cost"))
    parser.add_argument("--testbed", help="folder with the assembled testbed model; without it, scenes alone")
    parser.add_argument("--photos", type=Path, help="folder with images/, images.json and presence.jsonl")
    parser.add_argument("--scenes", type=int, default=200, help="number of drawn scenes for the areas")
    parser.add_argument("--questions", type=int, default=1200, help="questions about drawn scenes; 0: none")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.1, 0.05])
    parser.add_argument("--only", nargs="+", default=list(FINALISTS), help="scores to ask with")
    parser.add_argument("--rows", type=int, default=1000, help="how many of the best scores to print")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--side", type=int, default=378, help="pixels of the picture whose cost is measured")
    parser.add_argument("--share", default="0/1", help="R/M: pictures whose number leaves R when divided by M")
    parser.add_argument("--read", type=Path, nargs="+", default=[], help="print these --json files; run nothing")
    parser.add_argument("--json", type=Path, help="write every single value here")
    options = parser.parse_args()
    if (options.testbed is None) != (options.photos is None):
        parser.error("--testbed and --photos go together")
    share = (int(options.share.split("/")[0]), int(options.share.split("/")[1]))
    torch.set_num_threads(1)
    console = Console(width=150)
    if options.section == "cost":
        cost(options.rounds, options.side, console)
        return
    worlds = read_parts(options.read)
    if options.section == "areas":
        if options.testbed and not options.read:
            worlds.append(photo_areas(options.testbed, options.photos))
        if not options.read:
            worlds.append(scene_areas(options.scenes))
        report_areas(worlds, options.rows, console)
    else:
        names, keeps, count = options.only, options.keep, options.questions
        if options.testbed and not options.read:
            worlds.append(photo_answers(options.testbed, options.photos, names, keeps, share))
        if count and not options.read:
            worlds.append(scene_answers(count, names, keeps, share))
        for world in worlds:
            report_answers(world, console)
    if options.json:
        written = {world.title: {"values": world.values, "pictures": world.pictures} for world in worlds}
        options.json.write_text(json.dumps(written))


if __name__ == "__main__":
    main()
