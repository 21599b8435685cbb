"""Every method at every budget on questions with known answers: what `adafv bench accuracy` runs.

Why it looks like this. Comparing dozens of methods takes hours on a small machine. So every answer is written down as it is
given (`adafv.evaluation.store`): a run that was stopped goes on where it was, methods can be added later, and several
processes, or machines, share the work by whole batches, so that their answers are those of one process.

With dozens of methods the best one is partly lucky. Half of the pictures choose, the others confirm.
"""

import contextlib
import logging
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adafv.errors import AdaFVError, ImageError
from adafv.evaluation.answers import Asker, Configuration, Progress, configurations
from adafv.evaluation.drawn import drawn_questions, faint_ones
from adafv.evaluation.first_token import FirstTokenAsker
from adafv.evaluation.questions import BAD_RECORDS, Question, Questions, QuestionsError, read_questions
from adafv.evaluation.store import Store, StoreError, key_of
from adafv.methods import known_methods
from adafv.printable import shortened

if TYPE_CHECKING:
    from adafv.asking.session import Session

PARTS = ALL, CHOOSE, CONFIRM = ("all", "choose", "confirm")
RANDOM = "random"
FAINT = "faint objects"
WORLD = "drawn scenes"
GENERATE, FIRST_TOKEN = WAYS_TO_ANSWER = ("generate", "first-token")
REFUSE = BAD_RECORDS[0]
_LOOK = 2.0
"""Seconds between two looks at what other processes wrote."""


@dataclass(frozen=True)
class Data:
    """Questions that are reported together."""

    name: str
    questions: list[Question]
    bad: int = 0
    """Records that were left out."""
    marks: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Names of questions that make a column of their own, beside their kinds."""
    rule: str | None = None
    """How answers are judged where the caller does not say; None: "auto"."""


def world_data(
    count: int, side: int, part: str = ALL, *, photos: bool = True, detailed: bool = False, skip: int = 0
) -> Data:
    """`count` questions about test scenes behind the first `skip` (see `drawn_questions`), and of these the part."""
    options = {"photos": photos, "detailed": detailed}
    asked = [each for each in drawn_questions(count, side, skip=skip, **options) if belongs(each.cluster, part)]
    faint = faint_ones(skip + count, **options)
    return Data(f"{WORLD} with details" if detailed else WORLD, asked, 0, {FAINT: faint}, "first")


def file_data(sources: Sequence[Path], part: str = ALL, most: int = 0, policy: str = REFUSE) -> Data:
    """Questions of files or folders (see `read_questions`), together.

    Args:
        most: questions, about: a share of every picture's, as pictures are what intervals count, answers by turns. 0: all.

    Raises:
        QuestionsError: some cannot be read, or nobody said what is right.
    """
    found: list[Question] = []
    bad = 0
    names = [source.name for source in sources]
    for source in dict.fromkeys(sources):
        read = read_questions(source).checked(policy)
        bad += len(read.bad)
        # Two files may have the same name in two folders, and a question is known by its name.
        called = str(source) if names.count(source.name) > 1 else source.name
        for each in read.questions:
            if each.answers is None:
                raise QuestionsError(
                    f"{each.where or each.name} has no answer, so right and wrong cannot be told; give answer, or use `adafv "
                    "check`, which compares with the unpruned model"
                )
            if belongs(each.cluster, part):
                found.append(_renamed(each, f"{called}: {each.name}") if len(sources) > 1 else each)
    if most and found:
        by_picture: dict[str, list[Question]] = defaultdict(list)
        for each in found:
            by_picture[each.cluster].append(each)
        share = max(1, most // len(by_picture))
        found = [each for own in by_picture.values() for each in mixed(own)[:share]]
    name = ", ".join(dict.fromkeys(_called(source) for source in sources))
    return Data(name, found, bad)


def _called(source: Path) -> str:
    """A folder's own name says more than that of the file in it."""
    generic = source.stem in ("presence", "questions")
    return (source.resolve().parent.name if generic else source.stem) or source.stem


def _renamed(question: Question, name: str) -> Question:
    from dataclasses import replace

    return replace(question, name=name)


def mixed(questions: Sequence[Question]) -> list[Question]:
    """By turns of what is right, so that a share has as many of each as can be."""
    sides: dict[Any, list[Question]] = defaultdict(list)
    for each in questions:
        sides[each.answers].append(each)
    listed = [*sides.values()]
    return [own[turn] for turn in range(max(map(len, listed))) for own in listed if turn < len(own)]


def belongs(picture: str, part: str) -> bool:
    """Half of the pictures choose, the others confirm; by a hash, as their numbers may say something about them."""
    return part == ALL or (zlib.crc32(picture.encode()) % 2 == 0) == (part == CHOOSE)


def ways_of(methods: Sequence[str], budgets: Sequence[Any]) -> list[Configuration]:
    """Unpruned and blanked, then random and the methods at every budget.

    Args:
        methods: as for `configurations`; "all" stands for every method that is known and has defaults.
    """
    words: list[str] = []
    for word in [RANDOM, *methods]:
        words += [name for name in known_methods() if name != RANDOM] if word == "all" else [word]
    return configurations(list(dict.fromkeys(words)), budgets)


def make_asker(session: "Session", settings: Mapping[str, Any]) -> Asker:
    """Who answers.

    Args:
        settings: "answers" (of `WAYS_TO_ANSWER`), "choices" (or None), and of `Asker`: "suffix", "scope", "positions",
            "max_new_tokens".
    """
    options = {name: settings[name] for name in ("suffix", "scope", "positions") if settings.get(name) is not None}
    if settings.get("choices") or settings["answers"] == FIRST_TOKEN:
        return FirstTokenAsker(session, choices=settings.get("choices"), **options)
    return Asker(session, max_new_tokens=settings["max_new_tokens"], **options)


def refused(asker: Asker, ways: Sequence[Configuration], question: Question, store: Store) -> dict[Configuration, str]:
    """The ways that this model does not take, and why; found out by one question, where it was not asked before."""
    found: dict[Configuration, str] = {}
    try:
        key = key_of(question, question.picture.digest())
        question.picture.load()
    except ImageError:  # a matter of the picture, which the run will name
        return found
    for way in ways:
        if way.pruned and store.get(key, way.stored) is None:
            try:
                asker.record(question, way)
            except AdaFVError as error:
                found[way] = str(error)
    return found


def share_of(questions: Sequence[Question], number: int, shares: int, batch: int) -> list[Question]:
    """Every so many batches of the questions; these, cut into batches again, are the batches of one process.

    Args:
        number: which share, from 0.
    """
    by_picture: dict[str, list[Question]] = defaultdict(list)
    for each in questions:
        by_picture[each.picture.digest()].append(each)
    ordered = [each for own in by_picture.values() for each in own]
    starts = range(0, len(ordered), batch)[number::shares]
    return [each for start in starts for each in ordered[start : start + batch]]


def absorb(store: Store, parts: Sequence[Path]) -> int:
    """Take over the answers of other stores, which must be of the same model; how many there were.

    Raises:
        StoreError: one is no store, or holds the answers of another model.
    """
    taken = 0
    for path in parts:
        if not path.is_file():
            raise StoreError(f"there is no file {shortened(path)}; check the path")
        with Store(path, store.fingerprint) as part:
            for key, way, given in part.answers():
                if store.get(key, way) is None:
                    store.add(way, [(key, given, part.kept(key, way))])
                    taken += 1
    return taken


@dataclass(frozen=True)
class Job:
    """What one of several processes does."""

    model: str
    dtype: str
    device: str | None
    settings: dict[str, Any]
    questions: list[Question]
    ways: list[tuple[list[str], list[str]]]
    """(methods, budgets), as for `ways_of`; methods that the model refuses are left out already."""
    store: Path
    batch: int
    policy: str


def run_job(job: Job) -> None:
    """In a process of its own."""
    from adafv.asking.session import Session, check_device

    torch.set_num_threads(1)
    session = Session.load(job.model, job.dtype, check_device(job.device))
    asker = make_asker(session, job.settings)
    ways: list[Configuration] = []
    for methods, budgets in job.ways:
        ways += [way for way in configurations(methods, budgets) if way not in ways]
    with Store(job.store, asker.fingerprint()) as store:
        asker.run(Questions(job.questions, []), ways, store, batch=job.batch, policy=job.policy)


def _process(job: Job, failed: Connection) -> None:
    """`run_job`, with what goes wrong sent to the process that waits."""
    for name in ("torchao", "torch.utils._pytree"):  # as the command line has it
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        run_job(job)
    except KeyboardInterrupt:
        sys.exit(1)
    except Exception as error:
        try:
            failed.send(error)
        except Exception:  # it cannot be pickled
            failed.send(RuntimeError(f"{type(error).__name__}: {error}"))
        sys.exit(1)


def run_in_processes(
    asker: Asker,
    questions: Questions,
    ways: Sequence[Configuration],
    store: Store,
    jobs: int,
    job: Callable[[list[Question], Path, list[tuple[list[str], list[str]]]], Job],
    *,
    batch: int,
    progress: Callable[[Progress], None],
) -> None:
    """Have what the store lacks asked by several processes; their answers end in the store.

    Raises:
        QuestionsError, StoreError: as `Asker.run`.
    """
    parts = sorted(store.path.parent.glob(f"{store.path.name}.part*"))
    absorb(store, parts)  # of a run that was killed
    for part in parts:
        part.unlink()
    named: dict[str, list[str]] = defaultdict(list)
    for way in ways:
        if way.pruned and way.name not in named[way.budget.key]:
            named[way.budget.key].append(way.name)
    listed = [(methods, [budget]) for budget, methods in named.items()] or [([], [])]
    started = len(store)
    total = len(questions.questions) * len(ways)
    files = [store.path.with_name(f"{store.path.name}.part{number}") for number in range(jobs)]
    made = [job(share_of(questions.questions, number, jobs, batch), file, listed) for number, file in enumerate(files)]
    # What there is already need not be asked again: the parts begin with it.
    for each in made:
        with Store(each.store, store.fingerprint) as beginning:
            for key, answered, given in store.answers():
                beginning.add(answered, [(key, given, store.kept(key, answered))])
    context = get_context("spawn")
    running = []
    try:
        for each in made:
            if each.questions:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_process, args=(each, sender))
                process.start()
                sender.close()
                running.append((process, receiver))
        while any(process.is_alive() for process, _ in running):
            wait([process.sentinel for process, _ in running if process.is_alive()], timeout=_LOOK)
            done = sum(_lines(file) for file in files) - started * (jobs - 1)
            progress(Progress(min(total, max(0, done)), total, max(0, done - started)))
            _raise_of(running)
        _raise_of(running)
    finally:  # what was answered stays in the parts, and is taken over by the next run
        for process, _ in running:
            process.terminate()
            process.join()
    absorb(store, files)
    for file in files:
        file.unlink()


def _raise_of(running: Sequence[tuple[Any, Connection]]) -> None:
    """Raise what ended one of the processes."""
    for process, receiver in running:
        if process.exitcode:
            with contextlib.suppress(EOFError):
                raise receiver.recv()
            raise RuntimeError(f"a process that answered questions was ended from outside (code {process.exitcode})")


def _lines(path: Path) -> int:
    """Answers in a store that another process writes."""
    try:
        with open(path, "rb") as file:
            return max(0, sum(1 for _ in file) - 1)
    except OSError:
        return 0
