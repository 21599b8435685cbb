"""`adafv bench`: what pruning costs, saves and loses, measured on this machine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from adafv.asking.failures import UsageError
from adafv.cli.bench_accuracy import accuracy
from adafv.cli.failures import failures_as_messages, put, say
from adafv.cli.options import parts_of
from adafv.cli.output import writable_folder, write_whole
from adafv.printable import shortened

bench = typer.Typer(no_args_is_help=True, help="Measure what pruning costs, saves and loses, on this machine.")
bench.command("accuracy")(accuracy)


@bench.command("speed")
def speed(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Checkpoints (folder, id on the Hub, bundled), or shapes with random weights: llava-1.5-7b, llava-next-7b, "
            "qwen2.5-vl-7b, qwen2.5-vl-3b, llava-0.5b, llava-next-0.5b, llava-tiny, llava-next-tiny, qwen2.5-vl-tiny.",
            show_default="bundled",
        ),
    ] = None,
    keep: Annotated[str, typer.Option(help="Budgets, comma-separated, such as 192,58 or 10%.")] = "",
    method: Annotated[str, typer.Option(help="Methods beside AdaFV, comma-separated.")] = "",
    methods: Annotated[
        str, typer.Option(help="Measure scores and selection of these methods alone, without a model: names, or all.")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Like prompts at a time.")] = 1,
    rounds: Annotated[int, typer.Option(help="How often each way is measured.")] = 10,
    decode: Annotated[int, typer.Option(help="Tokens to decode behind the first one; 0: none.")] = 8,
    layers: Annotated[int | None, typer.Option(help="Decoder layers of a shape to build; else all that fit.")] = None,
    picture: Annotated[Path | None, typer.Option(help="What is asked about; else noise, or a bundled picture.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
) -> None:
    """Seconds, operations, bytes and memory of a call, stage by stage: unpruned, pruned, the ideal, the published way."""
    with failures_as_messages():
        if output is not None:
            _check_file(output)
        from adafv.evaluation.speed.command import bench_speed
        from adafv.evaluation.speed.report import as_tables

        result = bench_speed(
            models or ([] if methods else ["bundled"]),
            budgets=parts_of(keep),
            beside=parts_of(method),
            alone=parts_of(methods),
            device=device,
            dtype=dtype,
            batch=batch,
            rounds=rounds,
            decode=decode,
            layers=layers,
            picture=picture,
            progress=say,
        )
        put(as_tables(result))
        if output is not None:
            write_whole(output, json.dumps(result, indent=1) + "\n")


def _check_file(path: Path) -> None:
    """Before hours of measuring: the file can be written at their end."""
    if path.is_dir():
        raise UsageError(f"--json {shortened(path)} is a folder; name a file in it")
    writable_folder("--json, in the folder", path.parent)
