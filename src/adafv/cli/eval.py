"""`adafv eval`: benchmarks of lmms-eval, unpruned and with several budgets, beside published numbers."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adafv.asking.failures import UsageError
from adafv.asking.models import checked_model, folder_or_id, hub_options
from adafv.cli.failures import failures_as_messages, put, say
from adafv.cli.options import (
    DTYPES,
    METHOD,
    BatchOption,
    DeviceOption,
    DtypeOption,
    MethodOption,
    MethodOptions,
    ModelOption,
    TextOption,
    one_of,
    parts_of,
)
from adafv.core.budget import Budget
from adafv.printable import shortened

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adafv.asking.session import Session
    from adafv.evaluation.batched import BatchedModel
    from adafv.methods import Method

_TASKS = "gqa,scienceqa_img,textvqa_val,pope,mme,mmbench_en_dev"


def evaluate(
    model: ModelOption = "",
    tasks: Annotated[
        str, typer.Option(metavar="TASK,...", help="Of lmms-eval, or of --include. Default: six of the paper's seven.")
    ] = _TASKS,
    keep: Annotated[
        str,
        typer.Option(
            metavar="BUDGET,...",
            help="Visual tokens to keep: numbers (640,320,160), shares (25%,10%,5%), or both. Unpruned always runs, too.",
            rich_help_panel=METHOD,
        ),
    ] = "25%,10%,5%",
    method: MethodOption = "adafv",
    option: MethodOptions = None,
    text: TextOption = None,
    include: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own, as lmms-eval's YAML.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task, the first ones; to try things.")] = None,
    batch: BatchOption = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--to",
            help="Folder for results, one file per task and budget; those that are there are not run again.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    r"""Run benchmarks of lmms-eval with several budgets, and print published numbers beside the measured ones.

    Needs lmms-eval, and for its tasks the Hugging Face Hub; tasks of your own run without a network.

        adafv eval --model llava-hf/llava-v1.6-vicuna-7b-hf --tasks pope,gqa --keep 640,320,160 --batch 8
    """
    with failures_as_messages():
        budgets = _budgets(keep)
        names = _names(tasks)
        one_of("--dtype", dtype, DTYPES)
        named = checked_model(model)
        if include is not None and not include.is_dir():
            raise UsageError(f"--include {shortened(include)}: there is no such folder")
        from adafv.evaluation import harness

        harness.require()
        if output is not None:
            _made(output)
        hub_options(folder_or_id(named))
        from adafv.asking.session import Session, check_device
        from adafv.evaluation.published import published_for
        from adafv.methods.options import in_one_word, method_of, parameters_from_options

        parameters = parameters_from_options(method, option or [])
        chosen = method_of(method, parameters)
        where = check_device(device)
        say("looking for the tasks and their data ...")
        found = harness.Harness.of(names, include)
        found.fetch()
        say(f"loading {named} ...")
        session = Session.load(named, dtype, where)
        name = in_one_word(method, parameters)
        settings: dict[str, Any] = {
            "model": named,
            "method": name,
            "text": text,
            "dtype": session.dtype,
            "versions": {package: version(package) for package in ("adafv", "lmms-eval", "transformers", "torch")},
        }
        models = list(_models(session, chosen, budgets, text, batch))
        results = harness.evaluate(found, models, settings=settings, limit=limit, folder=output, tell=say)
        tables = [table for table in published_for(named) if any(set(row.scores) & set(names) for row in table.rows)]
        tables = published_for(named) if tables else []
        if as_json:
            put(json.dumps(harness.as_json(results, tables, settings | {"limit": limit}), indent=1))
            return
        some = "" if limit is None else f", the first {limit} questions of each task"
        put(harness.as_text(results, tables, f"Measured: {shortened(named)}, {name}, {session.dtype}{some}"))


def _budgets(keep: str) -> dict[str, Budget]:
    """Budgets by what was written, without repetitions."""
    found = {word: Budget.of(word) for word in parts_of(keep)}
    if not found:
        raise UsageError("--keep names no budget; such as --keep 640,320,160")
    return {word: budget for word, budget in found.items() if not budget.keeps_all}


def _names(tasks: str) -> list[str]:
    found = list(dict.fromkeys(parts_of(tasks)))
    if not found:
        raise UsageError("--tasks names no task; such as --tasks pope,gqa")
    return found


def _made(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".adafv").touch()
        (folder / ".adafv").unlink()
    except OSError as error:
        raise UsageError(
            f"--output {shortened(folder)} cannot be written ({error.strerror}); choose another"
        ) from error


def _models(
    session: "Session", method: "Method", budgets: dict[str, Budget], text: str | None, batch: int
) -> "Iterator[tuple[str, BatchedModel]]":
    from adafv.evaluation.batched import BatchedModel
    from adafv.evaluation.harness import UNPRUNED

    yield UNPRUNED, BatchedModel(session, None, batch)
    for word, budget in budgets.items():
        yield word, BatchedModel(session, session.pruner(method, budget, text), batch)
