"""Answers on disk: a file that only grows, so that a run that was killed goes on where it was.

    {"store": 1, "fingerprint": {...}}                                      the first line: who answers
    {"question": <key>, "method": "adafv", "keep": "0.1", "answer": ...}    one line an answer

A question is found again by its key, a hash of the picture, the text and the choices: ids and paths may change. What was
being written when the process was killed is a line without an end; it is cut off, and asked again. A store of another
model, precision, prompt or version is refused: its answers would be mixed with those of this one.

Answers alone are held in memory. The kept tokens of one are read from the file when they are wanted.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adafv.errors import AdaFVError
from adafv.evaluation.questions import Question
from adafv.printable import shortened

VERSION = 1


class StoreError(AdaFVError, ValueError):
    """A store cannot be read or written, or holds the answers of another model."""


Chances = tuple[tuple[str, float], ...]
"""(answer, probability), of some answers."""


@dataclass(frozen=True)
class Given:
    """An answer, and what it took."""

    answer: str
    tokens: int
    """Visual tokens of the picture."""
    kept: int
    """Of these, those that the language model read; its last layer, where tokens go inside it."""
    chosen_by: str = ""
    """The method that chose where it is another than the one asked for: no word of the question counted."""
    chances: Chances = ()
    """How likely the model finds the answers to choose from, or those that are right; where that was asked for."""


Way = tuple[str, str]
"""(method in one word, key of its budget); see `adafv.evaluation.answers.Configuration`."""


def key_of(question: Question, digest: str) -> str:
    """What a question is found again by.

    Args:
        digest: of its picture.
    """
    said = json.dumps([digest, question.text, list(question.choices or ())], ensure_ascii=True)
    return hashlib.sha256(said.encode()).hexdigest()[:24]


class Store:
    """Answers in a file. One process writes to it at a time.

    Args:
        path: of the file; made where it is not there.
        fingerprint: who answers; all values are JSON.

    Raises:
        StoreError: the file is no store, one of another fingerprint, written to by another process, or cannot be written.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = path
        self.fingerprint = dict(fingerprint)
        self._given: dict[str, dict[Way, Given]] = {}
        self._places: dict[tuple[str, Way], int] = {}
        self._shared: dict[Any, Any] = {}
        self._shown = shortened(path)
        try:
            # Not "a": what a killed run left half written is cut off.
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except OSError as error:
            raise StoreError(
                f"{self._shown} cannot be written ({shortened(error.strerror)}); choose another"
            ) from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def get(self, key: str, way: Way) -> Given | None:
        """The answer to a question; None where it was not asked yet."""
        return self._given.get(key, {}).get(way)

    def answers(self) -> Iterator[tuple[str, Way, Given]]:
        """(key of the question, way, what was answered) of all of them."""
        for key, given in self._given.items():
            for way, answer in given.items():
                yield key, way, answer

    def __len__(self) -> int:
        """Answers."""
        return sum(map(len, self._given.values()))

    def kept(self, key: str, way: Way) -> list[int] | None:
        """The tokens that an answer was given from, ascending; None where all were, or where it is not known."""
        place = self._places.get((key, way))
        if place is None:
            return None
        self._file.seek(place)
        mask = json.loads(self._file.readline()).get("mask")
        self._file.seek(0, os.SEEK_END)
        return None if mask is None else tokens_of(mask)

    def add(self, way: Way, answers: Iterable[tuple[str, Given, list[int] | None]]) -> None:
        """Write answers down, all of them at once.

        Args:
            answers: key of the question, what was answered, and the kept tokens (None: all, or not known).

        Raises:
            StoreError: the disk is full, say. What was written before stays.
        """
        lines = []
        listed = list(answers)
        for key, given, kept in listed:
            entry: dict[str, Any] = {"question": key, "method": way[0], "keep": way[1], "answer": given.answer}
            entry |= {"tokens": given.tokens, "kept": given.kept}
            if given.chosen_by:
                entry["chosen_by"] = given.chosen_by
            if given.chances:
                entry["chances"] = given.chances
            if kept is not None:
                entry["mask"] = mask_of(kept)
            lines.append(json.dumps(entry, ensure_ascii=True).encode() + b"\n")
        try:
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(b"".join(lines))
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise StoreError(
                f"{self._shown} cannot be written ({shortened(error.strerror)}); what was answered before is kept: make "
                "room, and run the command again"
            ) from error
        for line, (key, given, _) in zip(lines, listed, strict=True):
            self._remember(key, way, given, start)
            start += len(line)

    def _remember(self, key: str, way: Way, given: Given, place: int) -> None:
        # The same few answers and numbers come again and again.
        given, way = self._shared.setdefault(given, given), self._shared.setdefault(way, way)
        self._given.setdefault(key, {})[way] = given
        self._places[key, way] = place

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{self._shown} is being written by another process; wait for it, or choose another place"
            ) from error
        except OSError:
            pass  # some network disks know no locks

    def _read(self) -> None:
        place = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if number == 1:
                    self._check(entry)
                else:
                    chances = tuple((str(answer), float(chance)) for answer, chance in entry.get("chances", ()))
                    given = Given(entry["answer"], entry["tokens"], entry["kept"], entry.get("chosen_by", ""), chances)
                    self._remember(entry["question"], (entry["method"], entry["keep"]), given, place)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                if isinstance(error, StoreError):
                    raise
                what = "is no store of answers" if number == 1 else f"is damaged in line {number}"
                raise StoreError(f"{self._shown} {what}; choose another place, or remove the file") from error
            place += len(line)
        self._file.seek(0, os.SEEK_END)
        if place < self._file.tell() and place == 0 and not _may_begin_a_store(self.path):
            raise StoreError(f"{self._shown} is no store of answers; choose another place, or remove the file")
        self._file.truncate(place)
        self._file.seek(place)
        if place == 0:
            head = {"store": VERSION, "fingerprint": self.fingerprint}
            self._file.write(json.dumps(head, ensure_ascii=True).encode() + b"\n")
            self._file.flush()

    def _check(self, head: Any) -> None:
        if head["store"] != VERSION:
            raise StoreError(
                f"{self._shown} was written by another version of adafv (store {shortened(head['store'])}); choose another "
                "place, or remove the file"
            )
        there, now = _flat(head["fingerprint"]), _flat(self.fingerprint)
        for name in sorted({*there, *now}):
            if there.get(name) != now.get(name):
                raise StoreError(
                    f"{self._shown} holds answers with another {name.replace('_', ' ')} "
                    f"({shortened(there.get(name), 60)}, now {shortened(now.get(name), 60)}); choose another place, or "
                    "remove the file"
                )


def _flat(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """With {"versions": {"torch": ...}} as "version of torch"."""
    found = dict(fingerprint)
    for name, release in dict(found.pop("versions", {})).items():
        found[f"version of {name}"] = release
    return found


def _may_begin_a_store(path: Path) -> bool:
    """Whether a file without a whole line is what a process left that was killed at its first."""
    with open(path, "rb") as file:
        start = file.read(10)
    return start == b'{"store": '[: len(start)]


def mask_of(kept: Iterable[int]) -> str:
    """A set of tokens as hexadecimal digits, token 0 the lowest bit; what is no token of the picture (-1) is left out."""
    number = 0
    for token in kept:
        if token >= 0:
            number |= 1 << token
    return f"{number:x}"


def tokens_of(mask: str) -> list[int]:
    """What `mask_of` wrote down, ascending."""
    number = int(mask, 16)
    return [token for token in range(number.bit_length()) if number >> token & 1]
