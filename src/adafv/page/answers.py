"""A picture, a question, a budget and two methods in; answers, measurements and drawings out. No Gradio here."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from adafv import defaults
from adafv.asking.failures import UsageError, check_text, out_of_memory
from adafv.asking.models import unknown_words, unknown_words_warning
from adafv.asking.session import Session, Timing
from adafv.core import Budget
from adafv.engines.transformers import EncodedImages
from adafv.errors import AdaFVError
from adafv.images import read_image
from adafv.methods import Method
from adafv.methods.options import method_from_text
from adafv.page.uploads import Uploads
from adafv.picture import Panel, panels

UNPRUNED = "unpruned"
METHOD_A, METHOD_B = defaults.METHOD, "saliency"
"""What is compared when the page opens."""
MAX_QUESTION = 500
"""Letters; a long text would take the memory and the time of everyone in the queue."""
MAX_ANSWER = 128
"""Tokens."""
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP")
"""Of `adafv.images.FORMATS`, those that every browser shows. (Phones write MPO, which is a JPEG with another behind it.)"""
ROUNDS = 3
"""Timed runs per way, of which the median is shown; as in `adafv ask --compare`."""
PANEL_WIDTH = 448
"""Pixels of a drawing; twice the size in which a page of 1280 pixels shows it."""
MAX_METHOD = 120
"""Letters of a method with its options."""
PATIENCE = 600.0
"""Seconds that one question may take before those behind it are told so instead of waiting on."""


class BusyError(AdaFVError):
    """Something that must be done one at a time has been going on for too long."""


@dataclass(frozen=True)
class Result:
    """What one way to run came to."""

    timing: Timing
    tokens_before: int
    """Visual tokens of the picture, unpruned."""
    panels: list[Panel]
    """What was kept and why; empty for the unpruned model."""


@dataclass(frozen=True)
class Comparison:
    """What came of one question."""

    results: list[Result]
    """The unpruned model first, then each method."""
    warning: str
    """Where the model does not know a word of the question, or no word counts; else empty."""


class Answers:
    """Answers of one model, for any number of threads at once."""

    def __init__(self, session: Session, uploads: Uploads) -> None:
        """Only pictures in `uploads` are read."""
        self._session = session
        self._uploads = uploads
        # One question at a time. A model object carries at most one pruner (a second one is refused), and tokenizers
        # must not be used by two threads at once. Nothing is lost: answers side by side would share the same cores, their
        # times would mean nothing, and every one of them would hold a decoded picture and a cache in memory.
        self._questions = _OneAtATime("question")
        self._encoded: EncodedImages | None = None  # the last picture
        self._pictures = _OneAtATime("picture")

    def check_picture(self, path: Any) -> None:
        """Find out whether the picture at `path` can be read.

        Raises:
            ImageError: it cannot.
            BusyError: another picture has been in the way for too long.
        """
        data = self._uploads.read(path)
        with self._pictures.turn():
            _decoded(data)

    def compare(self, path: Any, question: Any, keep: Any, methods: Sequence[Any], longest: Any) -> Comparison:
        """Answer by the unpruned model, then by each method; a method named twice runs once.

        The arguments may be anything, for whoever calls the page's server directly may send anything.

        Args:
            path: of the picture, a string.
            question: a string.
            keep: of the picture's visual tokens; see `adafv.core.Budget`.
            methods: their names, with options: "adafv:objective=split".
            longest: tokens of the answer.

        Raises:
            UsageError, ImageError: something is missing or out of bounds.
            BudgetError, OptionError: there is no such budget, method or option.
            AdaFVError: the model cannot be asked this way, or the budget does not suit the method.
            BusyError: another question has been in the way for too long.
        """
        if path is None:
            raise UsageError("choose or upload a picture first")
        question = _checked_question(question)
        budget = Budget.of(keep)
        _check_longest(longest)
        chosen = {name: method for method, name in map(_checked_method, methods)}
        # Before it is our turn, so that no file can hold up whoever comes next; but not decoded, for a hundred bytes may
        # be a hundred megabytes then.
        data = self._uploads.read(path)
        with self._questions.turn():
            session = self._session
            inputs = session.inputs(_decoded(data), question)
            modes = {UNPRUNED: None, **{name: session.pruner(method, budget) for name, method in chosen.items()}}
            encoded = self._encoded = session.encoded(inputs, self._encoded)  # the next question may be about it, too
            answers = {name: session.ask(inputs, pruner, int(longest), encoded) for name, pruner in modes.items()}
            timings = session.compare(inputs, modes, int(longest), ROUNDS, answers)
            crops = session.tower_view(inputs)
            tokenizer = session.processor.tokenizer
            warning = unknown_words_warning(tokenizer, unknown_words(tokenizer, question))
        before = timings[0].tokens
        results = [Result(timing, before, _drawn(answers[timing.name].record, crops)) for timing in timings]
        said = dict.fromkeys(text for text in (warning, *(answer.note for answer in answers.values())) if text)
        return Comparison(results, " ".join(as_sentence(text) for text in said))


class _OneAtATime:
    """A lock that gives up on whoever holds it: a request that hangs must not hang all that come after it."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._changed = threading.Condition()
        self._since: float | None = None
        """When the one whose turn it is began."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for our turn, and have it.

        Raises:
            BusyError: the one whose turn it is has had it for longer than `PATIENCE`.
        """
        with self._changed:
            while self._since is not None:
                left = self._since + PATIENCE - time.monotonic()
                if left <= 0:
                    raise BusyError(
                        f"another {self._what} has been going on for more than {PATIENCE / 60:.0f} minutes; try again "
                        "later, or ask whoever runs this page to start it again"
                    )
                self._changed.wait(left)
            self._since = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self._since = None
                self._changed.notify()


def _checked_question(question: Any) -> str:
    if question is not None and not isinstance(question, str):
        raise UsageError("the question is not a text; type it")
    question = (question or "").strip()
    if not question:
        raise UsageError("type a question first, such as: What is in the picture?")
    if len(question) > MAX_QUESTION:
        raise UsageError(f"the question has {len(question)} letters; shorten it to {MAX_QUESTION} at most")
    check_text(question, "the question")
    return question


def _check_longest(value: Any) -> None:
    """The page's slider stays within bounds by itself; others may send anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= MAX_ANSWER:
        raise UsageError(f"the longest answer in tokens cannot be {_shown(value)}; give 1 to {MAX_ANSWER}")


def _checked_method(text: Any) -> tuple[Method, str]:
    if not isinstance(text, str):
        raise UsageError(f"there is no method {_shown(text)}; choose one")
    if len(text) > MAX_METHOD:
        raise UsageError(f"a method with its options has {len(text)} letters; {MAX_METHOD} at most are needed")
    return method_from_text(text)


def _shown(value: Any) -> str:
    """`value` for a message, which must stay short."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _decoded(data: bytes) -> Image.Image:
    return read_image(data, "the picture", FORMATS)


def _drawn(record: Any, crops: Any) -> list[Panel]:
    return [] if record is None else panels(record, 0, crops, width=PANEL_WIDTH)


def message(error: Exception) -> str:
    """What to tell the user: a sentence or two, never a trace. What nobody foresaw is logged for whoever runs the page."""
    if isinstance(error, (UsageError, AdaFVError)):
        text = str(error)
    elif out_of_memory(error):
        text = "the model ran out of memory; keep fewer tokens, or ask for a shorter answer"
    else:
        logging.getLogger(__name__).error("a question could not be answered", exc_info=error)
        text = (
            f"this went wrong in a way that adafv did not foresee ({type(error).__name__}); the terminal in which the "
            "page was started shows more"
        )
    return as_sentence(text)


def as_sentence(text: str) -> str:
    """Messages are written to follow "error: "; here they stand by themselves."""
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith(("?", ".")) or not text else ".")
