"""`adafv check`: is pruning safe for these questions, and how much of it?"""

import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adafv import defaults
from adafv.asking.failures import UsageError, check_text
from adafv.asking.models import checked_model, folder_or_id, hub_options
from adafv.cli.failures import OutputError, failures_as_messages, put, say, warnings_as_messages
from adafv.cli.options import (
    DTYPES,
    METHOD,
    RUN,
    BatchOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    TextOption,
    one_of,
)
from adafv.cli.output import model_label, writable_folder, write_whole
from adafv.core.budget import Budget
from adafv.printable import printable, shortened

if TYPE_CHECKING:
    from adafv.evaluation.answers import Asker, Configuration, Progress
    from adafv.evaluation.questions import Question, Questions
    from adafv.evaluation.store import Store

_OUTPUT = "What to find out, and where to write it"
FOLDER = Path("adafv-check")
STORE, RESULT, PAGE = "answers.jsonl", "result.json", "report.html"
KEPT = "the answers are kept: make room, and run the command again"
_EVERY = 10.0
"""Seconds between two lines of progress, where standard error is no terminal."""


def check(
    questions: Annotated[
        str,
        typer.Argument(
            help="A .jsonl or .csv file with image, question and perhaps answer; a folder with images/ and a .jsonl file; or "
            "a Hugging Face data set saved on disk."
        ),
    ],
    model: ModelOption = "",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BUDGET,...",
            help="Budgets to try, each a number of visual tokens (64) or a share (0.1 or 10%). Default: 50%,25%,10%,5%.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "--method",
            metavar="METHOD,...",
            help=f"Methods to try, as in adafv:objective=split; see `adafv methods`. Default: {defaults.METHOD}.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    text: TextOption = None,
    positions: Annotated[
        str, typer.Option(help="Of the kept tokens: compact or original.", rich_help_panel=METHOD)
    ] = "compact",
    max_loss: Annotated[
        float, typer.Option(help="Points (of 100) that must not be lost.", rich_help_panel=_OUTPUT)
    ] = 1.0,
    by: Annotated[
        str,
        typer.Option(
            help="What is counted: accuracy, agreement with the unpruned model, or auto: accuracy where answers are given.",
            rich_help_panel=_OUTPUT,
        ),
    ] = "auto",
    matching: Annotated[
        str,
        typer.Option(
            "--matching", "--rule", help="When an answer is right: auto, exact, first or vqa.", rich_help_panel=_OUTPUT
        ),
    ] = "auto",
    suffix: Annotated[
        str, typer.Option(help='Put behind every question, as " Answer with one word."', rich_help_panel=RUN)
    ] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask about so many questions, drawn by chance.", rich_help_panel=RUN)
    ] = None,
    bad_records: Annotated[
        str, typer.Option(help="refuse, or skip: leave them out, and say so.", rich_help_panel=RUN)
    ] = "refuse",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=RUN)] = 32,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    batch: BatchOption = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn by chance.", rich_help_panel=RUN)] = 0,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "--to",
            "--store",
            metavar="DIR",
            help=f"Folder for {STORE}, {RESULT} and {PAGE}. A run that was stopped goes on from there.",
            rich_help_panel=_OUTPUT,
        ),
    ] = FOLDER,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON result instead of the table.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Find out how far visual tokens can be pruned for your questions.

    Asks a model your questions unpruned and at several budgets, and says which is the smallest budget that loses less than
    --max-loss, with 95 % confidence; or about how many more questions would tell. With answers it counts accuracy, without
    them agreement with the unpruned model.

        adafv check questions.jsonl --model llava-hf/llava-1.5-7b-hf --keep 50%,25%,10%
    """
    wish = _Wish(**locals())
    with failures_as_messages():
        _check(wish)


@dataclass(frozen=True)
class _Wish:
    """The command line, as it was given."""

    questions: str
    model: str
    keep: list[str] | None
    method: list[str] | None
    text: str | None
    positions: str
    max_loss: float
    by: str
    matching: str
    suffix: str
    limit: int | None
    bad_records: str
    max_new_tokens: int
    dtype: str
    device: str | None
    batch: int
    seed: int
    output: Path
    as_json: bool

    @property
    def budgets(self) -> list[Budget]:
        """From the largest to the smallest as far as they compare; each once."""
        written = [part.strip() for each in self.keep or ["50%,25%,10%,5%"] for part in each.split(",")]
        budgets = list(dict.fromkeys(Budget.of(part, "--keep") for part in written))
        for budget in budgets:
            if budget.keeps_all:
                raise UsageError("--keep all prunes nothing; the unpruned model is asked anyway, so leave it out")
        return budgets

    @property
    def methods(self) -> list[str]:
        return [part.strip() for each in self.method or [defaults.METHOD] for part in each.split(",")]


def _check(wish: _Wish) -> None:
    from adafv.evaluation.questions import BAD_RECORDS, read_questions

    model, budgets = checked_model(wish.model), wish.budgets
    one_of("--dtype", wish.dtype, DTYPES)
    one_of("--bad-records", wish.bad_records, BAD_RECORDS)
    check_text(wish.suffix, "--suffix")
    if not 0 < wish.max_loss < 100:
        raise UsageError(f"--max-loss {wish.max_loss:g}: give points between 0 and 100, such as 1")
    # What can be found wrong without torch is, as torch takes seconds to import.
    questions = read_questions(wish.questions).checked(wish.bad_records)
    hub_options(folder_or_id(model))
    from adafv.evaluation.check import BY, decided
    from adafv.evaluation.matching import RULES

    one_of("--by", wish.by, BY)
    one_of("--matching", wish.matching, RULES)
    questions, by = decided(questions, wish.by, wish.bad_records)
    if wish.limit is not None:
        questions = _some(questions, wish.limit, wish.seed)
    ways = _ways(wish, budgets)
    folder = writable_folder("--output", wish.output)
    from adafv.asking.session import Session, check_device
    from adafv.evaluation.answers import Asker
    from adafv.evaluation.check import Counted, as_text, result
    from adafv.evaluation.check import Wish as Wanted
    from adafv.evaluation.page import drawn_cases, page
    from adafv.evaluation.store import Store
    from adafv.evaluation.words import cautions, terminal_table, verdicts

    device = check_device(wish.device)
    say(f"loading {shortened(model)}")
    session = Session.load(model, wish.dtype, device)
    with warnings_as_messages():
        asker = Asker(
            session,
            max_new_tokens=wish.max_new_tokens,
            suffix=wish.suffix,
            scope=wish.text,
            positions=wish.positions,
        )
        asker.check_ways(ways)
    questions = asker.check(questions, wish.bad_records).checked(wish.bad_records)
    with Store(folder / STORE, asker.fingerprint()) as store:
        questions, keys = _asked(wish, asker, questions, ways, store)
        wanted = Wanted(wish.max_loss / 100, by, wish.matching, wish.seed)
        counted = Counted(questions.questions, keys, store, ways, wanted)
        found = result(counted, _about(wish, model, asker, budgets, ways), questions.bad)
    write_whole(folder / RESULT, as_text(found), KEPT)
    write_whole(folder / PAGE, page(found, list(drawn_cases(asker, counted, found))), KEPT)
    for each in cautions(found):
        say(f"warning: {each}")
    if wish.as_json:
        put(as_text(found).rstrip("\n"))
    else:
        _print(terminal_table(found), [printable(each) for each in verdicts(found)])
    say(f"wrote {shortened(folder / PAGE)} and {shortened(folder / RESULT)}")


def _ways(wish: _Wish, budgets: list[Budget]) -> "list[Configuration]":
    from adafv.engines.transformers import Pruner
    from adafv.engines.transformers.settings import POSITIONS
    from adafv.evaluation.answers import configurations
    from adafv.prompts.text import SCOPES

    one_of("--positions", wish.positions, POSITIONS)
    if wish.text is not None:
        one_of("--text", wish.text, SCOPES)
    ways = configurations(wish.methods, budgets)
    for way in ways:
        if way.method is not None:
            Pruner(way.method, way.budget, positions=wish.positions)  # finds what does not go together
    return ways


def _some(questions: "Questions", limit: int, seed: int) -> "Questions":
    """So many questions, drawn by chance; in the order of the file."""
    from adafv.evaluation.questions import Questions

    listed = questions.questions
    if limit >= len(listed):
        return questions
    chosen = sorted(Random(f"questions {seed}").sample(range(len(listed)), limit))
    return Questions([listed[number] for number in chosen], questions.bad)


def _asked(
    wish: _Wish, asker: "Asker", questions: "Questions", ways: "list[Configuration]", store: "Store"
) -> "tuple[Questions, dict[str, str]]":
    """Ask what the store lacks, with progress on standard error."""

    from adafv.evaluation.answers import refuse_idle_budgets

    def first(asked: "Sequence[tuple[Question, str]]") -> None:
        refuse_idle_budgets(asked, ways, store, "--keep")

    shown = _Shown()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks; what matters is an error in ours
            return asker.run(
                questions, ways, store, batch=wish.batch, policy=wish.bad_records, progress=shown, first=first
            )
    finally:
        shown.close()


@dataclass
class _Shown:
    """Progress on standard error: one line that changes on a terminal, a line now and then elsewhere."""

    start: float = field(default_factory=time.monotonic)
    latest: float = field(default_factory=time.monotonic)
    live: bool = field(default_factory=lambda: sys.stderr.isatty())
    written: int = 0

    def __call__(self, progress: "Progress") -> None:
        from adafv.evaluation.words import duration

        now = time.monotonic()
        if progress.asked == 0:
            before = f", {progress.done:,} of them from the last run" if progress.done else ""
            say(f"{progress.total:,} answers to give{before}")
            self.start = self.latest = now
            return
        if not self.live and now - self.latest < _EVERY and progress.done < progress.total:
            return
        self.latest = now
        left = (now - self.start) / progress.asked * (progress.total - progress.done)
        line = f"{progress.done:,} of {progress.total:,} answers, {duration(left)} left"
        if self.live:
            sys.stderr.write("\r" + line.ljust(self.written))
            sys.stderr.flush()
            self.written = len(line)
        else:
            say(line)

    def close(self) -> None:
        if self.live and self.written:
            sys.stderr.write("\n")


def _about(
    wish: _Wish, model: str, asker: "Asker", budgets: list[Budget], ways: "list[Configuration]"
) -> dict[str, Any]:
    """What the result says of the run: nothing of this machine."""
    name = model_label(model)
    return {
        "model": name,
        "fingerprint": asker.fingerprint(),
        "source": Path(os.path.abspath(wish.questions)).name,
        "settings": {
            "methods": list(dict.fromkeys(way.name for way in ways if way.pruned)),
            "keep": [str(budget) for budget in budgets],
            "suffix": wish.suffix,
            "text": wish.text,
            "positions": wish.positions,
            "limit": wish.limit,
        },
    }


def _print(table: Any, sentences: list[str]) -> None:
    from rich.console import Console

    try:
        Console(file=sys.stdout).print(table)
    except OSError as error:
        raise OutputError from error
    for sentence in sentences:
        put(sentence)
