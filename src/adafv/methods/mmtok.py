"""Coverage of the words and of the image at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adafv.core.greedy import coverage_search, few_at_a_time
from adafv.core.likeness import cosines, self_cosines, unit_vectors
from adafv.core.tokens import HIDDEN, STRINGS, WORDS, Kept, VisualTokens
from adafv.errors import OptionError
from adafv.methods.base import Method
from adafv.methods.checks import check_choice

TEXT_TEMPERATURE = 0.01
IMAGE_TEMPERATURE = 0.2
WORD_CHOICES = ("all", "content")
_WRITTEN = (
    "a an the this that these those it its is are was were be been am do does did has have had can could will would "
    "shall should may might must of in on at to from by for with about into and or but if than then as so not no "
    "there here i me my you your he his she her we us our they them their what which who whom whose where when why "
    "how please"
)
STOP_WORDS = frozenset(_WRITTEN.split())
"""Words of English that speak of nothing in an image."""
_MARKS = "\u2581\u0120"
"""What tokenizers put in front of the first piece of a word."""


@dataclass(frozen=True)
class MMTok(Method):
    """Keep the tokens that cover words and image: the largest sum_t max_j P_tj + image_weight * sum_i max_j Q_ij, greedily.

    The maxima run over the kept tokens j. P_t is the softmax over the tokens of cos(word t, projected token) / 0.01, by the
    number of words; Q_i that of cos(token i, token) / 0.2 of the tower's output, by the number of tokens.

    Paper: MMTok, arXiv 2508.18264. Public code: Ironieser/MMTok, d1522cd (facts of it alone were used). Departures: words
    are those that count in adafv (see docs/text.md), so no template sentences need to be cut. All of them count, in vLLM,
    too; the published code cuts stop words, which takes a tokenizer: `words="content"`, with a list of our own. Newline
    tokens neither cover nor are covered. The crops of an image are searched together.

    Args:
        words: "all", or "content": without stop words and punctuation (all where nothing else is asked).
        image_weight: of the coverage of the image beside that of the words.
    """

    words: str = "all"
    image_weight: float = 0.5

    name = "mmtok"
    summary = "coverage of the words and of the image"
    paper = "MMTok, arXiv 2508.18264"
    cost = "N x N, K steps of up to N x N"
    needs = frozenset({WORDS, HIDDEN})

    def __post_init__(self) -> None:
        check_choice("words", self.words, WORD_CHOICES)
        if not self.image_weight >= 0:
            raise OptionError(f"image_weight={self.image_weight!r}; give 0 or more")
        if self.words == "content":
            object.__setattr__(self, "needs", self.needs | {STRINGS})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        words, shown = tokens.text.mask, tokens.candidates
        if self.words == "content":
            assert tokens.text.strings is not None
            words = words & content_of(tokens.text.strings, words)
        asked = cosines(unit_vectors(tokens.text.embeddings), unit_vectors(tokens.features.detach()))
        of_words = _shares(asked / TEXT_TEMPERATURE, words, shown)

        def search(some: slice) -> Tensor:
            seen = self_cosines(unit_vectors(tokens.signals[HIDDEN][some].detach()))
            of_image = self.image_weight * _shares(seen / IMAGE_TEMPERATURE, shown[some], shown[some])
            return coverage_search(
                torch.cat((of_words[some], of_image), dim=1).mT.contiguous(), keep, None, None, shown[some]
            ).indices

        return Kept(few_at_a_time(len(shown), sum(asked.shape[1:]) * shown.shape[1], search))


def _shares(logits: Tensor, rows: Tensor, shown: Tensor) -> Tensor:
    """[G, M, N]: softmax over the tokens that are shown, by the number of rows; 0 in rows that do not count."""
    shares = logits.masked_fill(~shown.unsqueeze(1), _NEVER).softmax(-1)
    return shares * (rows / rows.sum(-1, keepdim=True).clamp_min(1)).unsqueeze(-1)


_NEVER = torch.finfo(torch.float32).min


def content_of(texts: Sequence[Sequence[str]], mask: Tensor) -> Tensor:
    """[G, T] bool on the device of `mask`: pieces of words that are no stop words; all pieces of a text that has no other.

    Args:
        texts: pieces of words as the tokenizer writes them; see `adafv.core.tokens.Words`.
    """
    found = torch.zeros(mask.shape, dtype=torch.bool)
    for row, pieces in zip(found, texts, strict=True):
        for places, word in _words(pieces):
            row[places] = word not in STOP_WORDS and any(map(str.isalnum, word))
        if not row.any():
            row[: len(pieces)] = True
    return found.to(mask.device)


def _words(pieces: Sequence[str]) -> list[tuple[list[int], str]]:
    """The places of the pieces of each word, and the word in small letters. Punctuation is a word of its own."""
    words: list[tuple[list[int], str]] = []
    inside = False
    for place, piece in enumerate(pieces):
        bare = piece.strip(_MARKS + " ").lower()
        letters = any(map(str.isalnum, bare))
        if inside and letters and not piece.startswith((*_MARKS, " ")):
            places, word = words.pop()
            words.append(([*places, place], word + bare))
        else:
            words.append(([place], bare))
        inside = letters
    return words
