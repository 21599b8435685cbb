"""What one request wants of each of its images: a budget, and the words that it is compared with."""

import hashlib
import json
import struct
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from adafv.core import Budget, ImageLayout
from adafv.errors import NoWordsError, PromptError
from adafv.prompts.prompt import PlacedImage, Prompt, any_of
from adafv.prompts.text import ChatTemplate, text_columns

VERSION = 3
"""Of what the caches know an image by; to be raised whenever the same request would keep other tokens."""

_ONE_TOKEN = ImageLayout(torch.zeros(1, dtype=torch.long), crops=1, rows=1, columns=1)


@dataclass(frozen=True)
class Wish:
    """How one image is to be pruned."""

    budget: Budget
    text: tuple[int, ...]
    """Tokens of the text that counts. Empty where all tokens stay, where the method does not look at text, and where no word
    counts: the worker then asks `Method.without_text`."""

    def key(self, image: str, identity: str) -> str:
        """What caches know the pruned image by.

        Args:
            image: what they would know the whole image by.
            identity: see `ServerSettings`.
        """
        parts = [VERSION, image, identity, self.budget.key, self.text]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encoded(self) -> tuple[Tensor, Tensor]:
        """(text [T] long, budget [2] long), to travel with the image to the worker."""
        return torch.tensor(self.text, dtype=torch.long), _to_tensor(self.budget.keep)


@dataclass(frozen=True)
class Reader:
    """Finds the words that count for an image, as in transformers; see `adafv.prompts.text`."""

    placeholder: int
    turn_ends: Set[int]
    special: Set[int]
    scope: str
    template: ChatTemplate | None

    def texts(self, tokens: Sequence[int], images: int) -> list[tuple[int, ...]]:
        """Per image, the tokens of the text that counts for it; none where no word does.

        Args:
            tokens: of the prompt, with one placeholder per image.

        Raises:
            PromptError: there are not as many placeholders as images.
        """
        check_placeholders(tokens, self.placeholder, images)
        prompt = self._prompt(tokens)
        places = prompt.placeholders["image"][0].nonzero()
        placed = [PlacedImage("image", i, 0, place, _ONE_TOKEN) for i, place in enumerate(places)]
        return [self._text(prompt, image) for image in placed]

    def _text(self, prompt: Prompt, image: PlacedImage) -> tuple[int, ...]:
        try:
            columns = text_columns(prompt, image, self.scope, self.template)
        except NoWordsError:
            return ()
        return tuple(prompt.tokens[0, columns].tolist())

    def _prompt(self, tokens: Sequence[int]) -> Prompt:
        row = torch.tensor([list(tokens)], dtype=torch.long)
        attended, shown = torch.ones_like(row, dtype=torch.bool), {"image": row == self.placeholder}
        return Prompt(row, attended, shown, any_of(row, self.turn_ends), any_of(row, self.special))


def check_placeholders(tokens: Sequence[int], placeholder: int, images: int) -> None:
    """Raise PromptError unless there is one placeholder per image: of others vLLM would take the first for an image."""
    found = tokens.count(placeholder)
    if found != images:
        raise PromptError(
            f"the prompt has {found} image placeholders for {images} image(s); write one where each image belongs"
        )


def budget_from(values: Tensor) -> Budget:
    """The inverse of the budget's half of `Wish.encoded`. Whether it is too large was checked in the front."""
    is_share, bits = values.tolist()
    return Budget(struct.unpack("<d", struct.pack("<q", bits))[0] if is_share else bits)


def _to_tensor(keep: int | float) -> Tensor:
    """As integers, which no step on the way rounds to the model's precision."""
    if isinstance(keep, float):
        return torch.tensor([1, struct.unpack("<q", struct.pack("<d", keep))[0]])
    return torch.tensor([0, keep])


def digest(name: str) -> Tensor:
    """[32] uint8, of what vLLM knows an image by, to travel with it."""
    return torch.tensor(list(hashlib.sha256(name.encode()).digest()), dtype=torch.uint8)
