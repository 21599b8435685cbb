"""What one request wants of each of its images: a budget, and the words that it is compared with."""

import hashlib
import json
import struct
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from adafv.core import Budget, ImageLayout
from adafv.core.crops import ALL_CROPS, Crops
from adafv.errors import NoWordsError, PromptError
from adafv.prompts.prompt import PlacedImage, Prompt, any_of
from adafv.prompts.text import ChatTemplate, text_columns

VERSION = 4
"""Of what the caches know an image by; to be raised whenever the same request would keep other tokens."""

_ONE_TOKEN = ImageLayout(torch.zeros(1, dtype=torch.long), crops=1, rows=1, columns=1)


@dataclass(frozen=True)
class Wish:
    """How one image is to be pruned."""

    budget: Budget
    text: tuple[int, ...]
    """Tokens of the text that counts. Empty where all tokens stay, where the method does not look at text, and where no word
    counts: the worker then asks `Method.without_text`."""
    crops: Crops = ALL_CROPS
    """Those of it that the tower is to see."""

    def key(self, image: str, identity: str) -> str:
        """What caches know the pruned image by.

        Args:
            image: what they would know the whole image by.
            identity: see `ServerSettings`.
        """
        parts = [VERSION, image, identity, self.budget.key, self.text, str(self.crops)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encoded(self) -> tuple[Tensor, Tensor]:
        """(text [T] long, budget and crops [3] long), to travel with the image to the worker."""
        most = -1 if self.crops.most is None else self.crops.most
        return torch.tensor(self.text, dtype=torch.long), torch.tensor([*_as_integers(self.budget.keep), most])


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


def budget_from(values: Tensor) -> tuple[Budget, Crops]:
    """The inverse of the second half of `Wish.encoded`. Whether it is too large was checked in the front."""
    is_share, bits, most = values.tolist()
    crops = ALL_CROPS if most < 0 else Crops(most, chosen=True)
    return Budget(struct.unpack("<d", struct.pack("<q", bits))[0] if is_share else bits), crops


def _as_integers(keep: int | float) -> tuple[int, int]:
    """(whether it is a share, its bits), which no step on the way rounds to the model's precision."""
    if isinstance(keep, float):
        return 1, struct.unpack("<q", struct.pack("<d", keep))[0]
    return 0, keep


def digest(name: str) -> Tensor:
    """[32] uint8, of what vLLM knows an image by, to travel with it."""
    return torch.tensor(list(hashlib.sha256(name.encode()).digest()), dtype=torch.uint8)
