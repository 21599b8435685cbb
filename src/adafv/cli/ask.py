"""`adafv ask`: one question about one image, and what pruning did."""

import difflib
import io
import json
import math
import os
import re
import stat
import sys
import tempfile
import time
import warnings
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adafv.asking.failures import UsageError, check_text
from adafv.asking.models import about, checked_model, folder_or_id, hub_options, unknown_words, unknown_words_warning
from adafv.cli.failures import FAILED, OutputError, failures_as_messages, put, say
from adafv.cli.options import METHOD, MethodOption, ModelOption, ObjectiveOption, TextOption
from adafv.printable import printable, shortened

if TYPE_CHECKING:
    from PIL.Image import Image

    from adafv.asking.session import Session, Timing
    from adafv.engines.transformers import Pruner, Record

PICTURE_KINDS = (".png", ".jpg", ".jpeg", ".webp")
_PROBE = 64 * 1024
"""Bytes that are written to find out whether a picture can be."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
_RUN = "How to run it"
_OUTPUT = "What to show"


def ask(
    image: Annotated[str, typer.Argument(help="Path or http(s) URL of the image; - reads standard input.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: ModelOption = "",
    keep: Annotated[
        str,
        typer.Option(
            help="Visual tokens to keep: a number (64), a share (0.1 or 10%), or all.", rich_help_panel=METHOD
        ),
    ] = "0.1",
    method: MethodOption = "adafv",
    objective: ObjectiveOption = None,
    variant: Annotated[
        str | None, typer.Option(help="Of method adafv: corrected (default) or published.", rich_help_panel=METHOD)
    ] = None,
    text: TextOption = None,
    positions: Annotated[
        str, typer.Option(help="Of the kept tokens: compact or original.", rich_help_panel=METHOD)
    ] = "compact",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=_RUN)] = 64,
    dtype: Annotated[
        str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.", rich_help_panel=_RUN)
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(help="Such as cpu, cuda, cuda:1. Default: cuda where there is one.", rich_help_panel=_RUN),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run it unpruned and by saliency alone, too.", rich_help_panel=_OUTPUT)
    ] = False,
    repeats: Annotated[
        int, typer.Option(min=1, help="With --compare: timed rounds; the median is shown.", rich_help_panel=_OUTPUT)
    ] = 3,
    picture: Annotated[
        Path | None, typer.Option(help="Draw what was kept into this png, jpg or webp file.", rich_help_panel=_OUTPUT)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the answer.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Ask a question about an image, with most visual tokens pruned.

    The answer goes to standard output, everything else to standard error. Without --model, a small model answers that
    comes with adafv and knows only simple drawings.

        adafv ask photo.jpg "What is the man holding?" --model llava-hf/llava-1.5-7b-hf --keep 64
    """
    with failures_as_messages():
        wish = _Wish(
            image=image,
            question=_checked_question(question),
            model=checked_model(model),
            keep=parse_keep(keep),
            method=method,
            parameters={
                name: value for name, value in {"objective": objective, "variant": variant}.items() if value is not None
            },
            text=text,
            positions=positions,
            max_new_tokens=max_new_tokens,
            dtype=one_of("--dtype", dtype, DTYPES),
            device=device,
            compare=compare,
            repeats=repeats,
            picture=None if picture is None else _checked_picture(picture, image),
            as_json=as_json,
        )
        _answer(wish)


@dataclass(frozen=True)
class _Wish:
    """What was asked for on the command line, as far as it can be checked without torch."""

    image: str
    question: str
    model: str
    keep: int | float
    method: str
    parameters: dict[str, str]
    text: str | None
    positions: str
    max_new_tokens: int
    dtype: str
    device: str | None
    compare: bool
    repeats: int
    picture: Path | None
    as_json: bool


def parse_keep(text: str) -> int | float:
    """A budget as written on the command line: "64" tokens, a share "0.1" or "10%", or "all".

    Raises:
        UsageError: it is none of these.
    """
    written = text.strip().lower()
    if written == "all":
        return 1.0
    try:
        if re.fullmatch(r"[+-]?\d+", written):
            value: int | float = int(written)
        elif written.endswith("%"):
            value = float(written[:-1]) / 100
        else:
            value = float(written)
    except ValueError:
        raise UsageError(
            f"--keep {shortened(text)!r} is not a budget; give tokens (64), a share (0.1 or 10%), or all"
        ) from None
    if isinstance(value, int) and value < 1:
        raise UsageError(f"--keep {text}: at least one visual token must stay; give 1 or more")
    if isinstance(value, float) and not 0.0 < value <= 1.0:
        raise UsageError(
            f"--keep {text}: a share lies above 0 and not above 1 (100%); for a number of tokens leave the point out"
        )
    return value


def _checked_question(question: str) -> str:
    if not question.strip():
        raise UsageError('the question is empty; ask something, as in: adafv ask photo.jpg "What is in the picture?"')
    check_text(question, "the question")
    return question.strip()


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


def one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"{option} {shortened(value)!r} does not exist; known are: {', '.join(known)}{hint}")
    return value


def _checked_pruner(wish: _Wish, session: "Session | None" = None) -> "Pruner":
    """The pruner that was asked for. Without a session, to find mistakes before the model is loaded."""
    from adafv.engines.transformers import Pruner
    from adafv.engines.transformers.settings import POSITIONS
    from adafv.methods import found_methods, known_methods, method_named
    from adafv.prompts.text import SCOPES

    methods = known_methods()
    if wish.method not in methods and found_methods().broken:
        method_named(wish.method)  # says what is broken
    method = methods[one_of("--method", wish.method, tuple(methods))]
    taken = {field.name for field in fields(method)}  # type: ignore[arg-type]
    for name in wish.parameters:
        if name not in taken:
            raise UsageError(f"--{name} does not apply to --method {wish.method}; leave it out")
    one_of("--positions", wish.positions, POSITIONS)
    text = wish.text
    if text is not None:
        one_of("--text", text, SCOPES)
    options: dict[str, Any] = {"positions": wish.positions, **wish.parameters}
    if session is not None:
        return session.pruner(wish.method, wish.keep, text, **options)
    return Pruner(wish.method, wish.keep, text="turn" if text == "question" else text, **options)


def _answer(wish: _Wish) -> None:
    from adafv.images import is_address

    # What can be found wrong without torch is, as torch takes seconds to import. A download waits for the rest of it.
    image = None if is_address(wish.image) else _read(wish.image)
    with _progress(f"looking for {wish.model}"):
        hub_options(folder_or_id(wish.model))
    with _progress("starting torch and transformers"):
        _checked_pruner(wish)
        from adafv.asking.session import Session, check_device
        from adafv.engines.transformers import Pruner

        device = check_device(wish.device)
    if image is None:
        image = _read(wish.image)
    start = time.perf_counter()
    with _progress(f"loading {wish.model}"):
        session = Session.load(wish.model, wish.dtype, device)
        pruner = _checked_pruner(wish, session)
    loaded = time.perf_counter() - start
    inputs = session.inputs(image, wish.question)
    tokenizer = session.processor.tokenizer
    unknown = unknown_words(tokenizer, wish.question)
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
        say(about(wish.model, tokenizer))
    timings: list[Timing] = []
    if wish.compare:
        modes: dict[str, Pruner | None] = {"unpruned": None, wish.method: pruner}
        if wish.method != "saliency":
            modes["saliency"] = Pruner("saliency", wish.keep, positions=wish.positions)
        with _progress("comparing"):
            timings = session.compare(inputs, modes, wish.max_new_tokens, wish.repeats, {wish.method: pruned})

    if wish.as_json:
        seconds = {"load": loaded, **record.seconds}
        result: dict[str, Any] = {
            "answer": pruned.answer,
            "tokens_before": sum(record.tokens_before),
            "tokens_after": sum(record.tokens_after),
            "kept": [kept.tolist() for kept in record.kept],
            "objective": record.objective[0],
            "certificate": record.certificate[0],
            "method": wish.method,
            "parameters": wish.parameters,
            "keep": wish.keep,
            "model": wish.model,
            "question": wish.question,
            "unknown_words": unknown,
            "positions": wish.positions,
            "dtype": session.dtype,
            "device": str(session.device),
            "seconds": seconds,
            "kv_mib": pruned.kv_mib,
        }
        if wish.compare:
            result["compare"] = [timing.as_dict() for timing in timings]
        put(json.dumps(_without_nan(result), allow_nan=False))
    elif wish.compare:
        _print_table(timings)
    else:
        say(_summary(record, pruned.kv_mib))
    if wish.picture is not None:
        _draw(wish, session, inputs, record, pruned.answer)


def _read(source: str) -> "Image":
    from adafv.images import load_image

    with _progress("reading the image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks; what matters is an error in ours
        return load_image(source)


def _summary(record: "Record", kv_mib: float) -> str:
    before, after = sum(record.tokens_before), sum(record.tokens_after)
    seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in record.seconds.items() if value >= 0.005)
    text = f"kept {after} of {before} visual tokens ({100 * after / before:.3g} %), prompt's KV cache {kv_mib:.1f} MiB"
    return f"{text}; {seconds}" if seconds else text


def _draw(wish: _Wish, session: "Session", inputs: Any, record: "Record", answer: str) -> None:
    """Draw what was kept. The answer is out already, so whatever fails here says that the picture alone is missing."""
    from adafv.picture import draw

    assert wish.picture is not None
    try:
        drawn: Image = draw(record, 0, session.tower_view(inputs), question=wish.question, answer=answer)
        _write(drawn, wish.picture)
    except (OSError, ValueError, MemoryError) as error:
        reason = _why(error) if isinstance(error, OSError) else shortened(str(error) or type(error).__name__)
        say(
            f"error: the answer is complete, but --picture {wish.picture} was not written ({reason}); choose another place"
        )
        raise typer.Exit(FAILED) from error
    say(f"drew {wish.picture}")


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
