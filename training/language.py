"""The language model learns from scene text: first as a list of objects, then laid out on the grid of patches.

Every place holds the words for what is there, as the sum of their embeddings: kind and colour of the object, or the
background; and learned vectors for row, column and size. That is what a tower that saw everything would say. The
language model learns to answer from it, while the tower learns to see, each on a core of its own. The list comes first
because finding one of a dozen places is learned in far fewer steps, each a third as long, than finding it among 144.

The word embeddings are random and fixed in these stages and in that of the tower, so that all can use the same ones at
the same time.
"""

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn

from adafv.evaluation.world.details import FINE, DetailedScene
from adafv.evaluation.world.scenes import LARGE, SMALL, Scene
from training.architecture import GRID, WIDTH
from training.batches import patches_in
from training.conversations import Conversations, converse
from training.vocabulary import IDS, PAD

SIZES = 12


@dataclass(frozen=True)
class SceneText:
    conversations: Conversations
    places: Tensor
    """[scenes, places]: patches of the grid, in reading order."""
    kinds: Tensor
    """[scenes, places]: the word for what is there."""
    colours: Tensor
    """[scenes, places]: the word for its colour; PAD on the background."""
    sizes: Tensor
    """[scenes, places]: 0 on the background, else 1 to SIZES."""
    marks: Tensor
    """[scenes, places]: the word for what is written on the tag there; PAD where none is."""


def scene_grid(scenes: list[Scene], random: Random) -> SceneText:
    """Every patch of the grid."""
    places = torch.arange(GRID**2).expand(len(scenes), -1)
    return SceneText(converse(scenes, random, early=True), places, *_patches(scenes))


LISTED = 12


def scene_list(scenes: list[Scene], random: Random) -> SceneText:
    """The patch in the middle of every object, and some others, `LISTED` in all."""
    chosen = []
    for scene in scenes:
        middles = {int(thing.y * GRID) * GRID + int(thing.x * GRID) for thing in scene.things}
        others = [place for place in range(GRID**2) if place not in middles]
        chosen.append(sorted([*middles, *random.sample(others, LISTED - len(middles))]))
    places = torch.tensor(chosen)
    return SceneText(
        converse(scenes, random, LISTED, early=True), places, *(values.gather(1, places) for values in _patches(scenes))
    )


def _patches(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kinds, colours, sizes and marks of all patches, as in `SceneText`."""
    kinds, colours, sizes, marks = (torch.full((len(scenes), GRID**2), PAD) for _ in range(4))
    for number, scene in enumerate(scenes):
        kinds[number] = IDS[scene.background]
        for thing in scene.things:
            half = thing.size / 2
            box = [round(edge * 1000) for edge in (thing.x - half, thing.y - half, thing.x + half, thing.y + half)]
            there = patches_in(tuple(box), 1000)  # type: ignore[arg-type]
            kinds[number, there], colours[number, there] = IDS[thing.kind], IDS[thing.colour]
            share = (thing.size - SMALL[0]) / (LARGE[1] - SMALL[0])
            sizes[number, there] = 1 + min(SIZES - 1, int(share * SIZES))
        if isinstance(scene, DetailedScene):
            for tag in scene.tags:
                column, row = (edge * GRID // FINE for edge in tag.middle)
                marks[number, row * GRID + column] = IDS[tag.mark]
    return kinds, colours, sizes, marks


class GridEmbedding(nn.Module):
    """Stands in for tower and projector in these stages only."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.column = nn.Embedding(GRID, WIDTH), nn.Embedding(GRID, WIDTH)
        self.size = nn.Embedding(SIZES + 1, WIDTH)
        for table in self.children():
            nn.init.normal_(table.weight, std=WIDTH**-0.5)  # type: ignore[arg-type]

    def forward(self, text: SceneText, embed: nn.Embedding) -> Tensor:
        """[scenes, places, WIDTH]."""
        where = self.row(text.places // GRID) + self.column(text.places % GRID)
        paint = embed(text.colours) * (text.colours != PAD).unsqueeze(-1)
        written = embed(text.marks) * (text.marks != PAD).unsqueeze(-1)
        return embed(text.kinds) + paint + written + self.size(text.sizes) + where
