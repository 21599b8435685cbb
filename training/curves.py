"""The curves of a training run, in the terminal: every figure from its first report to its last.

python -m training.curves [training/run]
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60


def curve(values: list[float], width: int = WIDTH) -> str:
    """The values as bars, lowest to highest; each bar is the mean of its share of the run."""
    low, high = min(values), max(values)
    width = min(width, len(values))
    means = []
    for place in range(width):
        share = values[place * len(values) // width : (place + 1) * len(values) // width]
        means.append(sum(share) / len(share))
    span = (high - low) or 1.0
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] for mean in means)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the curves of a training run.")
    parser.add_argument("run", type=Path, nargs="?", default=Path("training/run"))
    options = parser.parse_args()
    console = Console(width=130)
    logs = sorted(options.run.glob("log-*.jsonl"))
    if not logs:
        raise SystemExit(f"{options.run} holds no log-*.jsonl; train first, or give training/shipped-run")
    for log in logs:
        stage = log.stem.removeprefix("log-")
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        figures: dict[str, list[float]] = defaultdict(list)
        for entry in entries:
            for name, value in entry.items():
                if name not in ("stage", "step", "seconds"):
                    figures[name].append(value)
        last = entries[-1]
        table = Table(title=f"{stage}: {last['step']} steps, {last['seconds'] / 60:.0f} minutes")
        for heading in ("figure", "first", "last", "curve"):
            table.add_column(heading, justify="left" if heading in ("figure", "curve") else "right")
        for name, values in sorted(figures.items()):
            table.add_row(name, f"{values[0]:.3f}", f"{values[-1]:.3f}", curve(values))
        console.print(table)


if __name__ == "__main__":
    main()
