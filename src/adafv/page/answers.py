"""A picture, a question, a budget and two methods in; answers, measurements and drawings out. No Gradio here."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from adafv.asking.failures import UsageError, out_of_memory
from adafv.asking.models import unknown_words, unknown_words_warning
from adafv.asking.session import Session, Timing
from adafv.errors import AdaFVError, ImageError
from adafv.images import read_image
from adafv.methods import known_methods
from adafv.picture import Panel, panels

UNPRUNED = "unpruned"
MEGABYTE = 2**20
MAX_BYTES = 10 * MEGABYTE
"""Of an uploaded picture."""
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
    """Where the model does not know a word of the question; else empty."""


class Answers:
    """Answers of one model, for any number of threads at once."""

    def __init__(self, session: Session) -> None:
        self._session = session
        # One question at a time. A model object carries at most one pruner (a second one is refused), and tokenizers
        # must not be used by two threads at once. Nothing is lost: answers side by side would share the same cores, their
        # times would mean nothing, and every one of them would hold a decoded picture and a cache in memory.
        self._one_at_a_time = threading.Lock()
        self._one_picture_at_a_time = threading.Lock()

    def check_picture(self, path: str) -> None:
        """Find out whether the picture at `path` can be read.

        Raises:
            ImageError: it cannot.
        """
        with self._one_picture_at_a_time:
            _picture_at(path)

    def compare(
        self, path: str | None, question: str, percent: float, methods: Sequence[str], longest: int
    ) -> Comparison:
        """Answer by the unpruned model, then by each method; a method named twice runs once.

        Args:
            path: of the picture.
            percent: of the picture's visual tokens that are kept, 1 to 100.
            longest: tokens of the answer.

        Raises:
            UsageError, ImageError: something is missing or out of bounds.
            AdaFVError: the model cannot be asked this way, or the budget does not suit the method.
        """
        question = (question or "").strip()
        if path is None:
            raise UsageError("choose or upload a picture first")
        if not question:
            raise UsageError("type a question first, such as: What is in the picture?")
        if len(question) > MAX_QUESTION:
            raise UsageError(f"the question has {len(question)} letters; shorten it to {MAX_QUESTION} at most")
        _check_number("share of the visual tokens in per cent", percent, 100)
        _check_number("longest answer in tokens", longest, MAX_ANSWER)
        known = known_methods()
        for name in methods:
            if name not in known:
                raise UsageError(f"there is no method {name!r}; known are: {', '.join(known)}")
        with self._one_at_a_time:
            session = self._session
            inputs = session.inputs(_picture_at(path), question)
            modes = {UNPRUNED: None, **{name: session.pruner(name, percent / 100) for name in methods}}
            answers = {name: session.ask(inputs, pruner, int(longest)) for name, pruner in modes.items()}
            timings = session.compare(inputs, modes, int(longest), ROUNDS, answers)
            crops = session.tower_view(inputs)
            tokenizer = session.processor.tokenizer
            warning = unknown_words_warning(tokenizer, unknown_words(tokenizer, question))
        before = timings[0].tokens
        results = [Result(timing, before, _drawn(answers[timing.name].record, crops)) for timing in timings]
        return Comparison(results, as_sentence(warning))


def _check_number(what: str, value: Any, most: int) -> None:
    """The page's sliders stay within bounds by themselves; whoever calls its server directly may send anything."""
    if not isinstance(value, (int, float)) or not 1 <= value <= most:
        raise UsageError(f"the {what} cannot be {value!r}; give 1 to {most}")


def _picture_at(path: str) -> Image.Image:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ImageError("the picture is no longer there; choose or upload it again") from error
    if len(data) > MAX_BYTES:
        raise ImageError(
            f"the picture is larger than {MAX_BYTES // MEGABYTE} MB; scale it down, or save it as JPEG or WebP"
        )
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
