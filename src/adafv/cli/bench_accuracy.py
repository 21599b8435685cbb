"""`adafv bench accuracy`: every method at every budget, on questions whose answers are known; figure 1 of the paper."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adafv.asking.failures import UsageError, check_text
from adafv.asking.models import about, checked_model, folder_or_id, hub_options
from adafv.cli.failures import failures_as_messages, put, say, warnings_as_messages
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
    parts_of,
)
from adafv.cli.output import counted, model_label, writable_folder, write_whole
from adafv.core.budget import Budget
from adafv.printable import shortened

if TYPE_CHECKING:
    from adafv.asking.session import Session
    from adafv.evaluation.accuracy import Data
    from adafv.evaluation.answers import Asker, Configuration
    from adafv.evaluation.store import Store

_DATA = "What to ask"
_OUTPUT = "What to write and show"
STORE = "answers.jsonl"


def accuracy(
    questions: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Questions with answers: .jsonl or .csv, or folders with images/ and presence.jsonl; see docs/accuracy.md.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = "",
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            "--method",
            metavar="METHOD,...",
            help="Beside random: uniform,adafv:objective=split,adafv:text=turn, or all.",
            rich_help_panel=METHOD,
        ),
    ] = "facet,adafv,saliency,text,uniform,downsample",
    keep: Annotated[
        str, typer.Option(help="Budgets: 0.5,0.1 or 50%,10% or 64,32.", rich_help_panel=METHOD)
    ] = "0.5,0.25,0.1,0.05",
    text: TextOption = None,
    positions: Annotated[
        str | None, typer.Option(help="Of the kept tokens: compact or original.", rich_help_panel=METHOD)
    ] = None,
    world: Annotated[
        bool,
        typer.Option("--world", help="Drawn scenes as well; alone, where no file is given.", rich_help_panel=_DATA),
    ] = False,
    count: Annotated[
        int | None,
        typer.Option(
            "--questions",
            min=1,
            help="How many; of files, a share of every picture's. Default: 2000 drawn ones, all of a file.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    skip: Annotated[
        int,
        typer.Option(
            min=0,
            help="Drawn questions to leave out first: those that something was chosen on.",
            rich_help_panel=_DATA,
        ),
    ] = 0,
    part: Annotated[
        str, typer.Option(help="Half of the pictures: choose or confirm; or all.", rich_help_panel=_DATA)
    ] = "all",
    no_photos: Annotated[
        bool, typer.Option("--no-photos", help="No pieces of photographs behind the scenes.", rich_help_panel=_DATA)
    ] = False,
    details: Annotated[
        bool,
        typer.Option(
            "--details",
            help="Drawn scenes whose things bear letters and fine patterns, for models that see crops.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    bad_records: Annotated[
        str, typer.Option(help="Records that cannot be used: refuse or skip.", rich_help_panel=_DATA)
    ] = "refuse",
    choices: Annotated[
        str | None,
        typer.Option(
            metavar="WORD,...",
            help="Read the answer off the logits of these at its first token: Yes,No.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            help="generate, or first-token: the likeliest token of all. Default: first-token where it says every answer.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest generated answer, in tokens.", rich_help_panel=_DATA)
    ] = 16,
    suffix: Annotated[
        str, typer.Option(help="Put behind every question, such as ' Answer with yes or no.'", rich_help_panel=_DATA)
    ] = "",
    matching: Annotated[
        str | None,
        typer.Option(
            "--matching",
            "--rule",
            help="When an answer is right: auto, exact, first or vqa. Default: first for drawn scenes, else auto.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--to",
            help="Folder for the figures, accuracy.md, .csv and .json, and the answers; made if needed.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help=f"File of the answers, to go on from. Default: {STORE} in the folder of --output, else none.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="Take over the answers of another --store; may be given again.", rich_help_panel=_OUTPUT),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD,...",
            help="What the others are compared with, in pairs (default: random, and adafv where it is asked).",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    kinds: Annotated[
        bool, typer.Option("--kinds", help="By kind of question as well.", rich_help_panel=_OUTPUT)
    ] = False,
    sure: Annotated[
        bool,
        typer.Option(
            "--sure",
            help="The probability of what is right, instead of right or wrong; with --choices or first-token.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON instead of the tables.", rich_help_panel=_OUTPUT)
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    batch: BatchOption = 20,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes, each with the model and one thread.", rich_help_panel=RUN)
    ] = 1,
    share: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="The I-th of N shares of the questions, for machines that --merge later.",
            rich_help_panel=RUN,
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.", rich_help_panel=RUN)] = None,
) -> None:
    """Ask every question unpruned, with the picture blanked, and by every method at every budget; count who is right.

    Prints tables in Markdown; --output writes them, with a figure, as CSV and as JSON. Differences are paired and have 95 %
    intervals that count pictures. What was answered is kept in the folder: a run that was stopped goes on, and methods or
    budgets can be added later.

        adafv bench accuracy --world --output bench
        adafv bench accuracy photos --model llava-hf/llava-1.5-7b-hf --choices Yes,No --keep 192,128,64 --output bench
    """
    wish = _Wish(**locals())
    with failures_as_messages():
        _run(wish)


@dataclass(frozen=True)
class _Wish:
    """The command line, as it was given."""

    questions: list[Path] | None
    model: str
    methods: str
    keep: str
    text: str | None
    positions: str | None
    world: bool
    count: int | None
    skip: int
    part: str
    no_photos: bool
    details: bool
    bad_records: str
    choices: str | None
    answers: str | None
    max_new_tokens: int
    suffix: str
    matching: str | None
    output: Path | None
    store: Path | None
    merge: list[Path] | None
    against: str | None
    kinds: bool
    sure: bool
    as_json: bool
    dtype: str
    device: str | None
    batch: int
    jobs: int
    share: str | None
    threads: int | None

    @property
    def on_world(self) -> bool:
        return self.world or self.details or not self.questions


def _listed(option: str, text: str) -> list[str]:
    found = parts_of(text)
    if not found:
        raise UsageError(f"{option} {shortened(text)!r} names nothing; give names, with commas between them")
    return list(dict.fromkeys(found))


def _share(text: str | None) -> tuple[int, int]:
    """(which share, from 0; of how many)."""
    if text is None:
        return 0, 1
    number, _, shares = text.partition("/")
    if (
        number.isascii()
        and number.isdigit()
        and shares.isascii()
        and shares.isdigit()
        and 1 <= int(number) <= int(shares)
    ):
        return int(number) - 1, int(shares)
    raise UsageError(f"--share {shortened(text)!r} is no share; give I/N, as in 1/2 for the first half")


def _run(wish: _Wish) -> None:
    budgets = [Budget.of(each, "--keep") for each in _listed("--keep", wish.keep)]
    words = _listed("--methods", wish.methods)
    choices = None if wish.choices is None else _listed("--choices", wish.choices)
    if choices is not None and len(choices) < 2:
        raise UsageError("--choices names one word; give two or more, as in Yes,No")
    one_of("--dtype", wish.dtype, DTYPES)
    check_text(wish.suffix, "--suffix")
    share = _share(wish.share)
    if share[1] > 1 and wish.jobs > 1:
        raise UsageError("--share and --jobs both divide the questions; give one of them")
    if share[1] > 1 and wish.output is None and wish.store is None:
        raise UsageError("--share needs --store, the file whose answers are merged later")
    folder = None if wish.output is None else writable_folder("--output", wish.output)
    model = checked_model(wish.model)
    hub_options(folder_or_id(model))

    from adafv.evaluation.accuracy import PARTS, WAYS_TO_ANSWER, file_data, ways_of
    from adafv.evaluation.matching import RULES
    from adafv.evaluation.questions import BAD_RECORDS
    from adafv.prompts.text import SCOPES

    one_of("--part", wish.part, PARTS)
    one_of("--bad-records", wish.bad_records, BAD_RECORDS)
    for option, value, known in (
        ("--answers", wish.answers, WAYS_TO_ANSWER),
        ("--matching", wish.matching, RULES),
        ("--text", wish.text, SCOPES),
        ("--positions", wish.positions, ("compact", "original")),
    ):
        if value is not None:
            one_of(option, value, known)
    if wish.answers == WAYS_TO_ANSWER[0] and (choices or wish.sure):
        raise UsageError(
            "--answers generate has no logits to read; leave out --choices and --sure, or give first-token"
        )
    ways = ways_of(words, budgets)
    names = {way.name for way in ways}
    against = sorted(names & {"adafv", "random"}) if wish.against is None else _listed("--against", wish.against)
    for name in against:
        if name not in names:
            raise UsageError(f"--against {shortened(name)!r} is not among the methods; add it to --methods")
    if wish.on_world and not wish.no_photos:
        from adafv.evaluation.world.backgrounds import check_photographs

        check_photographs()
    if wish.skip and not wish.on_world:
        raise UsageError("--skip counts drawn questions, and only files are asked here; leave it out, or add --world")
    data = []
    if wish.questions:
        data.append(file_data(wish.questions, wish.part, wish.count or 0, wish.bad_records))
        if not data[0].questions:
            raise UsageError(f"no question is left in {data[0].name}; half of few pictures may be none: --part all")
    _ask(wish, model, data, ways, "all" in words, against, choices, folder, share)


def _ask(
    wish: _Wish,
    model: str,
    data: "list[Data]",
    ways: "list[Configuration]",
    every_method: bool,
    against: list[str],
    choices: list[str] | None,
    folder: Path | None,
    share: tuple[int, int],
) -> None:
    import torch

    from adafv.asking.session import Session, check_device
    from adafv.evaluation.accuracy import FIRST_TOKEN, GENERATE, world_data
    from adafv.evaluation.first_token import one_token_each

    if wish.threads is not None:
        torch.set_num_threads(wish.threads)
    session = Session.load(model, wish.dtype, check_device(wish.device))
    say(about(model, session.processor.tokenizer))
    if wish.on_world:
        from adafv.evaluation.drawn import side_for
        from adafv.evaluation.world.details import FINE

        side = side_for(session.model)
        if wish.details and side % FINE and side != FINE // 2:
            raise UsageError(
                f"--details are drawn {FINE // 2} pixels wide or a multiple of {FINE}, and {model} sees {side}; leave it "
                "out, or use bundled-details-next"
            )
        photos, count = not wish.no_photos, wish.count or 2000
        data.append(world_data(count, side, wish.part, photos=photos, detailed=wish.details, skip=wish.skip))
    given = [answer for each in data for question in each.questions for answer in question.answers or ()]
    how = wish.answers or (FIRST_TOKEN if choices or wish.sure or one_token_each(session, given) else GENERATE)
    settings: dict[str, Any] = {
        "answers": how,
        "choices": choices,
        "suffix": wish.suffix,
        "scope": wish.text,
        "positions": wish.positions,
        "max_new_tokens": wish.max_new_tokens,
    }
    with warnings_as_messages():
        _answered(wish, session, model, data, ways, every_method, against, settings, folder, share)


def _answered(
    wish: _Wish,
    session: "Session",
    model: str,
    data: "list[Data]",
    ways: "list[Configuration]",
    every_method: bool,
    against: list[str],
    settings: dict[str, Any],
    folder: Path | None,
    share: tuple[int, int],
) -> None:
    import tempfile
    from contextlib import ExitStack

    from adafv.evaluation.accuracy import absorb, make_asker, refused
    from adafv.evaluation.accuracy_report import RIGHT, SURE, AccuracyReport, Scores
    from adafv.evaluation.store import Store

    asker = make_asker(session, settings)
    with ExitStack() as stack:
        path = wish.store or (None if folder is None else folder / STORE)
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / STORE
        store = stack.enter_context(Store(path, asker.fingerprint()))
        absorb(store, wish.merge or [])
        # A method that some models do not take is left out where all were asked for, and ends the run where it was named.
        refusals = refused(asker, ways, data[0].questions[0], store)
        if refusals and not every_method:
            way, why = next(iter(refusals.items()))
            raise UsageError(f"{way}: {why}; leave it out of --methods")
        for way, why in refusals.items():
            say(f"note: {way} is left out: {why}")
        ways = [way for way in ways if way not in refusals]
        scores = []
        for each in data:
            each, keys = _filled(wish, asker, model, each, ways, store, settings, share)
            _tell_of_nothing_pruned(each.name, ways, store, keys)
            rule = wish.matching or each.rule or "auto"
            scores.append(Scores(each, ways, store, keys, what=SURE if wish.sure else RIGHT, rule=rule))
        told = {str(way): why for way, why in refusals.items()}
        shown = {**settings, "rule": wish.matching, "dtype": session.dtype, "device": str(session.device)}
        report = AccuracyReport(model_label(model), scores, against, wish.part, wish.kinds, told, shown)
        figures: dict[str, str] = {}
        written = json.dumps(report.as_dict(), indent=1, allow_nan=False)
        if folder is not None:
            for number, own in enumerate(scores, 1):
                drawn = report.figure(own)
                if drawn:
                    name = f"accuracy-{number}.svg" if len(scores) > 1 else "accuracy.svg"
                    write_whole(folder / name, drawn)
                    figures[own.data.name] = name
            write_whole(folder / "accuracy.md", report.markdown(figures))
            write_whole(folder / "accuracy.csv", report.csv())
            write_whole(folder / "accuracy.json", written + "\n")
            say(f"wrote {', '.join([*figures.values(), 'accuracy.md', 'accuracy.csv', 'accuracy.json'])} to {folder}")
        put(written if wish.as_json else report.markdown(figures).rstrip("\n"))


def _tell_of_nothing_pruned(name: str, ways: "list[Configuration]", store: "Store", keys: dict[str, str]) -> None:
    """A budget above what there is: all its methods are the unpruned model, and their differences 0."""
    told = set()
    for way in ways:
        given = [answer for key in keys.values() if (answer := store.get(key, way.stored)) is not None]
        if way.pruned and given and all(each.kept >= each.tokens for each in given) and way.budget not in told:
            told.add(way.budget)
            most = max(each.tokens for each in given)
            say(
                f"warning: --keep {way.budget} prunes nothing of {shortened(name)}: its pictures have at most {most} tokens"
            )


def _filled(
    wish: _Wish,
    asker: "Asker",
    model: str,
    data: "Data",
    ways: "list[Configuration]",
    store: "Store",
    settings: dict[str, Any],
    share: tuple[int, int],
) -> "tuple[Data, dict[str, str]]":
    """Ask what the store lacks. What was answered, grouped by pictures, and the keys in the store by name."""
    from dataclasses import replace

    from adafv.evaluation.accuracy import Job, run_in_processes, share_of
    from adafv.evaluation.answers import Progress
    from adafv.evaluation.questions import Question, Questions

    told = counted(data.name, "answers")

    def progress(state: Progress) -> None:
        told(state.done, state.total, state.asked)

    listed = Questions(data.questions, [])
    if wish.jobs > 1:

        def job(some: list[Question], part: Path, listed: list[tuple[list[str], list[str]]]) -> Job:
            return Job(model, wish.dtype, wish.device, settings, some, listed, part, wish.batch, wish.bad_records)

        run_in_processes(asker, listed, ways, store, wish.jobs, job, batch=wish.batch, progress=progress)
    elif share[1] > 1:
        listed = Questions(share_of(data.questions, *share, wish.batch), [])
    listed = asker.check(listed, wish.bad_records)
    answered, keys = asker.run(listed, ways, store, batch=wish.batch, policy=wish.bad_records, progress=progress)
    return replace(data, questions=answered.questions, bad=data.bad + len(answered.bad)), keys
