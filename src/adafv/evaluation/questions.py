"""Questions about pictures, read from what people have: JSON lines, CSV, a folder, a data set saved on disk.

Nothing is lost on the way: a record that cannot be used is named by its line with what is wrong with it, and the caller
says whether that ends the run (`refuse`) or leaves the record out (`skip`). Pictures are not held, only where they are.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

from PIL import Image

from adafv.errors import AdaFVError, ImageError
from adafv.images import MAX_BYTES, read_image
from adafv.printable import shortened

REFUSE, SKIP = BAD_RECORDS = ("refuse", "skip")
"""What becomes of records that cannot be used."""

NAMES = {
    "image": ("image", "picture", "image_path", "image_file", "file_name", "filename"),
    "text": ("question", "text", "prompt"),
    "answers": ("answers", "answer", "label", "gt_answer"),
    "name": ("id", "question_id", "questionId"),
    "kind": ("kind", "category", "type"),
    "choices": ("choices", "options"),
    "group": ("group",),
    "boxes": ("boxes",),
}
"""What a field may be called; the first that is there counts."""

MAX_FILE = 500_000_000
"""Bytes of a file of questions, which is read whole."""
MAX_LINE = 1_000_000
"""Characters of a record."""
_MOST_NAMED = 3
"""Bad records in one message."""
_PREFERRED = ("questions.jsonl", "presence.jsonl")


class QuestionsError(AdaFVError, ValueError):
    """There are no questions where some were said to be, or they cannot be used."""


class Picture(Protocol):
    """Where a picture is. It is read when it is needed, and not held."""

    @property
    def name(self) -> str:
        """As people know it: a path as it was written, or a place in a data set."""
        ...

    def load(self) -> Image.Image:
        """The picture as RGB.

        Raises:
            ImageError: it cannot be read.
        """
        ...

    def digest(self) -> str:
        """The same for the same picture, on any machine: answers are found again by it.

        Raises:
            ImageError: it cannot be read.
        """
        ...


@dataclass(frozen=True)
class FilePicture:
    """A picture in a file."""

    path: Path
    name: str

    def _bytes(self) -> bytes:
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise ImageError(
                    f"{shortened(self.name)} has more than {MAX_BYTES // 1_000_000} MB; scale it down first"
                )
            return self.path.read_bytes()
        except IsADirectoryError as error:
            raise ImageError(f"{shortened(self.name)} is a directory; name an image inside it") from error
        except FileNotFoundError as error:
            raise ImageError(f"there is no file {shortened(self.name)}; check the path") from error
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ImageError(f"{shortened(self.name)} cannot be read ({shortened(why)}); check the path") from error

    def load(self) -> Image.Image:
        return read_image(self._bytes(), self.name)

    def digest(self) -> str:
        return hashlib.sha256(self._bytes()).hexdigest()


@dataclass(frozen=True)
class StoredPicture:
    """A picture in a Hugging Face data set, whose column `image` is not decoded."""

    rows: Any = field(repr=False, compare=False)
    number: int
    name: str

    def _bytes(self) -> bytes:
        entry = self.rows[self.number]["image"] or {}
        if entry.get("bytes"):
            return bytes(entry["bytes"])
        if entry.get("path"):
            return FilePicture(Path(entry["path"]), self.name)._bytes()
        raise ImageError(f"{self.name} has no picture; leave the row out")

    def load(self) -> Image.Image:
        return read_image(self._bytes(), self.name)

    def digest(self) -> str:
        return hashlib.sha256(self._bytes()).hexdigest()


@dataclass(frozen=True)
class Question:
    """One question about one picture."""

    name: str
    """Unique: the id that the record gives, else where it stands ("line 12")."""
    picture: Picture
    text: str
    """As the model is asked; choices are put below it, see `asked`."""
    answers: tuple[str, ...] | None = None
    """What is right, any of them; None where nobody said."""
    kind: str | None = None
    """For a table by kinds of questions."""
    group: str = ""
    """Of questions that go right and wrong together. Intervals count groups. Empty: those on the same picture, under
    whatever name; `Asker.run` then puts the hash of the picture here."""
    boxes: tuple[tuple[float, ...], ...] | None = None
    """(x0, y0, x1, y1) in pixels of the picture, of what is asked for."""
    choices: tuple[str, ...] | None = None
    """To choose from; an answer may be one of them, or its letter."""
    where: str = ""
    """Where it was read, for messages: "questions.jsonl line 12"."""

    @property
    def cluster(self) -> str:
        """What intervals count."""
        return self.group or self.picture.name

    @property
    def asked(self) -> str:
        """The text that the model reads: the question, and lettered choices below it."""
        if not self.choices:
            return self.text
        return "\n".join([self.text, *(f"{letter_of(place)}. {choice}" for place, choice in enumerate(self.choices))])


def letter_of(place: int) -> str:
    """A, B, ... of a choice."""
    return chr(ord("A") + place)


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used."""

    where: str
    problem: str
    """With the mend."""

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True)
class Questions:
    """What was read."""

    questions: list[Question]
    bad: list[BadRecord]
    """Left out; in their order."""

    def checked(self, policy: str) -> "Questions":
        """These, if the policy lets bad records pass.

        Raises:
            QuestionsError: there are some, and the policy is to refuse them; or nothing is left.
        """
        if self.bad and policy == REFUSE:
            raise refusal(self.bad)
        if not self.questions:
            raise QuestionsError(
                f"no question is left: {shortened(self.bad[0], 400)}" if self.bad else "there is no question in it"
            )
        return self

    def without(self, more: Sequence[BadRecord], names: set[str]) -> "Questions":
        """Without the questions of these names, which turned out to be bad."""
        return Questions([each for each in self.questions if each.name not in names], [*self.bad, *more])


class BadRecordsError(QuestionsError):
    """Records cannot be used, and are not to be left out."""

    def __init__(self, message: str, bad: Sequence[BadRecord]) -> None:
        super().__init__(message)
        self.bad = list(bad)
        """All of them; the message names a few."""


def refusal(bad: Sequence[BadRecord]) -> BadRecordsError:
    """The error that names the first few bad records."""
    named = "; ".join(shortened(each, 400) for each in bad[:_MOST_NAMED])
    more = f"; and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
    return BadRecordsError(f"{named}{more}; mend the records, or leave them out with --bad-records skip", bad)


def read_questions(source: str | Path, *, within: Path | None = None) -> Questions:
    """Read questions from a .jsonl or .csv file, a folder with `images/` and a .jsonl file, or a data set saved on disk.

    Paths of pictures are relative to the file, or to a folder `images` beside it.

    Args:
        within: of the questions of strangers, the folder of their pictures. Paths are relative to it, to `images` in it, or
            to the only folder that is in it; what is absolute, has `..` in it or goes through a link is a bad record. The
            source is a file then.

    Raises:
        QuestionsError: there is no such file, it is no such file, or it is empty.
    """
    path = Path(source)
    shown = shortened(str(source))
    try:
        if path.is_dir() and within is None:
            return _from_folder(path, shown)
        if not path.exists():
            raise QuestionsError(f"there is no file {shown}; check the path")
        kind = path.suffix.lower()
        if kind not in (".jsonl", ".csv"):
            raise QuestionsError(
                f"{shown} is none of what is read: a .jsonl or .csv file, a folder with images/ and a .jsonl file, or a data "
                "set saved on disk"
            )
        if path.stat().st_size > MAX_FILE:
            raise QuestionsError(
                f"{shown} has more than {MAX_FILE // 1_000_000} MB; name pictures by their paths, or split it"
            )
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise QuestionsError(
            f"{shown} is not UTF-8 (byte {error.start:,}); save it as UTF-8 (spreadsheets: as CSV UTF-8)"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, QuestionsError):
            raise
        why = getattr(error, "strerror", None) or error
        raise QuestionsError(f"{shown} cannot be read ({shortened(why)}); check the path") from error
    records = _json_lines(text) if kind == ".jsonl" else _csv_rows(text, shown)
    if within is not None:
        folders = _folders_within(within)
        return _read(records, path.name, lambda value: _picture_within(folders, value))
    return _read(records, path.name, lambda value: _file_picture(path.parent, value))


def _from_folder(folder: Path, shown: str) -> Questions:
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        return _from_data_set(folder, shown)
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise QuestionsError(
            f"the folder {shown} has no .jsonl file, nor is it a data set that save_to_disk wrote; put the questions beside "
            "images/"
        )
    chosen = next((each for name in _PREFERRED for each in files if each.name == name), files[0])
    if len(files) > 1 and chosen.name not in _PREFERRED:
        names = ", ".join(each.name for each in files)
        raise QuestionsError(f"the folder {shown} has several .jsonl files ({shortened(names)}); name one of them")
    return read_questions(chosen)


def _from_data_set(folder: Path, shown: str) -> Questions:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in folder.iterdir() if each.is_dir()) or ["test"]
        raise QuestionsError(
            f"{shown} has the splits {shortened(', '.join(splits))}; name one, such as {shown}/{shortened(splits[0])}"
        )
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError as error:
        raise QuestionsError(
            f"{shown} is a Hugging Face data set, and the package datasets is not installed: pip install datasets"
        ) from error
    try:
        rows = datasets.load_from_disk(str(folder))
        columns = list(rows.column_names)
        if "image" in columns:
            rows = rows.cast_column("image", datasets.Image(decode=False))
    except Exception as error:  # pyarrow, JSON and datasets raise errors of many kinds
        reason = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise QuestionsError(
            f"{shown} cannot be read as a data set ({reason}); save it again with save_to_disk"
        ) from error
    if "image" not in columns:
        raise QuestionsError(f"{shown} has no column image; it has {shortened(', '.join(columns))}; rename one")
    rest = rows.remove_columns("image")
    records = ((f"row {number}", {**record, "image": number}) for number, record in enumerate(rest))
    name = folder.name

    def picture(number: Any) -> Picture:
        return StoredPicture(rows, number, f"{name} row {number}")

    return _read(records, name, picture)


def _json_lines(text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): JSON may hold other line breaks of Unicode as they are.
    for number, line in enumerate(text.split("\n"), 1):
        where = f"line {number}"
        if not line.strip():
            continue
        if len(line) > MAX_LINE:
            yield where, BadRecord(where, f"has more than {MAX_LINE:,} characters; name the picture by its path")
            continue
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, BadRecord(where, f"is not JSON ({shortened(error)}); write one object per line")


def _csv_rows(text: str, shown: str) -> Iterator[tuple[str, Any]]:
    first = text.lstrip("\r\n").partition("\n")[0]
    # Spreadsheets write semicolons where the comma stands in numbers.
    separator = max(",;\t", key=first.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    known = {name.lower(): name for names in NAMES.values() for name in names}
    several = {*NAMES["answers"], *NAMES["choices"]}
    try:
        columns = [known.get(name.strip().lower(), name.strip()) for name in rows.fieldnames or ()]
        if columns:
            _check_columns(columns, shown)
            rows.fieldnames = columns
        for row in rows:
            record: dict[str, Any] = {name: value for name, value in row.items() if name is not None and value}
            where = f"line {rows.line_num}"
            if None in row:
                yield where, BadRecord(where, f"has more fields than the first line; put quotes around {separator!r}")
                continue
            for name in several & record.keys():
                record[name] = [part.strip() for part in record[name].split("|")]
            if record:
                yield where, record
    except csv.Error as error:
        raise QuestionsError(
            f"{shown} is not CSV (line {rows.reader.line_num}: {shortened(error)}); check its quotes"
        ) from error


def _check_columns(columns: Sequence[str], shown: str) -> None:
    """Refuse a first line that names no columns of questions, or one twice, of which the last alone would count."""
    for part in ("image", "text"):
        if not set(NAMES[part]) & set(columns):
            raise QuestionsError(
                f"{shown} has no column {NAMES[part][0]}; its first line names {shortened(', '.join(columns))}, and should "
                "be as in: image,question,answer"
            )
    twice = [name for place, name in enumerate(columns) if name and name in columns[:place]]
    if twice:
        raise QuestionsError(
            f"{shown} has the column {shortened(twice[0])} twice; put several answers into one, with | between them"
        )


def _checked_path(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("has no picture; give image, the path of a file")
    if "://" in value[:20] or value[:5].lower() == "data:":
        raise ValueError("names a picture by its address; save it to a file, and give the path")
    return value


def _folders_within(root: Path) -> list[Path]:
    """Where pictures of strangers are looked for; every one without a link in its path."""
    root = root.resolve(strict=True)
    found = [root, root / "images"]
    entries = list(root.iterdir())
    if len(entries) == 1 and entries[0].is_dir() and not entries[0].is_symlink():
        found += [entries[0], entries[0] / "images"]
    return found


def _picture_within(folders: Sequence[Path], value: Any) -> Picture:
    """A picture inside the first of these folders. One that is a link is not there, as far as anybody learns."""
    value = _checked_path(value)
    shown = shortened(value)
    parts = value.replace("\\", "/").split("/")
    if parts[0] == "" or parts[0].endswith(":") or ".." in parts or PureWindowsPath(value).drive:
        raise ValueError(f"names {shown}, which leads out of the pictures that were given; name one of those")
    for folder in folders:
        try:
            path = folder / value
            if path.is_file() and path.resolve(strict=True) == path:
                return FilePicture(path, value)
        except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, links in a circle
            continue
    raise ValueError(f"there is no picture {shown} among those that were given; check the path")


def _file_picture(folder: Path, value: Any) -> Picture:
    value = _checked_path(value)
    for path in (folder / value, folder / "images" / value):
        try:
            if path.is_file():
                return FilePicture(path, value)
        except (OSError, ValueError):  # too long, or a NUL in it
            break
    raise ValueError(f"there is no picture {shortened(value)} beside the questions, nor in images/; check the path")


def _read(records: Iterator[tuple[str, Any]], source: str, picture: Any) -> Questions:
    """Questions of records; `picture` makes one of what stands under "image", or raises ValueError."""
    questions: list[Question] = []
    bad: list[BadRecord] = []
    first: dict[str, str] = {}
    for where, record in records:
        place = f"{source} {where}"
        if isinstance(record, BadRecord):
            bad.append(BadRecord(place, record.problem))
            continue
        try:
            question = _question(record, where, place, picture)
        except ValueError as error:
            bad.append(BadRecord(place, str(error)))
            continue
        if question.name in first:
            bad.append(
                BadRecord(place, f"has the id {shortened(question.name)} of {first[question.name]}; ids are unique")
            )
            continue
        first[question.name] = where
        questions.append(question)
    if not questions and not bad:
        raise QuestionsError(f"{shortened(source)} is empty; write one question per line")
    return Questions(questions, bad)


def _question(record: Any, where: str, place: str, picture: Any) -> Question:
    if not isinstance(record, Mapping):
        raise ValueError('is no object; write {"image": ..., "question": ..., "answer": ...}')
    values = {
        part: next((record[n] for n in names if record.get(n) is not None), None) for part, names in NAMES.items()
    }
    text = values["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError("has no question; give question, a text")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("has half a letter (U+D800 to U+DFFF) in its question; write it again in UTF-8")
    if values["image"] is None:
        raise ValueError("has no picture; give image, the path of a file")
    choices = _texts(values["choices"], "choices")
    if choices is not None and not 2 <= len(choices) <= 26:
        raise ValueError(f"has {len(choices)} choices; give 2 to 26")
    if choices and len(set(choices)) < len(choices):
        raise ValueError("has a choice twice; give each once")
    answers = _texts(values["answers"], "answers")
    if choices and answers:
        from adafv.evaluation.matching import right_choices  # which knows questions

        if not right_choices(answers, choices):
            raise ValueError("has an answer that is none of its choices; give the text of one, or its letter")
        letters = [letter_of(number) for number in range(len(choices))]
        for letter, choice in zip(letters, choices, strict=True):
            if choice in answers and choice.upper() in letters and choice.upper() != letter:
                raise ValueError(
                    f"has the answer {choice}, which is one choice and the letter of another; give its letter"
                )
    name, group = values["name"], values["group"]
    if group is not None and not (isinstance(group, (str, int)) and str(group).strip()):
        raise ValueError("has a group that is neither text nor a number; give another")
    if name is not None and not (isinstance(name, (str, int)) and str(name).strip()):
        raise ValueError("has an id that is neither text nor a number; give another")
    kind = values["kind"]
    return Question(
        name=where if name is None else str(name).strip(),
        picture=picture(values["image"]),
        text=text.strip(),
        answers=answers,
        kind=None if kind is None else str(kind),
        group="" if group is None else f"group {group}",
        boxes=_boxes(values["boxes"]),
        choices=choices,
        where=place,
    )


def _texts(value: Any, what: str) -> tuple[str, ...] | None:
    """One text or several; of VQA's annotations, {"answer": ...}, the text."""
    if value is None:
        return None
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    listed = [each.get("answer") if isinstance(each, Mapping) else each for each in listed]
    if any(isinstance(each, float) and not math.isfinite(each) for each in listed):
        raise ValueError(f"has {what} that are no number (NaN or infinite); give a text")
    texts = [
        ("yes" if each else "no") if isinstance(each, bool) else str(each)
        for each in listed
        if isinstance(each, (str, int, float))
    ]
    if len(texts) < len(listed) or not all(text.strip() for text in texts):
        raise ValueError(f"has {what} that are no text; give a text, or a list of them")
    return tuple(text.strip() for text in texts) or None


def _boxes(value: Any) -> tuple[tuple[float, ...], ...] | None:
    if value is None:
        return None
    try:
        listed = value if value and isinstance(value[0], (list, tuple)) else [value]
        boxes = tuple(tuple(float(side) for side in list(box)[-4:]) for box in listed)
    except (TypeError, ValueError, KeyError, OverflowError):
        boxes = ((),)
    if any(len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]) for box in boxes):
        raise ValueError("has boxes that are none; give [x0, y0, x1, y1] in pixels, or a list of them")
    return boxes
