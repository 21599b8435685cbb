"""A row of tokens as the text that it stands for, with the way back from every letter to its column.

What a chat template writes is looked for in the text, not in the tokens, because a tokenizer joins what stands side by
side: a "?" and the line break behind it, the blank at the end of "ASSISTANT: " and the answer's first word. For the same
reason blanks are no letters here: how many there are, and to which token they belong, changes with what is around them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

IMAGE = "\0"
"""Stands for a run of visual tokens; no text holds it."""

BLANK, LINE_BREAK = 1, 2
"""What can be between two letters, beside nothing."""
_ATOM = 0x8000
_SPECIAL, _REST, _BYTES_REST = 0xF0000, 0x100000, 0x108000


class Piece(NamedTuple):
    """What one token stands for."""

    letters: str
    """Without blanks."""
    gaps: tuple[int, ...]
    """Per letter, what is between it and the one before: nothing (0), blanks (1), or blanks with a line break (2)."""
    trailing: int
    """The same, behind the last letter."""


class Pieces:
    """The piece of every token of a tokenizer.

    A special or added token is one letter for itself, so that the end of "</s>" is not taken for "<s>"; so is a token that
    holds part of a letter's bytes. Such letters are private code points, two for each token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        self.special = frozenset(tokenizer.all_special_ids) | {n for n, token in added.items() if token.special}
        self._atoms = self.special | added.keys()
        # Sentencepiece-like tokenizers drop the blank in front of a text's first token, so no token is decoded as the first.
        self._anchor = encoded(tokenizer, "a")[-1:]
        self._anchored = self._decode(self._anchor)
        self._known: dict[int, Piece] = {}

    @property
    def begin(self) -> Piece:
        """Of the token that begins every text; empty if there is none."""
        number = getattr(self._tokenizer, "bos_token_id", None)
        return self[-1 if number is None else number]

    def __getitem__(self, token: int) -> Piece:
        piece = self._known.get(token)
        if piece is None:
            piece = self._known[token] = self._made(token)
        return piece

    def _made(self, token: int) -> Piece:
        if token < 0:
            return Piece("", (), 0)  # only its embedding is known
        text = self._decode([*self._anchor, token])
        text = text[len(self._anchored) :] if text.startswith(self._anchored) else self._decode([token])
        is_atom, is_bytes = token in self._atoms, "\ufffd" in text
        letters, gaps, gap = "", [], 0
        for letter in text:
            if letter.isspace():
                gap = max(gap, LINE_BREAK if letter in "\n\r" else BLANK)
            else:
                letters += letter
                gaps.append(gap)
                gap = 0
        if is_atom or is_bytes:
            rest = _BYTES_REST if is_bytes and not is_atom else _REST
            letters = chr(_SPECIAL + token // _ATOM) + chr(rest + token % _ATOM)
            gaps = [gaps[0] if gaps else 0, 0]
        return Piece(letters, tuple(gaps), gap)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def encoded(tokenizer: Any, text: str) -> list[int]:
    """The tokens of `text` alone."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


@dataclass(frozen=True)
class Text:
    """A row of tokens as text without blanks."""

    letters: str
    columns: list[int]
    """Per letter, the column of its token."""
    gaps: list[int]
    """Per letter, see `Piece`."""
    trailing: int
    """What is behind the last letter."""
    places: list[int]
    """Per column, how many letters stand in front of it; for a visual token, in front of its run."""

    @classmethod
    def of(
        cls,
        pieces: Pieces,
        tokens: Sequence[int],
        visual: Sequence[bool],
        attended: Sequence[bool] | None = None,
    ) -> "Text":
        """Read `tokens`, all given per column; what is not `attended` is not read, unless it is `visual`."""
        letters: list[str] = []
        columns: list[int] = []
        gaps: list[int] = []
        places: list[int] = []
        pending, in_run, length = 0, False, 0
        for column, token in enumerate(tokens):
            if visual[column]:
                if not in_run:
                    letters.append(IMAGE)
                    columns.append(column)
                    gaps.append(pending)
                    length += 1
                pending, in_run = 0, True
                places.append(length - 1)
                continue
            places.append(length)
            if attended is not None and not attended[column]:
                continue
            piece = pieces[token]
            in_run = False
            if not piece.letters:
                pending = max(pending, piece.trailing)
                continue
            letters.append(piece.letters)
            columns.extend([column] * len(piece.letters))
            gaps.append(max(pending, piece.gaps[0]))
            gaps.extend(piece.gaps[1:])
            pending = piece.trailing
            length += len(piece.letters)
        return cls("".join(letters), columns, gaps, pending, places)

    def joined(self, place: int) -> bool:
        """Whether a word goes on from the letter before `place` to the one at it."""
        if not 0 < place < len(self.letters) or self.gaps[place]:
            return False
        return _in_word(self.letters[place - 1]) and _in_word(self.letters[place])

    def gap(self, place: int) -> int:
        return self.gaps[place] if place < len(self.letters) else self.trailing


@dataclass(frozen=True)
class Marker:
    """Letters that a template writes, and what must be around them."""

    letters: str
    gaps: tuple[int, ...]
    """Per letter, see `Piece`; line breaks are looked for, other blanks are not."""
    begins_word: bool
    """Whether no word goes on into it."""
    ends_word: bool
    """Whether no word goes on out of it."""

    @classmethod
    def of(cls, text: Text, start: int, stop: int) -> "Marker":
        """The letters of `text` from `start` to `stop`, as they stand there."""
        gaps = tuple(text.gaps[start:stop])
        return cls(text.letters[start:stop], gaps, not text.joined(start), text.gap(stop) > 0)

    @property
    def says_something(self) -> bool:
        """Whether it is more than punctuation, which users write too."""
        return any(_in_word(letter) or ord(letter) >= _SPECIAL for letter in self.letters)

    def without(self, first: int) -> "Marker":
        """It without its `first` letters."""
        if not first:
            return self
        return Marker(self.letters[first:], self.gaps[first:], not self.joined(first), self.ends_word)

    def places(self, text: Text, start: int = 0) -> Iterator[tuple[int, int]]:
        """Where it stands in `text`, as (start, stop); what overlaps the one before is left out."""
        size = len(self.letters)
        place = text.letters.find(self.letters, start) if size else -1
        while place >= 0:
            stands = self._stands(text, place)
            if stands:
                yield place, place + size
            place = text.letters.find(self.letters, place + (size if stands else 1))

    def _stands(self, text: Text, place: int) -> bool:
        stop = place + len(self.letters)
        if (self.begins_word and text.joined(place)) or (self.ends_word and text.joined(stop)):
            return False
        behind = (place + letter for letter, gap in enumerate(self.gaps) if gap == LINE_BREAK)
        # Nothing and images need no line break behind them: a template need not write the one after words that are not there.
        return all(at == 0 or text.gaps[at] == LINE_BREAK or text.letters[at - 1] == IMAGE for at in behind)

    def joined(self, place: int) -> bool:
        """Whether a word goes on from the letter before `place` to the one at it."""
        if not 0 < place < len(self.letters) or self.gaps[place]:
            return False
        return _in_word(self.letters[place - 1]) and _in_word(self.letters[place])


def common_end(markers: Sequence[Marker]) -> Marker:
    """What all of them end with, from the start of a word or sign on."""
    shortest, size = min(len(marker.letters) for marker in markers), 0
    while size < shortest and len({marker.letters[-size - 1] for marker in markers}) == 1:
        size += 1
    splits_word = any(marker.joined(len(marker.letters) - size) for marker in markers)
    tails = [marker.without(len(marker.letters) - size) for marker in markers]
    gaps = tuple(min(each) for each in zip(*(tail.gaps for tail in tails), strict=True))
    ends = (all(tail.begins_word for tail in tails), all(tail.ends_word for tail in tails))
    common, start = Marker(tails[0].letters, gaps, *ends), 0
    if size and ord(common.letters[0]) >= _REST:
        start = 1  # the second half of a token that is one letter for itself
    while splits_word and start < size and _in_word(common.letters[start]):
        start += 1
    return common.without(start)


def _in_word(letter: str) -> bool:
    return letter.isalnum() or ord(letter) >= _BYTES_REST
