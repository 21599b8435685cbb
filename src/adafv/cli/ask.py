"""`adafv ask`: questions about one image, and what pruning did."""

import codecs
import io
import itertools
import json
import math
import os
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adafv.asking.failures import UsageError, check_text
from adafv.asking.models import about, checked_model, folder_or_id, hub_options, unknown_words, unknown_words_warning
from adafv.cli.failures import FAILED, OutputError, failures_as_messages, put, say, warnings_as_messages
from adafv.cli.options import (
    DTYPES,
    METHOD,
    RUN,
    DefaultMethodOption,
    DeviceOption,
    DtypeOption,
    MethodOptions,
    ModelOption,
    ObjectiveOption,
    TextOption,
    one_of,
    with_shorthands,
)
from adafv.core.budget import Budget
from adafv.defaults import method_or_default
from adafv.printable import printable, shortened

if TYPE_CHECKING:
    from PIL.Image import Image

    from adafv.asking.session import Answer, Session, Timing, Turn
    from adafv.core.crops import Crops
    from adafv.engines.transformers import Pruner, Record
    from adafv.methods import Method

PICTURE_KINDS = (".png", ".jpg", ".jpeg", ".webp")
_PROBE = 64 * 1024
"""Bytes that are written to find out whether a picture can be."""
_OUTPUT = "What to show"

LINES = "-"
"""Questions, or the image, come from standard input."""
QUIT = "/quit"
LONGEST_LINE = 2**20
ROOM = "1GB"
"""For the encoded image, where there are several questions about it. It is one image, so most of this is never taken."""


def ask(
    image: Annotated[str, typer.Argument(help="Path or http(s) URL of the image; - reads standard input.")],
    question: Annotated[str, typer.Argument(help="What to ask; - reads questions from standard input, one a line.")],
    also: Annotated[
        list[str] | None,
        typer.Option("--also", "-a", help="A further question about the image; several times, if need be."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="The questions follow one another, and the model sees what was said before; /quit ends."
        ),
    ] = False,
    model: ModelOption = "",
    keep: Annotated[
        str,
        typer.Option(
            help="Visual tokens to keep: a number (64), a share (0.1 or 10%), or all.", rich_help_panel=METHOD
        ),
    ] = "0.1",
    method: DefaultMethodOption = None,
    option: MethodOptions = None,
    objective: ObjectiveOption = None,
    variant: Annotated[
        str | None,
        typer.Option(help="Short for --option variant=...: corrected or published.", rich_help_panel=METHOD),
    ] = None,
    text: TextOption = None,
    positions: Annotated[
        str, typer.Option(help="Of the kept tokens: compact or original.", rich_help_panel=METHOD)
    ] = "compact",
    crops: Annotated[
        str,
        typer.Option(
            help="Crops that the tower sees, where the model cuts pictures up: all; thumbnail; how many beside it; or auto, "
            "all where the thumbnail leaves the model unsure.",
            rich_help_panel=METHOD,
        ),
    ] = "all",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=RUN)] = 64,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run it unpruned and by saliency alone, too.", rich_help_panel=_OUTPUT)
    ] = False,
    compare_with: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD,...",
            help="As --compare, but by these methods: uniform,adafv:objective=split",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="With --compare: timed rounds; the median is shown.", rich_help_panel=_OUTPUT)
    ] = 3,
    picture: Annotated[
        Path | None, typer.Option(help="Draw what was kept into this png, jpg or webp file.", rich_help_panel=_OUTPUT)
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object per question, not the answer.", rich_help_panel=_OUTPUT),
    ] = False,
) -> None:
    """Ask a question about an image, with most visual tokens pruned.

    The answer goes to standard output, everything else to standard error. Without --model, a small model answers that
    comes with adafv and knows only simple drawings.

        adafv ask photo.jpg "What is the man holding?" --model llava-hf/llava-1.5-7b-hf --keep 64

    Several questions are each answered for itself, with the tokens that it needs; the image is encoded once.

        adafv ask photo.jpg "How many cups are there?" --also "What colour are they?"

    With --chat they follow one another; with - they are read from standard input.

        adafv ask photo.jpg - --chat
    """
    method = method_or_default(method, objective, variant)
    wish = _Wish(**locals())
    with failures_as_messages():
        _answer(wish)


@dataclass(frozen=True)
class _Wish:
    """The command line, as it was given."""

    image: str
    question: str
    also: list[str] | None
    chat: bool
    model: str
    keep: str
    method: str
    option: list[str] | None
    objective: str | None
    variant: str | None
    text: str | None
    positions: str
    crops: str
    max_new_tokens: int
    dtype: str
    device: str | None
    compare: bool
    compare_with: str | None
    repeats: int
    picture: Path | None
    as_json: bool


@dataclass(frozen=True)
class _Pruning:
    """How to prune, checked as far as it can be without a model."""

    budget: Budget
    scope: str | None
    positions: str
    crops: "Crops"
    name: str
    """Of the method, with its options where it was given some."""
    method: "Method"
    parameters: dict[str, Any]
    """Those that were given."""
    rivals: dict[str, "Method"]
    """By name, to compare with; empty where nothing is to be compared."""

    @classmethod
    def of(cls, wish: _Wish, budget: Budget) -> "_Pruning":
        from adafv.asking.session import CHAT_SCOPE
        from adafv.core.crops import Crops
        from adafv.engines.transformers import Pruner
        from adafv.engines.transformers.settings import POSITIONS
        from adafv.methods.options import in_one_word, method_from_text, method_of, parameters_from_options
        from adafv.prompts.text import SCOPES

        written = with_shorthands(wish.option, objective=wish.objective, variant=wish.variant)
        parameters = parameters_from_options(wish.method, written)
        method = method_of(wish.method, parameters)
        one_of("--positions", wish.positions, POSITIONS)
        if wish.text is not None:
            one_of("--text", wish.text, SCOPES)
        name = in_one_word(wish.method, parameters)
        rivals = {}
        for rival in (wish.compare_with or "saliency").split(",") if wish.compare or wish.compare_with else ():
            other, its_name = method_from_text(rival)
            if its_name != name:
                rivals[its_name] = other
        for each in (method, *rivals.values()):
            Pruner(each, budget, positions=wish.positions, crops=wish.crops)  # finds what does not go together
        scope = CHAT_SCOPE if wish.chat and wish.text is None and method.scope is None else wish.text
        return cls(budget, scope, wish.positions, Crops.of(wish.crops), name, method, parameters, rivals)

    def pruners(self, session: "Session", remember: str | None) -> "tuple[Pruner, dict[str, Pruner]]":
        """(the one that was asked for, its rivals) for the model."""
        with warnings_as_messages():
            made, *others = (
                session.pruner(
                    method, self.budget, self.scope, positions=self.positions, crops=self.crops, remember=remember
                )
                for method in (self.method, *self.rivals.values())
            )
        return made, dict(zip(self.rivals, others, strict=True))


def _checked_question(question: str) -> str:
    if not question.strip():
        raise UsageError('the question is empty; ask something, as in: adafv ask photo.jpg "What is in the picture?"')
    check_text(question, "the question")
    return question.strip()


def _checked_questions(wish: _Wish) -> list[str]:
    """What is asked; none where it is read from standard input."""
    if wish.question == LINES:
        if wish.also:
            raise UsageError("questions come from standard input, or as --also, not both; leave one out")
        if wish.image == LINES:
            raise UsageError("standard input is the image or the questions, not both; name a file for the image")
        questions = []
    else:
        questions = [_checked_question(question) for question in (wish.question, *(wish.also or ()))]
    if len(questions) != 1 or wish.chat:
        for name, given in (("--compare", wish.compare or wish.compare_with), ("--picture", wish.picture)):
            if given:
                raise UsageError(f"{name} shows what becomes of one question; ask that one by itself")
    return questions


def _checked_picture(path: Path, image: str) -> Path:
    """Where the picture is to be written, once it is known that it can be; symbolic links are followed.

    Args:
        image: the source of the image that the question is about, which must not be overwritten.
    """
    name = f"--picture {shortened(path)}"
    if path.suffix.lower() not in PICTURE_KINDS:
        raise UsageError(f"{name}: the name must end in one of {', '.join(PICTURE_KINDS)}")
    try:
        there = _status(path)
        target = Path(os.path.realpath(path))
        if there is None:
            if not target.parent.is_dir():
                raise UsageError(f"{name}: there is no folder {shortened(target.parent)}; create it first")
        elif stat.S_ISDIR(there.st_mode):
            raise UsageError(f"{name} is a folder; name a file")
        elif not stat.S_ISREG(there.st_mode):
            raise UsageError(f"{name} is not a regular file; choose another place")
        elif any(os.path.samestat(there, given) for given in _inputs(image)):
            raise UsageError(f"{name} is the image that the question is about; choose another name")
        elif not os.access(target, os.W_OK):
            raise UsageError(f"{name} may not be written; choose another place")
        # A file without a name, which is gone when it is closed: the only way to know about permissions, read-only disks,
        # quotas and full disks alike.
        with tempfile.TemporaryFile(dir=target.parent) as probe:
            probe.write(bytes(_PROBE))
    except OSError as error:
        raise UsageError(f"{name} cannot be written ({_why(error)}); choose another place") from error
    return target


def _status(path: Path) -> os.stat_result | None:
    """Of what a path leads to; None where there is nothing."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _inputs(image: str) -> list[os.stat_result]:
    """What the image is read from. Two paths may lead to one file: by links, or by upper and lower case."""
    found = []
    with suppress(OSError, ValueError, AttributeError):  # an address, or nothing
        found.append(os.fstat(sys.stdin.fileno()) if image == "-" else os.stat(image))
    return found


def _why(error: OSError) -> str:
    return shortened(error.strerror or str(error) or type(error).__name__)


def _answer(wish: _Wish) -> None:
    from adafv.images import is_address

    questions, model, budget = _checked_questions(wish), checked_model(wish.model), Budget.of(wish.keep)
    one_of("--dtype", wish.dtype, DTYPES)
    picture = None if wish.picture is None else _checked_picture(wish.picture, wish.image)
    # What can be found wrong without torch is, as torch takes seconds to import. A download waits for the rest of it.
    image = None if is_address(wish.image) else _read(wish.image)
    with _progress(f"looking for {model}"):
        hub_options(folder_or_id(model))
    with _progress("starting torch and transformers"):
        pruning = _Pruning.of(wish, budget)
        from adafv.asking.session import Session, check_device

        device = check_device(wish.device)
    if image is None:
        image = _read(wish.image)
    start = time.perf_counter()
    with _progress(f"loading {model}"):
        session = Session.load(model, wish.dtype, device)
        several = len(questions) != 1 or wish.chat
        pruner, rivals = pruning.pruners(session, ROOM if several else None)
    loaded = time.perf_counter() - start
    if several:
        _Asking(wish, session.preparing_once(), pruner, pruning, image, model, loaded).answer(questions)
        return
    [question] = questions
    inputs = session.inputs(image, question)
    tokenizer = session.processor.tokenizer
    unknown = unknown_words(tokenizer, question)
    if unknown:
        say(f"warning: {unknown_words_warning(tokenizer, unknown)}")
    with _progress("answering"):
        pruned = session.ask(inputs, pruner, wish.max_new_tokens)
    record = pruned.record
    assert record is not None
    if pruned.note:
        say(f"note: {pruned.note}")

    # The answer comes first, whatever becomes of the rest; one JSON object holds the comparison, so it has to wait for it.
    if not wish.as_json:
        put(printable(pruned.answer, kept="\n\t"))
        say(about(model, tokenizer))
    timings: list[Timing] = []
    compares = wish.compare or wish.compare_with is not None
    if compares:
        modes: dict[str, Pruner | None] = {"unpruned": None, pruning.name: pruner, **rivals}
        with _progress("comparing"):
            timings = session.compare(inputs, modes, wish.max_new_tokens, wish.repeats, {pruning.name: pruned})

    if wish.as_json:
        result = _result(pruned, model, question, unknown, pruning, session, loaded)
        if compares:
            result["compare"] = [timing.as_dict() for timing in timings]
        put(json.dumps(_without_nan(result), allow_nan=False))
    elif compares:
        _print_table(timings)
    else:
        say(_summary(pruned))
    if picture is not None:
        _draw(picture, session, inputs, record, question, pruned.answer)


@dataclass(frozen=True)
class _Asking:
    """Several questions about one image: given as a list, or read as somebody asks them."""

    wish: _Wish
    session: "Session"
    pruner: "Pruner"
    pruning: _Pruning
    image: "Image"
    model: str
    loaded: float
    said: "list[Turn]" = field(default_factory=list)
    """The turns of a chat."""

    def answer(self, questions: list[str]) -> None:
        """Answer these questions in as few batches as there is room for, those of a chat one after the other; where there are
        none, those that are asked."""
        if self.wish.chat:
            self.session.check_chat()
        if not questions:
            self._as_they_come()
            return
        for question in questions:
            self.session.check_question(question)  # of all of them, before the first answer
        while questions:
            room = 1
            if not self.wish.chat:
                room = self.session.most_together(self.session.inputs(self.image, questions[0]), self.pruner)
            self._together(questions[:room])
            questions = questions[room:]
        if not self.wish.as_json:
            say(about(self.model, self.session.processor.tokenizer))

    def _as_they_come(self) -> None:
        """Ask for questions until there are no more. At a terminal, one that cannot be asked ends nothing; elsewhere it does,
        or answers would no longer stand in the places of their questions."""
        terminal, asked, ended = _at_a_terminal(), 0, False
        if terminal:
            how = f"{QUIT} or Ctrl-D ends" if self.wish.chat else "every question is one by itself; Ctrl-D ends"
            say(f"{about(self.model, self.session.processor.tokenizer)}; {how}")
        try:
            for place, line in _lines(terminal):
                ended = self.wish.chat and line.strip() == QUIT
                if ended:
                    break
                asked += self._asked(place, line, terminal)
        except KeyboardInterrupt:
            if not (terminal and self.wish.chat):
                raise
            sys.stderr.write("\n")
        if not asked and not terminal and not ended:
            raise UsageError("no question came from standard input; write one a line, or name it behind the image")
        if not terminal and not self.wish.as_json:
            say(about(self.model, self.session.processor.tokenizer))

    def _asked(self, place: int, line: str, terminal: bool) -> bool:
        """Answer a line of standard input; whether it was a question."""
        if not line.strip():
            return False
        try:
            question = _checked_question(line)
            self.session.check_question(question)
            self._together([question])
        except UsageError as error:
            if not terminal:
                raise UsageError(f"line {place} of standard input: {error}") from error
            say(f"error: {error}")
            return False
        return True

    def _together(self, questions: list[str]) -> None:
        with _progress("answering"):
            if self.wish.chat:
                answers = [self._in_the_chat(*questions)]
            else:
                answers = self.session.ask_together(self.image, questions, self.pruner, self.wish.max_new_tokens)
        tokenizer = self.session.processor.tokenizer
        for question, answered in zip(questions, answers, strict=True):
            unknown = unknown_words(tokenizer, question)
            if (len(questions) > 1 or self.wish.also) and not self.wish.as_json:
                say(f"question: {question}")
            if unknown:
                say(f"warning: {unknown_words_warning(tokenizer, unknown)}")
            if answered.note:
                say(f"note: {answered.note}")
            if self.wish.as_json:
                result = _result(answered, self.model, question, unknown, self.pruning, self.session, self.loaded)
                result |= {"turn": len(self.said)} if self.wish.chat else {"together": answered.together}
                put(json.dumps(_without_nan(result), allow_nan=False))
            else:
                put(printable(answered.answer, kept="\n\t"))
                say(_summary(answered))

    def _in_the_chat(self, question: str) -> "Answer":
        inputs = self.session.inputs(self.image, question, self.said)
        self.session.check_room(inputs, self.pruner, self.wish.max_new_tokens)
        answered = self.session.ask(inputs, self.pruner, self.wish.max_new_tokens)
        self.said.append((question, answered.answer))
        return answered


def _at_a_terminal() -> bool:
    """Whether somebody types the questions."""
    return sys.stdin.isatty()


def _lines(terminal: bool) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of standard input; bytes that are not UTF-8 are left for `check_text` to name."""
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    bom = codecs.BOM_UTF8  # which some shells put in front of what they pipe
    for place in itertools.count(1):
        if terminal:
            sys.stderr.write("question> ")
            sys.stderr.flush()
        line = stream.readline(LONGEST_LINE)
        if not line:
            if terminal:
                sys.stderr.write("\n")
            return
        if len(line) == LONGEST_LINE:
            raise UsageError(
                f"line {place} of standard input has more than {LONGEST_LINE - 1} bytes; shorten the question"
            )
        if isinstance(line, bytes):
            line = (line.removeprefix(bom) if place == 1 else line).decode("utf-8", "surrogateescape")
        yield place, line


def _result(
    pruned: "Answer",
    model: str,
    question: str,
    unknown: list[str],
    pruning: _Pruning,
    session: "Session",
    loaded: float,
) -> dict[str, Any]:
    record, images = pruned.record, pruned.images
    assert record is not None
    return {
        "answer": pruned.answer,
        "tokens_before": sum(image.tokens_before for image in images),
        "tokens_after": sum(image.tokens_after for image in images),
        "kept": [image.kept.tolist() for image in images],
        "objective": images[0].objective,
        "certificate": images[0].certificate,
        "method": pruning.method.name,
        "parameters": pruning.parameters,
        "keep": pruning.budget.keep,
        "model": model,
        "question": question,
        "unknown_words": unknown,
        "positions": pruning.positions,
        "crops": str(pruning.crops),
        "crops_seen": list(images[0].crops or range(images[0].layout.crops)),
        "certainty": None if record.certainty is None else record.certainty[pruned.row],
        "dtype": session.dtype,
        "device": str(session.device),
        "kv_mib": pruned.kv_mib,
        "seconds": {"load": loaded, **record.seconds},
    }


def _read(source: str) -> "Image":
    from adafv.images import load_image

    with _progress("reading the image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks; what matters is an error in ours
        return load_image(source)


def _summary(pruned: "Answer") -> str:
    assert pruned.record is not None
    before, after = (sum(getattr(image, f"tokens_{when}") for image in pruned.images) for when in ("before", "after"))
    taken = pruned.record.seconds.items()
    seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in taken if value >= 0.005)
    share = f"{100 * after / before:.3g} %"
    text = f"kept {after} of {before} visual tokens ({share}), prompt's KV cache {pruned.kv_mib:.1f} MiB"
    if pruned.together > 1:
        text += f", {pruned.together} questions together"
    for image in pruned.images[:1]:
        if image.crops is not None:
            text += f", {len(image.crops)} of {image.layout.crops} crops seen"
    if pruned.record.certainty is not None:
        text += f", {100 * pruned.record.certainty[pruned.row]:.0f} % sure by the thumbnail"
    return f"{text}; {seconds}" if seconds else text


def _draw(path: Path, session: "Session", inputs: Any, record: "Record", question: str, answer: str) -> None:
    """Draw what was kept. The answer is out already, so whatever fails here says that the picture alone is missing."""
    from adafv.picture import draw

    try:
        drawn: Image = draw(record, 0, session.tower_view(inputs), question=question, answer=answer)
        _write(drawn, path)
    except (OSError, ValueError, MemoryError) as error:
        reason = _why(error) if isinstance(error, OSError) else shortened(str(error) or type(error).__name__)
        say(f"error: the answer is complete, but --picture {path} was not written ({reason}); choose another place")
        raise typer.Exit(FAILED) from error
    say(f"drew {path}")


def _write(picture: "Image", path: Path) -> None:
    """Write a picture whole or not at all; what was there before stays until the new one is complete."""
    data = io.BytesIO()
    kind = path.suffix.lower().removeprefix(".").replace("jpg", "jpeg")
    picture.save(data, kind, quality=92)
    # Not by `tempfile`, whose files nobody else may read.
    beside = path.with_name(f".adafv-{os.getpid()}-{os.urandom(4).hex()}.tmp")
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(handle, "wb") as file:
            file.write(data.getvalue())
            file.flush()
            os.fsync(handle)  # some disks find out here that they are full
        with suppress(FileNotFoundError):
            os.chmod(beside, stat.S_IMODE(path.stat().st_mode))
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise


def _print_table(timings: "list[Timing]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(caption="first token: median of the timed rounds; KV cache: of the prompt")
    table.add_column("method")
    table.add_column("answer", overflow="fold")
    for heading in ("visual tokens", "first token, s", "KV cache, MiB"):
        table.add_column(heading, justify="right")
    for timing in timings:
        table.add_row(
            timing.name,
            Text(printable(timing.answer, kept="\n")),
            str(timing.tokens),
            f"{timing.median:.3f}",
            f"{timing.kv_mib:.2f}",
        )
    try:
        Console(file=sys.stdout).print(table)
    except OSError as error:
        raise OutputError from error


def _progress(what: str) -> AbstractContextManager[Any]:
    """A spinner on standard error, where that is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(f"{shortened(what)} ..."))


def _without_nan(value: Any) -> Any:
    """`value` with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
