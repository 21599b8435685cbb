"""What is trained for: answers, words that find their patches, and a [CLS] that knows the caption."""

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from adafv.evaluation.world.backgrounds import BACKGROUNDS
from adafv.evaluation.world.objects import COLOURS, KINDS
from adafv.evaluation.world.scenes import Box, Scene
from training.architecture import GRID, WIDTH
from training.batches import patches_in
from training.conversations import IGNORED, Conversations
from training.vocabulary import IDS, IMAGE

_PAINT_NAMES = tuple(COLOURS)
THINGS = [IDS[word] for word in (*KINDS, *BACKGROUNDS)]
"""Token ids of what a patch can show."""
PAINTS = [IDS[word] for word in _PAINT_NAMES]

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
        self.log_scale_embed = nn.Parameter(torch.full((3,), math.log(20.0)))
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
        texts = normalize(torch.cat((things, colours, pairs)), dim=-1)
        logits = scale[2] * normalize(self.from_class(pooled), dim=-1) @ texts.T + self.bias_embed
        class_loss = binary_cross_entropy_with_logits(logits, shown.said, reduction="sum") / len(pooled)
        return patch_loss, class_loss


@dataclass(frozen=True)
class Shown:
    """What pictures show, in numbers."""

    things: Tensor
    """[scenes, patches]: place in THINGS of the kind whose box the patch lies in, or of the background."""
    colours: Tensor
    """[scenes, patches]: place in PAINTS of the object's colour; -1 on the background."""
    said: Tensor
    """[scenes, things + paints + pairs] float: 1 where the caption says so."""


def shown(scenes: list[Scene], boxes: list[list[Box]], random: Random) -> Shown:
    things, colours = (torch.full((len(scenes), GRID**2), -1) for _ in range(2))
    said = torch.zeros(len(scenes), len(THINGS) + len(PAINTS) + len(KINDS) * len(PAINTS))
    for number, scene in enumerate(scenes):
        ground = len(KINDS) + BACKGROUNDS.index(scene.background)
        things[number], said[number, ground] = ground, 1
        for thing, box in zip(scene.things, boxes[number], strict=True):
            there, kind, paint = patches_in(box), KINDS.index(thing.kind), _PAINT_NAMES.index(thing.colour)
            things[number, there], colours[number, there] = kind, paint
            if not thing.faint or random.random() < 0.5:
                pair = len(THINGS) + len(PAINTS) + kind * len(PAINTS) + paint
                said[number, [kind, len(THINGS) + paint, pair]] = 1
    return Shown(things, colours, said)
