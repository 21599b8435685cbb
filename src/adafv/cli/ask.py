"""`adafv ask`: one question about one image, and what pruning did."""

import difflib
import json
import math
import os
import re
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adafv.asking.failures import UsageError, check_text
from adafv.asking.models import about, checked_model, unknown_words, unknown_words_warning
from adafv.cli.failures import failures_as_messages
from adafv.cli.options import METHOD, MethodOption, ModelOption, ObjectiveOption, TextOption

if TYPE_CHECKING:
    from PIL.Image import Image

    from adafv.asking.session import Session, Timing
    from adafv.engines.transformers import Pruner, Record

PICTURE_KINDS = (".png", ".jpg", ".jpeg", ".webp")
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
            picture=None if picture is None else _checked_picture(picture),
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
        raise UsageError(f"--keep {text!r} is not a budget; give tokens (64), a share (0.1 or 10%), or all") from None
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


def _checked_picture(path: Path) -> Path:
    if path.suffix.lower() not in PICTURE_KINDS:
        raise UsageError(f"--picture {path}: the name must end in one of {', '.join(PICTURE_KINDS)}")
    if path.is_dir():
        raise UsageError(f"--picture {path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--picture {path}: there is no folder {path.parent}; create it first")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UsageError(f"--picture {path} may not be written; choose another place")
    return path


def one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"{option} {value!r} does not exist; known are: {', '.join(known)}{hint}")
    return value


def _checked_pruner(wish: _Wish, session: "Session | None" = None) -> "Pruner":
    """The pruner that was asked for. Without a session, to find mistakes before the model is loaded."""
    from adafv.engines.transformers import Pruner
    from adafv.engines.transformers.settings import POSITIONS
    from adafv.methods import known_methods
    from adafv.prompts.text import SCOPES

    methods = known_methods()
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
    with _progress("starting torch and transformers"):
        _checked_pruner(wish)
        from adafv.asking.session import Session, check_device
        from adafv.engines.transformers import Pruner
        from adafv.images import load_image

        device = check_device(wish.device)
    with _progress("reading the image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks; what matters is an error in ours
        image = load_image(wish.image)
    start = time.perf_counter()
    with _progress(f"loading {wish.model}"):
        session = Session.load(wish.model, wish.dtype, device)
        pruner = _checked_pruner(wish, session)
    loaded = time.perf_counter() - start
    inputs = session.inputs(image, wish.question)
    tokenizer = session.processor.tokenizer
    unknown = unknown_words(tokenizer, wish.question)
    if unknown:
        typer.echo(f"warning: {unknown_words_warning(tokenizer, unknown)}", err=True)
    with _progress("answering"):
        pruned = session.ask(inputs, pruner, wish.max_new_tokens)
    record = pruned.record
    assert record is not None

    timings: list[Timing] = []
    if wish.compare:
        modes: dict[str, Pruner | None] = {"unpruned": None, wish.method: pruner}
        if wish.method != "saliency":
            modes["saliency"] = Pruner("saliency", wish.keep, positions=wish.positions)
        with _progress("comparing"):
            timings = session.compare(inputs, modes, wish.max_new_tokens, wish.repeats, {wish.method: pruned})
    if wish.picture is not None:
        _draw(wish, session, inputs, record, pruned.answer)

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
        typer.echo(json.dumps(_without_nan(result), allow_nan=False))
        return
    typer.echo(pruned.answer)
    typer.echo(about(wish.model, tokenizer), err=True)
    if not wish.compare:
        typer.echo(_summary(record, pruned.kv_mib), err=True)
        return
    _print_table(timings)


def _summary(record: "Record", kv_mib: float) -> str:
    before, after = sum(record.tokens_before), sum(record.tokens_after)
    seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in record.seconds.items() if value >= 0.005)
    text = f"kept {after} of {before} visual tokens ({100 * after / before:.3g} %), prompt's KV cache {kv_mib:.1f} MiB"
    return f"{text}; {seconds}" if seconds else text


def _draw(wish: _Wish, session: "Session", inputs: Any, record: "Record", answer: str) -> None:
    from adafv.picture import draw

    assert wish.picture is not None
    drawn: Image = draw(record, 0, session.tower_view(inputs), question=wish.question, answer=answer)
    try:
        drawn.save(wish.picture, quality=92)
    except OSError as error:
        raise UsageError(f"--picture {wish.picture} cannot be written ({error}); choose another place") from error
    typer.echo(f"drew {wish.picture}", err=True)


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
            timing.name, Text(timing.answer), str(timing.tokens), f"{timing.median:.3f}", f"{timing.kv_mib:.2f}"
        )
    Console(file=sys.stdout).print(table)


def _progress(what: str) -> AbstractContextManager[Any]:
    """A spinner on standard error, where that is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(f"{what} ...")


def _without_nan(value: Any) -> Any:
    """`value` with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
