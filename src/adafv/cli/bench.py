"""`adafv bench`: what pruning costs, saves and loses, measured on this machine."""

import typer

from adafv.cli.bench_accuracy import accuracy

bench = typer.Typer(no_args_is_help=True, help="Measure what pruning costs, saves and loses, on this machine.")
bench.command("accuracy")(accuracy)
