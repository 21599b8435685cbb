"""A picture, a question, budgets and methods in; answers, measurements and drawings out. No Gradio here.

A picture goes through the tower once. What it made of it is kept for the next question, budget or method, as are the
unpruned model's answers, so that moving a budget runs what a budget changes and nothing else.
"""

import hashlib
import logging
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from adafv import defaults
from adafv.asking.failures import UsageError, check_text, out_of_memory
from adafv.asking.models import unknown_words, unknown_words_warning
from adafv.asking.session import Answer, Session, Timing
from adafv.core import Budget
from adafv.engines.transformers import EncodedImages, Pruner
from adafv.engines.transformers.encoded import takes_encoded
from adafv.errors import AdaFVError
from adafv.images import read_image
from adafv.methods import Method
from adafv.methods.options import method_from_text
from adafv.page.turns import OneAtATime
from adafv.page.uploads import Uploads
from adafv.picture import Panel, panels

UNPRUNED = "unpruned"
METHODS = (defaults.METHOD, "saliency")
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
MAX_BUDGETS = 6
MAX_WAYS = 12
"""Budgets, and methods times budgets, of one question."""
MAX_HELD = 256 * 2**20
"""Bytes of encoded pictures that are kept for the next question, in the memory of the model's device."""
_UNPRUNED_HELD = 32
"""Answers of the unpruned model that are kept for each of these pictures."""


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


@dataclass
class _Seen:
    """What is known of a picture."""

    encoded: EncodedImages
    tower: float
    """Seconds that tower and projector took, the median of `ROUNDS`."""
    methods: list[Method]
    """That what was read off the tower is for; the latest ones."""
    unpruned: "OrderedDict[tuple[str, int], Timing]" = field(default_factory=OrderedDict)
    """By question and longest answer."""

    def serves(self, method: Method) -> bool:
        """Whether the tower need not run for a method, or would have to in any case."""
        return self.encoded.serves(method) or not takes_encoded(method)


class Answers:
    """Answers of one model, for any number of threads at once."""

    def __init__(self, session: Session, uploads: Uploads) -> None:
        """Only pictures in `uploads` are read."""
        self._session = session
        self._uploads = uploads
        # One question at a time. A model object carries at most one pruner (a second one is refused), and tokenizers
        # must not be used by two threads at once. Nothing is lost: answers side by side would share the same cores, their
        # times would mean nothing, and every one of them would hold a decoded picture and a cache in memory.
        self.turns = OneAtATime("question")
        """Of the model; whoever else asks it takes turns here."""
        self._seen: OrderedDict[bytes, _Seen] = OrderedDict()
        """By the hash of a picture's file, the least recently used first. Only whoever has the turn looks."""
        self._pictures = OneAtATime("picture")

    def check_picture(self, path: Any) -> None:
        """Find out whether the picture at `path` can be read.

        Raises:
            ImageError: it cannot.
            BusyError: another picture has been in the way for too long.
        """
        data = self._uploads.read(path)
        with self._pictures.turn():
            _decoded(data)

    def compare(self, path: Any, question: Any, keep: Any, methods: Any, longest: Any) -> Comparison:
        """Answer by the unpruned model, then by each method at each budget; what is named twice runs once.

        The arguments may be anything, for whoever calls the page's server directly may send anything.

        Args:
            path: of the picture, a string.
            question: a string.
            keep: of the picture's visual tokens; one budget (see `adafv.core.Budget`), or a string of several, with commas.
            methods: a list of names, with options: "adafv:objective=split".
            longest: tokens of the answer.

        Raises:
            UsageError, ImageError: something is missing or out of bounds.
            BudgetError, OptionError: there is no such budget, method or option.
            AdaFVError: the model cannot be asked this way, or the budget does not suit the method.
            BusyError: another question has been in the way for too long.
        """
        if path is None:
            raise UsageError("choose or upload a picture first")
        question = checked_question(question)
        budgets = checked_budgets(keep)
        check_longest(longest)
        chosen = checked_methods(methods)
        if len(chosen) * len(budgets) > MAX_WAYS:
            raise UsageError(
                f"{len(chosen)} methods at {len(budgets)} budgets are {len(chosen) * len(budgets)} answers; {MAX_WAYS} at "
                "most are compared at once"
            )
        # Before it is our turn, so that no file can hold up whoever comes next; but not decoded, for a hundred bytes may
        # be a hundred megabytes then.
        data = self._uploads.read(path)
        with self.turns.turn():
            session = self._session
            inputs = session.inputs(_decoded(data), question)
            pruners = {
                name if len(budgets) == 1 else f"{name}, {budget}": session.pruner(method, budget)
                for name, method in chosen.items()
                for budget in budgets
            }
            seen = self._look(hashlib.sha256(data).digest(), inputs, list(chosen.values()))
            timings, answers = self._timed(inputs, question, seen, pruners, int(longest))
            crops = session.tower_view(inputs)
            tokenizer = session.processor.tokenizer
            warning = unknown_words_warning(tokenizer, unknown_words(tokenizer, question))
        before = timings[0].tokens
        drawn = [[], *(_drawn(answers[timing.name].record, crops) for timing in timings[1:])]
        results = [Result(timing, before, panels) for timing, panels in zip(timings, drawn, strict=True)]
        said = dict.fromkeys(text for text in (warning, *(answer.note for answer in answers.values())) if text)
        return Comparison(results, " ".join(as_sentence(text) for text in said))

    def _look(self, name: bytes, inputs: Any, methods: list[Method]) -> _Seen:
        """The picture as the tower leaves it, which it goes through unless it is held with all that the methods need."""
        held = self._seen.pop(name, None)
        if held is not None and not held.encoded.holds(self._session.model, inputs):
            held = None
        if held is not None and all(map(held.serves, methods)):
            seen = held
        else:
            if held is not None:
                methods = [*methods, *held.methods][:MAX_WAYS]
            seconds = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                encoded = self._session.encoded(inputs, methods=methods)
                encoded.images["image"][0].features[0, 0].item()  # waits for the device
                seconds.append(time.perf_counter() - start)
            seen = _Seen(encoded, statistics.median(seconds), methods)
            if held is not None:
                seen.unpruned = held.unpruned
        if seen.encoded.bytes <= MAX_HELD:
            self._seen[name] = seen
        while sum(each.encoded.bytes for each in self._seen.values()) > MAX_HELD:
            self._seen.popitem(last=False)
        return seen

    def _timed(
        self, inputs: Any, question: str, seen: _Seen, pruners: dict[str, Pruner], longest: int
    ) -> tuple[list[Timing], dict[str, Answer]]:
        """The unpruned model first, then each way; and the answers of the ways.

        The time to the first token of what reads the encoded picture is that of the tower, measured once, and of the rest.
        """
        session = self._session
        encoded = seen.encoded
        # Without the pixels, which nobody need compare again.
        bare = {name: value for name, value in inputs.items() if name not in encoded.pixels}

        def runs(pruner: Pruner | None) -> tuple[Callable[[int], Answer], float]:
            """What answers by so many tokens, and the seconds of what it leaves out."""
            if pruner is not None and encoded.serves(pruner.settings.method):
                return lambda most: session.ask(bare, pruner, most, encoded), seen.tower
            return lambda most: session.ask(inputs, pruner, most), 0.0

        known = seen.unpruned.pop((question, longest), None)
        ways = {**({UNPRUNED: None} if known is None else {}), **pruners}
        running = {name: runs(pruner) for name, pruner in ways.items()}
        answers = {name: run(longest) for name, (run, _) in running.items()}
        seconds: dict[str, list[float]] = {name: [] for name in running}
        # In turns, so that a busy machine is unfair to none of them.
        for _ in range(ROUNDS):
            for name, (run, before) in running.items():
                start = time.perf_counter()
                run(1)
                seconds[name].append(before + time.perf_counter() - start)
        if known is None:
            full = answers.pop(UNPRUNED)
            tokens = sum(next(answer.record.tokens_before for answer in answers.values() if answer.record is not None))
            known = Timing(UNPRUNED, full.answer, tokens, seconds[UNPRUNED], full.kv_mib)
        seen.unpruned[question, longest] = known
        while len(seen.unpruned) > _UNPRUNED_HELD:
            seen.unpruned.popitem(last=False)
        pruned = [
            Timing(name, answer.answer, sum(answer.record.tokens_after), seconds[name], answer.kv_mib)
            for name, answer in answers.items()
            if answer.record is not None
        ]
        return [known, *pruned], answers


def checked_question(question: Any) -> str:
    if question is not None and not isinstance(question, str):
        raise UsageError("the question is not a text; type it")
    question = (question or "").strip()
    if not question:
        raise UsageError("type a question first, such as: What is in the picture?")
    if len(question) > MAX_QUESTION:
        raise UsageError(f"the question has {len(question)} letters; shorten it to {MAX_QUESTION} at most")
    check_text(question, "the question")
    return question


def check_longest(value: Any) -> None:
    """The page's slider stays within bounds by itself; others may send anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= MAX_ANSWER:
        raise UsageError(f"the longest answer in tokens cannot be {_shown(value)}; give 1 to {MAX_ANSWER}")


def checked_budgets(keep: Any) -> list[Budget]:
    """Budgets as they were given, each once.

    Raises:
        UsageError, BudgetError: there are too many, or one is none.
    """
    parts = [part.strip() for part in keep.split(",")] if isinstance(keep, str) and "," in keep else [keep]
    if len(parts) > MAX_BUDGETS:
        raise UsageError(f"there are {len(parts)} budgets; give {MAX_BUDGETS} at most")
    return list(dict.fromkeys(map(Budget.of, parts)))


def checked_methods(words: Any) -> dict[str, Method]:
    """Methods by their names with options, each once.

    Raises:
        UsageError, OptionError: there are none or too many, or one is none.
    """
    listed = [words] if isinstance(words, str) else list(words or ()) if isinstance(words, (list, tuple)) else [words]
    if not listed or listed == [None]:
        raise UsageError("choose a method first")
    if len(listed) > MAX_WAYS:
        raise UsageError(f"there are {len(listed)} methods; choose {MAX_WAYS} at most")
    return {name: method for method, name in map(_checked_method, listed)}


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
