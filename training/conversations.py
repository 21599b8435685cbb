"""Conversations about scenes as token ids: the visual tokens first, then questions with their answers.

Several questions share one picture, as in LLaVA's own data: most of the work is reading the picture.
"""

from dataclasses import dataclass
from functools import cache
from random import Random

import torch
from torch import Tensor

from adafv.evaluation.world.details import MARKS, DetailedScene, ask_detail
from adafv.evaluation.world.objects import KINDS
from adafv.evaluation.world.questions import ask, caption, plural
from adafv.evaluation.world.scenes import Scene
from training.architecture import VISUAL_TOKENS
from training.vocabulary import ASSISTANT, END, IMAGE, PAD, UNKNOWN, USER, describe, tokenizer

QUESTIONS = 7
"""Questions a picture."""
IGNORED = -100
WEIGHTS = {"presence": 3, "colour": 3, "counting": 4, "place": 5, "relation": 6, "size": 2, "background": 1}
"""How often each kind of question is put in training: the harder, the more. With all alike, "where" was not learned."""

DETAIL_WEIGHTS = {"letter": 8, "pattern": 5, "marked": 7}
"""Of the questions that only scenes with details are asked, beside the others."""

_tokenizer = tokenizer()
_NAMING_IDS = {_tokenizer.convert_tokens_to_ids(word) for word in (*KINDS, *map(plural, KINDS), *MARKS)} - {UNKNOWN}


@dataclass(frozen=True)
class Conversations:
    ids: Tensor
    """[scenes, length] int64, padded on the right."""
    labels: Tensor
    """[scenes, length]: the token to be said at this place, already shifted; IGNORED elsewhere."""
    captions: Tensor
    """[scenes, length] bool: labels that belong to a caption."""
    kinds: list[list[tuple[int, str]]]
    """Of every scene: (place of the answer's first label, kind of question)."""


def converse(
    scenes: list[Scene], random: Random, visual_tokens: int = VISUAL_TOKENS, *, early: bool = False
) -> Conversations:
    """A conversation about each scene: questions of all kinds in random order, with a caption at the end of some.

    A scene with details is asked about them, too: give such scenes only where their details can be seen.

    Args:
        early: label the answer also in the question, from the last object (or mark) it names on. "What colour is the
            key" is then asked of the word "key" itself, which is one step of attention away from the key; the first
            word of the answer is two, and a model that has neither step learns both only after long.
    """
    rows, labels, captions, kinds = [], [], [], []
    for scene in scenes:
        row, said, asked = [USER] + [IMAGE] * visual_tokens, [], []
        described: set[int] = set()
        weights = WEIGHTS | (DETAIL_WEIGHTS if isinstance(scene, DetailedScene) else {})
        for number in range(QUESTIONS):
            question = None
            while question is None:
                [kind] = random.choices([*weights], [*weights.values()])
                if isinstance(scene, DetailedScene) and kind in DETAIL_WEIGHTS:
                    question = ask_detail(scene, random, kind)
                else:
                    question = ask(scene, random, kind)
            if number:
                row.append(USER)
            words = encode(question.text)
            named = max((place for place, word in enumerate(words) if word in _NAMING_IDS), default=len(words) - 1)
            if early:
                said += [(len(row) + place, encode(question.answer)[0]) for place in range(named, len(words) + 1)]
            row += [*words, END, ASSISTANT]
            asked.append((len(row) - 1, question.kind))
            said += _say(row, encode(question.answer))
        if random.random() < 0.2:
            row += [USER, *encode(describe(random)), END, ASSISTANT]
            text = _say(row, encode(caption(scene, random)))
            described = {place for place, _ in text}
            said += text
        rows.append(row)
        labels.append(dict(said))
        captions.append(described)
        kinds.append(asked)
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    wanted = torch.full_like(ids, IGNORED)
    is_caption = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        for place, token in labels[number].items():
            wanted[number, place] = token
            is_caption[number, place] = place in captions[number]
    return Conversations(ids, wanted, is_caption, kinds)


def _say(row: list[int], answer: list[int]) -> list[tuple[int, int]]:
    """Append the answer and its end to the row. Returns (place, token): a token is said by the place before it."""
    said = []
    for token in (*answer, END):
        said.append((len(row) - 1, token))
        row.append(token)
    return said


@cache
def _encoded(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer.encode(text, add_special_tokens=False))


def encode(text: str) -> list[int]:
    return [*_encoded(text)]
