"""`adafv check` for visitors: questions and a zip of pictures in, what pruning loses out. No Gradio here.

One check works at a time, a few wait in a row, and each visitor has one. A check takes turns with the questions of the other
tab, answer by answer, so both go on. It ends when its visitor stops it or is gone, and after a time. What it writes lies in
folders of its own inside that of the uploads: pictures and answers are deleted when it ends, its report after an hour.
"""

import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from adafv import defaults
from adafv.asking.failures import UsageError, check_text
from adafv.asking.session import Session
from adafv.core import Budget
from adafv.engines.transformers import Pruner
from adafv.errors import ImageError
from adafv.evaluation.answers import Asker, Configuration, Progress, configurations, refuse_idle_budgets
from adafv.evaluation.check import BY, Counted, Wish, as_text, decided, result
from adafv.evaluation.page import drawn_cases, page
from adafv.evaluation.questions import (
    BAD_RECORDS,
    SKIP,
    BadRecord,
    BadRecordsError,
    FilePicture,
    Questions,
    QuestionsError,
    read_questions,
)
from adafv.evaluation.store import Store
from adafv.images import check_shape
from adafv.page.answers import FORMATS, MAX_METHOD, check_longest, checked_budgets, checked_methods
from adafv.page.archive import unpack
from adafv.page.turns import OneAtATime, Turn
from adafv.page.uploads import KEPT_SECONDS, MEGABYTE, Uploads
from adafv.printable import shortened

KEEP = "50%, 25%, 10%, 5%"
METHODS = (defaults.METHOD,)
"""What is tried when the page opens."""
MAX_FILE = 4 * MEGABYTE
"""Bytes of a file of questions."""
MAX_RECORDS = 2_000
"""Questions."""
MAX_LETTERS = 2_000
"""Of a question with its choices."""
MAX_METHODS = 4
MAX_ANSWERS = 20_000
"""Questions times ways to answer them: unpruned, blanked, and each method at each budget."""
MAX_PIXELS = 16_000_000
"""Of a picture; a batch of them is held."""
MAX_SECONDS = 1800.0
"""That a check may take, without those in which it waits for others."""
MOST_WAITING = 3
"""Checks behind the one that works; whoever comes later is told so."""
MAX_SUFFIX = 200
"""Letters behind every question."""
LEASE = 60.0
"""Seconds after which a check ends that nobody looks at."""
REPORT, RESULT = "report.html", "result.json"
_BATCH = 4
"""Questions asked together; more would let others wait longer."""
_FILES = (".jsonl", ".csv")
_LONGEST_NAME = 60
_MOST_REPORTS = 32


class _Ended(Exception):
    """The check is stopped."""


@dataclass(frozen=True)
class Settings:
    """What is wanted of a check."""

    budgets: list[Budget]
    ways: list[Configuration]
    max_loss: float
    """A share."""
    bad_records: str
    by: str
    suffix: str
    longest: int

    @classmethod
    def of(
        cls, keep: Any, methods: Any, max_loss: Any, bad_records: Any, by: Any, suffix: Any, longest: Any
    ) -> "Settings":
        """Settings as they were sent, which may be anything.

        Args:
            max_loss: in points.

        Raises:
            UsageError, BudgetError, OptionError, AdaFVError: one is none, or out of bounds.
        """
        budgets = checked_budgets(keep)
        if any(budget.keeps_all for budget in budgets):
            raise UsageError("keeping all prunes nothing; the unpruned model is asked anyway, so leave it out")
        methods = [methods] if isinstance(methods, str) else methods
        names = _without_pruning_options(methods)
        checked_methods(names)
        if len(methods) > MAX_METHODS:
            raise UsageError(f"there are {len(methods)} methods; choose {MAX_METHODS} at most")
        if isinstance(max_loss, bool) or not isinstance(max_loss, (int, float)) or not 0 < max_loss < 100:
            raise UsageError("the points that must not be lost are no number between 0 and 100; give one, such as 1")
        if bad_records not in BAD_RECORDS or by not in BY:
            raise UsageError("there is no such choice; take one that the page offers")
        if not isinstance(suffix or "", str) or len(suffix or "") > MAX_SUFFIX:
            raise UsageError(
                f"what stands behind every question is no text of {MAX_SUFFIX} letters at most; shorten it"
            )
        check_text(suffix or "", "what stands behind every question")
        check_longest(longest)
        ways = configurations(methods, budgets)
        for way in ways:
            if way.method is not None:
                Pruner(way.method, way.budget)  # finds what does not go together
        return cls(budgets, ways, max_loss / 100, bad_records, by, suffix or "", int(longest))


def _without_pruning_options(methods: Any) -> Any:
    """Methods as `checked_methods` knows them; the check has options of its own, such as text=turn."""
    if not isinstance(methods, (list, tuple)) or not all(isinstance(each, str) for each in methods):
        return methods
    if any(len(each) > MAX_METHOD for each in methods):
        raise UsageError(f"a method with its options has more than the {MAX_METHOD} letters that are needed")
    return [
        ":".join(part for part in each.split(":") if not part.strip().startswith(("text=", "positions=")))
        for each in methods
    ]


@dataclass
class Check:
    """One check. Its fields are read by whoever shows it while it works."""

    visitor: str
    folder: Path
    """Of questions, pictures and answers."""
    questions: Questions
    settings: Settings
    by: str
    """What is counted."""
    source: str
    phase: str = "waiting"
    """"waiting", "asking", "drawing"; then "done", "stopped" or "failed"."""
    done: int = 0
    total: int = 0
    """Answers."""
    result: dict[str, Any] | None = None
    report: Path | None = None
    """The folder of `REPORT` and `RESULT`."""
    error: Exception | None = None
    seen: float = field(default_factory=time.monotonic)
    """When somebody last looked."""
    stopping: bool = False
    began: float = 0.0
    waited: float = 0.0
    """Seconds in which others had the model."""
    asked: int = 0

    @property
    def ended(self) -> bool:
        return self.phase in ("done", "stopped", "failed")

    @property
    def left(self) -> float | None:
        """Seconds, about; None: nobody knows yet."""
        if not self.asked or self.phase != "asking":
            return None
        return (time.monotonic() - self.began) / self.asked * (self.total - self.done)

    def look(self) -> None:
        """Somebody is still there."""
        self.seen = time.monotonic()

    def go_on(self) -> None:
        """Raises where it must not."""
        now = time.monotonic()
        if self.stopping or now - self.seen > LEASE:
            raise _Ended
        if now - self.began - self.waited > MAX_SECONDS:
            raise UsageError(
                f"the check was ended after {MAX_SECONDS / 60:.0f} minutes, with {self.done:,} of {self.total:,} answers "
                "given; give fewer questions, methods or budgets, or use the command adafv check, which has no such limit"
            )


class Checks:
    """The checks of a page, for any number of threads."""

    def __init__(self, session: Session, model: str, turns: OneAtATime, uploads: Uploads, folder: Path) -> None:
        """
        Args:
            model: its name, for the report.
            turns: of the model.
            folder: of the uploads.
        """
        self._session, self._model, self._turns = session, model, turns
        self._uploads, self._folder = uploads, folder
        self._reading = OneAtATime("upload")
        self._changed = threading.Lock()
        self._row: deque[Check] = deque()
        """The first one works."""
        self._reports: deque[Path] = deque()
        self._worker: threading.Thread | None = None

    def begin(self, visitor: str, questions: Any, pictures: Any, settings: Settings) -> Check:
        """Read what was uploaded, and put a check into the row.

        Args:
            visitor: whoever it is, by any name.
            questions, pictures: where the two files lie, or whatever was sent.

        Raises:
            UsageError, AdaFVError: something is missing, out of bounds or broken; or too many wait.
            BadRecordsError: records cannot be used, and are not to be left out.
            BusyError: another upload has been in the way for too long.
        """
        if questions is None:
            raise UsageError("choose a file of questions first")
        if pictures is None:
            raise UsageError("choose a zip of pictures first")
        with self._changed:
            self._check_room(visitor)
        folder = self._made("check")
        try:
            with self._reading.turn():
                check = self._read(visitor, folder, questions, pictures, settings)
            with self._changed:
                self._check_room(visitor)
                self._row.append(check)
                if self._worker is None:
                    self._worker = threading.Thread(target=self._work, name="adafv-checks", daemon=True)
                    self._worker.start()
            return check
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def ahead_of(self, check: Check) -> int:
        """Checks that come first."""
        with self._changed:
            return self._row.index(check) if check in self._row else 0

    def stop(self, visitor: str) -> None:
        """End the check of a visitor, if there is one: at once where it waits, else after the step that it is at."""
        with self._changed:
            for check in self._row:
                if check.visitor == visitor:
                    check.stopping = True

    def close(self) -> None:
        """End all of them."""
        with self._changed:
            worker = self._worker
            for check in self._row:
                check.stopping = True
        if worker is not None:
            worker.join(10)

    def _check_room(self, visitor: str) -> None:
        if any(check.visitor == visitor and not check.ended for check in self._row):
            raise UsageError("a check of yours is at work already; stop it first")
        if len(self._row) > MOST_WAITING:
            raise UsageError(f"{MOST_WAITING} checks wait already; try again later")

    def _made(self, kind: str) -> Path:
        """A new folder whose name nobody guesses."""
        folder = self._folder / f"{kind}-{secrets.token_hex(16)}"
        folder.mkdir(mode=0o700)
        return folder

    def _read(self, visitor: str, folder: Path, questions: Any, pictures: Any, settings: Settings) -> Check:
        with self._uploads.open(questions, "file of questions") as file:
            text = file.read(MAX_FILE + 1)
        if len(text) > MAX_FILE:
            raise UsageError(f"the file of questions is larger than {MAX_FILE // MEGABYTE} MB; make it shorter")
        source = Path(questions).name[-_LONGEST_NAME:]
        kind = Path(source).suffix.lower()
        if kind not in _FILES:
            raise UsageError(f"{shortened(source)} is none of what is read; give a {' or '.join(_FILES)} file")
        # Under the name that messages and the report show.
        (folder / "questions").mkdir()
        copy = folder / "questions" / source
        copy.write_bytes(text)
        unpacked = folder / "pictures"
        unpacked.mkdir()
        with self._uploads.open(pictures, "zip") as file:
            unpack(file, unpacked)
        try:
            found = read_questions(copy, within=unpacked)
        except QuestionsError as error:  # which names the place
            raise QuestionsError(str(error).replace(str(copy), source)) from error
        if len(found.questions) + len(found.bad) > MAX_RECORDS:
            raise UsageError(
                f"there are {len(found.questions) + len(found.bad):,} questions; give {MAX_RECORDS:,} at most, or use the "
                "command adafv check, which has no such limit"
            )
        found = _agreed(_usable(found), settings.bad_records)
        found, by = decided(found, settings.by, SKIP)
        found = _agreed(found, settings.bad_records)
        answers = len(found.questions) * len(settings.ways)
        if answers > MAX_ANSWERS:
            raise UsageError(
                f"{len(found.questions):,} questions in {len(settings.ways)} ways are {answers:,} answers; {MAX_ANSWERS:,} "
                "at most are given here: take fewer questions, methods or budgets"
            )
        return Check(visitor, folder, found, settings, by, source, total=answers)

    def _work(self) -> None:
        """Work the row off, and end."""
        while True:
            with self._changed:
                if not self._row:
                    self._worker = None
                    return
                check = self._row[0]
            phase = "failed"
            try:
                self._carry_out(check)
                phase = "done"
            except _Ended:
                phase = "stopped"
            except Exception as error:  # whatever it is, its visitor is told, and the next one goes on
                check.error = error
            finally:
                shutil.rmtree(check.folder, ignore_errors=True)
                with self._changed:
                    self._row.remove(check)
                check.phase = phase

    def _carry_out(self, check: Check) -> None:
        settings = check.settings
        check.began = time.monotonic()
        check.go_on()
        with self._turns.turn() as turn:
            check.waited = time.monotonic() - check.began
            check.phase = "asking"
            asker = Asker(self._session, max_new_tokens=settings.longest, suffix=settings.suffix)
            asker.check_ways(settings.ways)
            questions = _agreed(asker.check(check.questions, SKIP), settings.bad_records)
            fingerprint = asker.fingerprint()
            with Store(check.folder / "answers.jsonl", fingerprint) as store:

                def told(progress: Progress) -> None:
                    check.done, check.total, check.asked = progress.done, progress.total, progress.asked
                    _let_others(check, turn)

                try:
                    questions, keys = asker.run(
                        questions,
                        settings.ways,
                        store,
                        batch=_BATCH,
                        policy=settings.bad_records,
                        progress=told,
                        first=lambda asked: refuse_idle_budgets(asked, settings.ways, store, "keep"),
                    )
                except BadRecordsError as error:
                    raise _refusal(error.bad) from error
                turn.release()
                check.phase = "drawing"
                wish = Wish(settings.max_loss, check.by)
                counted = Counted(questions.questions, keys, store, settings.ways, wish)
            found = result(counted, self._about(check, fingerprint), questions.bad)
            pictures = []
            drawn = drawn_cases(asker, counted, found)
            for _ in found["cases"]:
                _let_others(check, turn)
                pictures.append(next(drawn))
            turn.release()
        check.go_on()
        self._write(check, found, page(found, pictures))
        check.result = found

    def _about(self, check: Check, fingerprint: dict[str, Any]) -> dict[str, Any]:
        ways, settings = [way for way in check.settings.ways if way.pruned], check.settings
        return {
            "model": self._model,
            "fingerprint": fingerprint,
            "source": check.source,
            "settings": {
                "methods": list(dict.fromkeys(way.name for way in ways)),
                "keep": [str(budget) for budget in settings.budgets],
                "suffix": settings.suffix,
                "text": None,
                "positions": "compact",
                "limit": None,
            },
        }

    def _write(self, check: Check, found: dict[str, Any], report: str) -> None:
        folder = self._made("report")
        (folder / RESULT).write_text(as_text(found), encoding="utf-8")
        (folder / REPORT).write_text(report, encoding="utf-8")
        check.report = folder
        # Later, whoever is there then.
        timer = threading.Timer(KEPT_SECONDS, shutil.rmtree, (folder,), {"ignore_errors": True})
        timer.daemon = True
        timer.start()
        with self._changed:
            self._reports.append(folder)
            old = self._reports.popleft() if len(self._reports) > _MOST_REPORTS else None
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def _let_others(check: Check, turn: Turn) -> None:
    """Between two steps: end where it must, and let questions of the other tab go first."""
    check.go_on()
    start = time.monotonic()
    turn.pass_on()
    check.waited += time.monotonic() - start
    check.go_on()


def _usable(questions: Questions) -> Questions:
    """Without the records whose pictures cannot be opened or have too many pixels, and those that are too long."""
    problems: dict[str, str | None] = {}
    bad = {}
    for question in questions.questions:
        picture = question.picture
        assert isinstance(picture, FilePicture)
        if picture.name not in problems:
            problems[picture.name] = _problem(picture)
        problem = problems[picture.name]
        if len(question.asked) > MAX_LETTERS:
            problem = f"has a question of {len(question.asked):,} letters; shorten it to {MAX_LETTERS:,}"
        if problem is not None:
            bad[question.name] = BadRecord(question.where, problem)
    return questions.without(list(bad.values()), set(bad))


def _problem(picture: FilePicture) -> str | None:
    """What is wrong with a picture, by its header: no pixel is decoded."""
    shown = shortened(picture.name)
    Image.init()
    try:
        with Image.open(picture.path, formats=[name for name in FORMATS if name in Image.OPEN]) as opened:
            width, height = opened.size
    except Image.DecompressionBombError:
        return f"{shown} has far more pixels than are read; scale it down"
    except Exception:  # readers of headers raise whatever they like
        return f"{shown} is not a picture that can be read; give a JPEG, PNG, WebP, GIF or BMP image"
    if width * height > MAX_PIXELS:
        return (
            f"{shown} is {width} x {height} pixels, more than the {MAX_PIXELS // 1_000_000} million that are read here"
        )
    try:
        check_shape((width, height), picture.name)
    except ImageError as error:
        return str(error)
    return None


def _agreed(questions: Questions, policy: str) -> Questions:
    """These, if bad records are to be left out or there are none.

    Raises:
        BadRecordsError: they are not to be left out.
        QuestionsError: nothing is left.
    """
    if questions.bad and policy != SKIP:
        raise _refusal(questions.bad)
    return questions.checked(SKIP)


def _refusal(bad: Sequence[BadRecord]) -> BadRecordsError:
    """In the words of the page."""
    records = "1 record" if len(bad) == 1 else f"{len(bad):,} records"
    return BadRecordsError(f"{records} cannot be used: mend what is listed, or choose to leave such records out", bad)
