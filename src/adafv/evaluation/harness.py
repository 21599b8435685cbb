"""Tasks of lmms-eval for one model and several budgets: what `adafv eval` runs, and the table that it prints.

lmms-eval does what it does under its own command: it makes the prompts, scores the answers and counts. The model is loaded
once for all budgets, and every task is run for itself, so that what is finished can be kept when the rest is not.
"""

import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adafv.asking.failures import UsageError, out_of_memory
from adafv.errors import AdaFVError
from adafv.evaluation.published import JUDGED, TASKS, Table
from adafv.extras import install_command
from adafv.printable import shortened

SCHEMA = "adafv eval 1"
UNPRUNED = "unpruned"
_KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")
_PREFERRED = ("acc", "exact_match", "accuracy")


class TaskError(AdaFVError):
    """lmms-eval cannot run a task."""


@dataclass(frozen=True)
class Result:
    """One task, run once."""

    task: str
    keep: str
    """The budget as it was given, or "unpruned"."""
    documents: int
    metrics: dict[str, float]
    """As lmms-eval gives them."""
    errors: dict[str, float]
    """Standard errors, where lmms-eval has them."""
    seconds: float
    pictures: int
    tokens_before: int
    """Visual tokens of all pictures shown; 0 where nothing was pruned."""
    tokens_after: int

    @property
    def kept(self) -> float | None:
        """Visual tokens kept of a picture, on average; None where nothing was pruned."""
        return self.tokens_after / self.pictures if self.pictures else None


def require() -> None:
    """Find out whether lmms-eval is there.

    Raises:
        UsageError: it is not, and the message says how to get it; or this is one of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "adafv eval runs in one process; for several GPUs: accelerate launch -m lmms_eval --model adafv --model_args ..."
        )
    if importlib.util.find_spec("lmms_eval") is None:
        raise UsageError(
            f"adafv eval runs lmms-eval, which is not installed here; run: {install_command('lmms')} (or as "
            "docs/lmms-eval.md says, with fewer packages)"
        )


@dataclass(frozen=True)
class Harness:
    """lmms-eval with its tasks, and those of a folder."""

    manager: Any
    """Its `TaskManager`."""
    tasks: tuple[str, ...]

    @classmethod
    def of(cls, tasks: Sequence[str], include: Path | None) -> "Harness":
        """Look for the tasks; the folder first, as reading the many that come with lmms-eval takes seconds.

        Raises:
            UsageError: there is no such task, or it is a group of several, or a judge is needed that there is no key for.
        """
        _quiet()
        from lmms_eval.tasks import TaskManager

        judged = [task for task in tasks if task in JUDGED]
        if judged and os.environ.get("API_TYPE", "openai") in ("openai", "azure") and not any(map(os.getenv, _KEYS)):
            raise UsageError(
                f"{', '.join(judged)}: every answer is scored by a judge model; set OPENAI_API_KEY (and MODEL_VERSION, the "
                "judge), or leave the task out"
            )
        manager = None
        for defaults in (False, True) if include is not None else (True,):
            folder = None if include is None else str(include)
            manager = TaskManager("ERROR", include_path=folder, include_defaults=defaults, model_name="adafv")
            if all(task in manager.all_tasks for task in tasks):
                break
        assert manager is not None
        for task in tasks:
            if task not in manager.all_tasks:
                close = difflib.get_close_matches(task, manager.all_tasks, n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else "; `lmms-eval tasks list` shows all"
                raise UsageError(f"--tasks: lmms-eval has no task {shortened(task)!r}{hint}")
            if manager.task_index[task]["type"] not in ("task", "python_task"):
                members = manager.task_index[task]["task"]
                named = f": {', '.join(map(str, members))}" if isinstance(members, list) else ""
                raise UsageError(f"--tasks: {task} is a group of tasks; name them one by one{named}")
        return cls(manager, tuple(tasks))

    def weighs(self, task: str) -> bool:
        """Whether a task asks for likelihoods, which lmms-eval does of its simple models alone."""
        from lmms_eval.utils import load_yaml_config

        config = load_yaml_config(self.manager.task_index[task]["yaml_path"], mode="simple")
        return config.get("output_type") in ("multiple_choice", "loglikelihood")

    def fingerprint(self, task: str) -> str:
        """Of a task's YAML; of its data and functions nothing is in it."""
        return hashlib.sha256(Path(self.manager.task_index[task]["yaml_path"]).read_bytes()).hexdigest()

    def fetch(self) -> None:
        """Load the data of all tasks once, to find out in time whether they can be had.

        Raises:
            TaskError: one cannot.
        """
        from lmms_eval.tasks import get_task_dict

        for task in self.tasks:
            with _of(task):
                get_task_dict([task], self.manager, "simple" if self.weighs(task) else "chat")

    def run(self, model: Any, task: str, keep: str, limit: int | None, folder: Path) -> Result:
        """One task.

        Args:
            model: a `BatchedModel`.
            folder: for what tasks write, such as files to submit.

        Raises:
            TaskError: lmms-eval failed, mostly as the task's data cannot be had.
        """
        from lmms_eval.evaluator import simple_evaluate

        from adafv.evaluation.batched import Tally
        from adafv.evaluation.lmms import AdaFVChat, AdaFVSimple

        model.tally = Tally()
        made = (AdaFVSimple if self.weighs(task) else AdaFVChat).around(model)
        # What lmms-eval's own command would hand to tasks.
        options = Namespace(output_path=str(folder), process_with_media=False, reasoning_tags=None, log_samples=True)
        start = time.perf_counter()
        with _of(task):
            found = simple_evaluate(
                model=made,
                tasks=[task],
                limit=limit,
                task_manager=self.manager,
                batch_size=model.batch_size,
                log_samples=False,
                cli_args=options,
                verbosity="ERROR",
            )
        seconds = time.perf_counter() - start
        own = found["results"][task]
        tally = model.tally
        return Result(
            task=task,
            keep=keep,
            documents=int(found["n-samples"][task]["effective"]),
            metrics=_numbers(own, errors=False),
            errors=_numbers(own, errors=True),
            seconds=round(seconds, 2),
            pictures=tally.images,
            tokens_before=tally.before,
            tokens_after=tally.after,
        )


@contextlib.contextmanager
def _of(task: str) -> Iterator[None]:
    """What lmms-eval does for a task: what it prints goes to standard error, and what it raises is said in one line."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (AdaFVError, UsageError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # of tasks, data sets, the Hub
        cause = _cause(error)
        if isinstance(cause, (AdaFVError, UsageError)) or out_of_memory(cause):
            raise cause from error
        reason = f"{type(cause).__name__}: {shortened(' '.join(str(cause).split()), 300)}"
        raise TaskError(
            f"lmms-eval cannot run the task {task} ({reason}); its own tasks need the Hub and, mostly, `hf auth login`; "
            "tasks with data on disk are named with --include"
        ) from error


def _cause(error: Exception) -> Exception:
    """What stands behind a RetryError of tenacity, which lmms-eval tries everything several times with."""
    attempt = getattr(error, "last_attempt", None)
    inner = attempt.exception() if attempt is not None else None
    return _cause(inner) if isinstance(inner, Exception) else error


def _numbers(results: Mapping[str, Any], *, errors: bool) -> dict[str, float]:
    """The metrics of a task, or their standard errors, without the name of the filter."""
    found: dict[str, float] = {}
    for key, value in results.items():
        name = key.partition(",")[0]
        if "," not in key or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if name.endswith("_stderr") == errors and not name.endswith(("_clt", "_clustered")):
            found.setdefault(name.removesuffix("_stderr"), float(value))
    return found


def _quiet() -> None:
    """lmms-eval tells of every step."""
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="ERROR", format="lmms-eval: {message}")


def evaluate(
    harness: Harness,
    models: Iterable[tuple[str, Any]],
    *,
    settings: Mapping[str, Any],
    limit: int | None = None,
    folder: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Every task with every budget.

    Args:
        models: (budget, `BatchedModel`), the unpruned one first.
        settings: what else the results depend on; results in the folder that were made with others are not taken.
        folder: where results are written, one file each, and looked for.
        tell: is told what goes on, a line at a time.
    """
    results = []
    with contextlib.ExitStack() as stack:
        scratch = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for keep, model in models:
            for task in harness.tasks:
                of_task = {"task": task, "yaml": harness.fingerprint(task)}
                made_with = {"schema": SCHEMA, **of_task, "keep": keep, "limit": limit, **settings}
                path = None if folder is None else folder / f"{task}-{keep.replace('%', 'percent')}.json"
                known = None if path is None else _known(path, made_with)
                if known is not None:
                    tell(f"{task}, {keep}: taken from {path}")
                    results.append(known)
                    continue
                result = harness.run(model, task, keep, limit, scratch)
                results.append(result)
                tell(f"{task}, {keep}: {_shown(result.task, result.metrics)} ({result.seconds:.0f} s)")
                if path is not None:
                    text = json.dumps({"made_with": made_with, "result": asdict(result)}, indent=1) + "\n"
                    partial = path.with_suffix(".partial")
                    partial.write_text(text, encoding="utf-8")
                    partial.replace(path)
    return results


def _known(path: Path, made_with: Mapping[str, Any]) -> Result | None:
    """The result in a file, if it was made with the same settings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Result(**found["result"]) if found["made_with"] == made_with else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main_metric(task: str, metrics: Mapping[str, float]) -> str:
    """The one to show: what papers give of the task, else the first of a few usual ones, else the first."""
    if task in TASKS and TASKS[task][1] in metrics:
        return TASKS[task][1]
    return next((name for name in _PREFERRED if name in metrics), next(iter(metrics), ""))


def score(result: Result) -> float | None:
    """What to show of a result, scaled as papers do where the task is one of theirs."""
    name = main_metric(result.task, result.metrics)
    if not name:
        return None
    factor = TASKS[result.task][2] if result.task in TASKS and TASKS[result.task][1] == name else 1.0
    return result.metrics[name] * factor


def _shown(task: str, metrics: Mapping[str, float]) -> str:
    name = main_metric(task, metrics)
    return f"{name} {metrics[name]:.4g}" if name else "no number"


def share_of_unpruned(results: Sequence[Result], keep: str) -> float | None:
    """Mean over the tasks of score / unpruned score, percent; None where a task has none."""
    shares = []
    for result in results:
        if result.keep == keep:
            whole = next((one for one in results if one.task == result.task and one.keep == UNPRUNED), None)
            own, full = score(result), None if whole is None else score(whole)
            if own is None or not full:
                return None
            shares.append(own / full)
    return 100 * sum(shares) / len(shares) if shares else None


def as_text(results: Sequence[Result], tables: Sequence[Table], about: str) -> str:
    """The measured numbers and, in blocks of their own, the published ones of the same tasks."""
    tasks = list(dict.fromkeys(result.task for result in results))
    budgets = list(dict.fromkeys(result.keep for result in results))
    headings = [TASKS[task][0] if task in TASKS else task for task in tasks]
    titles = ["", *headings, "mean %", "kept"]
    lines = [[about], titles]
    for keep in budgets:
        own = {result.task: result for result in results if result.keep == keep}
        kept = [result.kept for result in own.values() if result.kept is not None]
        mean = f"{sum(kept) / len(kept):.0f}" if kept else "all"
        cells = [_cell(score(own[task]) if task in own else None) for task in tasks]
        lines.append(
            [keep if keep == UNPRUNED else f"keep {keep}", *cells, _cell(share_of_unpruned(results, keep)), mean]
        )
    for table in tables:
        lines.append([f"\nPublished, not measured here: {table.source}; {table.harness}"])
        for row in table.rows:
            cells = [_cell(row.scores.get(task)) for task in tasks]
            lines.append([f"{row.method}, {row.budget}", *cells, _cell(row.mean), ""])
    wide = [line for line in lines if len(line) > 1]
    widths = [max(len(line[column]) for line in wide) for column in range(len(titles))]
    written = []
    for line in lines:
        if len(line) == 1:
            written.append(line[0])
            continue
        first, *others = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        written.append("  ".join([line[0].ljust(widths[0]), first, *others]).rstrip())
    return "\n".join(written)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def as_json(results: Sequence[Result], tables: Sequence[Table], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same for programs; "published" says of itself that it was not measured."""
    return {
        "schema": SCHEMA,
        "settings": dict(settings),
        "measured": [
            asdict(result) | {"main_metric": main_metric(result.task, result.metrics), "score": score(result)}
            for result in results
        ],
        "share_of_unpruned": {
            keep: share_of_unpruned(results, keep) for keep in dict.fromkeys(result.keep for result in results)
        },
        "published": [asdict(table) for table in tables],
    }
