"""What is trained for: answers, words that find their patches, and a [CLS] that knows the caption."""

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from adafv.evaluation.world.backgrounds import BACKGROUNDS
from adafv.evaluation.world.details import FINE, MARKS, DetailedScene
from adafv.evaluation.world.objects import COLOURS, KINDS
from adafv.evaluation.world.scenes import Box, Scene, Thing
from training.architecture import GRID, SIDE, WIDTH
from training.batches import patches_in
from training.conversations import IGNORED, Conversations
from training.vocabulary import IDS, IMAGE

_PAINT_NAMES = tuple(COLOURS)
THINGS = [IDS[word] for word in (*KINDS, *BACKGROUNDS)]
"""Token ids of what a patch can show."""
PAINTS = [IDS[word] for word in _PAINT_NAMES]
WRITTEN = [IDS[word] for word in MARKS]

CAPTION_WEIGHT = 0.2
"""Of a caption's token against an answer's: which faint objects a caption names, and in which order, is chance."""


def answer_loss(
    language: nn.Module, embed: nn.Embedding, visual: Tensor, talk: Conversations
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of the answers, given the visual tokens.

    Args:
        language: the language model without its head.
        visual: [scenes, tokens, WIDTH], in place of the image placeholders.

    Returns:
        loss, and for the first label of every question, in reading order: [questions] whether it was right, and its place.
    """
    embedded = embed(talk.ids)
    places = (talk.ids == IMAGE).unsqueeze(-1)
    embedded = embedded.masked_scatter(places, visual.to(embedded.dtype))
    states = language(inputs_embeds=embedded, use_cache=False).last_hidden_state
    chosen = talk.labels != IGNORED
    logits = (states[chosen] @ embed.weight.T.to(states.dtype)).float()
    labels = talk.labels[chosen]
    each = cross_entropy(logits, labels, reduction="none")
    weights = torch.where(talk.captions[chosen], CAPTION_WEIGHT, 1.0)
    return (each * weights).sum() / weights.sum(), logits.argmax(-1) == labels, chosen


class Alignment(nn.Module):
    """Contrast of pictures with captions: [CLS] against what a caption says, patches against the words for what they show.

    The texts are the language model's own word embeddings, so no forward pass of a language model is needed. A phrase
    ("red key") is the sum of its words.

    The patches' part is late interaction with grounded captions: a phrase comes with the box that it speaks of, and a
    patch belongs to the phrases of the box it lies in. Captions without boxes had localised nothing after 150 batches
    (AUC 0.50), where these had reached 0.77. [CLS] has to find its words by itself: it knows no boxes, and of the faint
    objects captions name one in two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.from_class = nn.Linear(WIDTH, WIDTH)
        self.log_scale_embed = nn.Parameter(torch.full((4,), math.log(20.0)))
        self.bias_embed = nn.Parameter(torch.tensor(-8.0))

    def forward(self, embed: Tensor, visual: Tensor, pooled: Tensor, shown: "Shown") -> tuple[Tensor, Tensor]:
        """The two losses: of the patches and of [CLS].

        Args:
            embed: [words, WIDTH], the word embeddings.
            visual: [scenes, patches, WIDTH], projected visual tokens.
            pooled: [scenes, WIDTH], [CLS] after the tower.
            shown: what the pictures show.
        """
        things, colours = embed[THINGS], embed[PAINTS]
        pairs = (things[: len(KINDS), None] + colours[None]).flatten(0, 1)
        scale = self.log_scale_embed.exp()
        patches, there = normalize(visual.flatten(0, 1), dim=-1), shown.things.flatten()
        on_object = shown.colours.flatten() >= 0
        patches_on, things_on, colours_on = patches[on_object], there[on_object], shown.colours.flatten()[on_object]
        patch_loss = (
            cross_entropy(scale[0] * patches @ normalize(things, dim=-1).T, there)
            + 0.5 * cross_entropy(scale[0] * patches_on @ normalize(colours, dim=-1).T, colours_on)
            + 0.5
            * cross_entropy(scale[1] * patches_on @ normalize(pairs, dim=-1).T, things_on * len(COLOURS) + colours_on)
        )
        if shown.marks is not None:
            there = shown.marks.flatten()
            tagged = there >= 0
            written = normalize(embed[WRITTEN], dim=-1)
            patch_loss = patch_loss + cross_entropy(scale[3] * patches[tagged] @ written.T, there[tagged])
        texts = normalize(torch.cat((things, colours, pairs)), dim=-1)
        logits = scale[2] * normalize(self.from_class(pooled), dim=-1) @ texts.T + self.bias_embed
        class_loss = binary_cross_entropy_with_logits(logits, shown.said, reduction="sum") / len(pooled)
        return patch_loss, class_loss


@dataclass(frozen=True)
class View:
    """What one picture for the tower shows: a whole scene, or a quarter of one."""

    background: str
    things: tuple[tuple[Thing, Box], ...]
    """With their boxes in its pixels, of which it has `SIDE` x `SIDE`."""
    named: tuple[bool, ...]
    """Whether enough of the thing is in it to be named."""
    marks: tuple[tuple[int, str], ...] = ()
    """(patch, what is written on the tag there), where it can be read."""


def whole(scene: Scene, boxes: list[Box]) -> View:
    """The scene in one picture; tags cannot be read in it."""
    return View(scene.background, tuple(zip(scene.things, boxes, strict=True)), (True,) * len(boxes))


def quarters(scene: Scene, boxes: list[Box]) -> list[View]:
    """The four quarters in reading order, from boxes in a picture of 2 `SIDE`."""
    views = []
    for down in (0, SIDE):
        for across in (0, SIDE):
            things, named = [], []
            for thing, (left, top, right, bottom) in zip(scene.things, boxes, strict=True):
                box = (
                    max(0, left - across),
                    max(0, top - down),
                    min(SIDE, right - across),
                    min(SIDE, bottom - down),
                )
                width, height = box[2] - box[0], box[3] - box[1]
                if width >= SIDE // GRID // 2 and height >= SIDE // GRID // 2:
                    things.append((thing, box))
                    named.append(3 * width * height >= (right - left) * (bottom - top))
            marks = []
            for tag in scene.tags if isinstance(scene, DetailedScene) else ():
                x, y = (edge * 2 * SIDE // FINE for edge in tag.middle)
                if across <= x < across + SIDE and down <= y < down + SIDE:
                    marks.append(((y - down) * GRID // SIDE * GRID + (x - across) * GRID // SIDE, tag.mark))
            views.append(View(scene.background, tuple(things), tuple(named), tuple(marks)))
    return views


@dataclass(frozen=True)
class Shown:
    """What pictures show, in numbers."""

    things: Tensor
    """[pictures, patches]: place in THINGS of the kind whose box the patch lies in, or of the background."""
    colours: Tensor
    """[pictures, patches]: place in PAINTS of the object's colour; -1 on the background."""
    said: Tensor
    """[pictures, things + paints + pairs] float: 1 where the caption says so."""
    marks: Tensor | None
    """[pictures, patches]: place in MARKS of what is written there, -1 where nothing is; None if nothing is anywhere."""


def shown(views: list[View], random: Random) -> Shown:
    things, colours, marks = (torch.full((len(views), GRID**2), -1) for _ in range(3))
    said = torch.zeros(len(views), len(THINGS) + len(PAINTS) + len(KINDS) * len(PAINTS))
    for number, view in enumerate(views):
        ground = len(KINDS) + BACKGROUNDS.index(view.background)
        things[number], said[number, ground] = ground, 1
        for (thing, box), named in zip(view.things, view.named, strict=True):
            there, kind, paint = patches_in(box), KINDS.index(thing.kind), _PAINT_NAMES.index(thing.colour)
            things[number, there], colours[number, there] = kind, paint
            if named and (not thing.faint or random.random() < 0.5):
                pair = len(THINGS) + len(PAINTS) + kind * len(PAINTS) + paint
                said[number, [kind, len(THINGS) + paint, pair]] = 1
        for patch, mark in view.marks:
            marks[number, patch] = MARKS.index(mark)
    return Shown(things, colours, said, marks if any(view.marks for view in views) else None)
