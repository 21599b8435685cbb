"""Results of `adafv bench speed`: one JSON object, and tables in Markdown made from it.

The object (`"schema": "adafv.bench.speed/1"`):

    machine     device, processor, threads, releases
    models      one entry per model and batch size, as `run.measure` returns them: seconds (median, low, high, count), and per
                stage seconds, operations, flops, bytes, weights (bytes of parameters read), waits, on_host
    methods     as `choosing.measure_methods` returns them, one entry per batch size
    failed      parts that ended in an error: name and traceback
"""

import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from adafv.extras import release

SCHEMA = "adafv.bench.speed/1"


def machine(device: str | torch.device) -> dict[str, Any]:
    """Where something was measured."""
    device = torch.device(device)
    facts: dict[str, Any] = {
        "device": device.type,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "adafv": release("adafv"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def processor_name() -> str:
    """What the system calls its processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def as_tables(result: dict[str, Any]) -> str:
    """All of a result, for people."""
    facts = result["machine"]
    where = facts.get("gpu") or f"{facts['processor']}, {facts['threads']} thread(s)"
    parts = [f"{where}; torch {facts['torch']}, transformers {facts['transformers']}"]
    for model in result.get("models", ()):
        parts += [_head(model), _ways_table(model), _stages_table(model), *_notes(model["notes"])]
    for methods in result.get("methods", ()):
        parts += [_methods_head(methods), _methods_table(methods), *_notes(methods["notes"])]
    for failure in result.get("failed", ()):
        parts.append(f"failed: {failure['part']}: {failure['traceback'].strip().splitlines()[-1]}")
    return "\n\n".join(parts)


def _head(model: dict[str, Any]) -> str:
    whole = "whole" if model["whole"] else f"SCALED from {model['layers_measured']} of {model['layers']} decoder layers"
    return (
        f"{model['name']}, {model['dtype']}, {whole}; batch {model['batch']}, {model['visual_tokens']} visual of "
        f"{model['prompt_tokens']} tokens a prompt; preprocessing {_ms(model['preprocessing'])} ms an image; medians of "
        f"{model['rounds']} rounds [smallest, largest]"
    )


def _ways_table(model: dict[str, Any]) -> str:
    rows = []
    for way in model["ways"]:
        total, decode = way["total"], way.get("decode")
        rows.append(
            [
                _called(way),
                _range(way["first_token"], 1e3),
                _range(way["to_unpruned"]) if "to_unpruned" in way else "",
                _number(way["to_ideal"]["median"]) if "to_ideal" in way else "",
                _range(decode["seconds"], 1e3) if decode else "",
                _number(total["flops"] / 1e12),
                _number(total["bytes"] / 1e9),
                str(total["operations"]),
                str(total["waits"]),
                _number(way["peak_bytes"] / 2**20),
                _number(way["kv_bytes"] / 2**20),
            ]
        )
    heads = ("way", "first token, ms", "/ unpruned", "/ ideal", "decode, ms a token", "TFLOP", "GB moved", "operations")
    return table((*heads, "waits", "peak, MiB", "KV, MiB"), rows)


def _stages_table(model: dict[str, Any]) -> str:
    names = [name for name in _ORDER if any(name in way["stages"] for way in model["ways"])]
    rows = []
    for way in model["ways"]:
        cells = []
        for name in names:
            stage = way["stages"].get(name)
            cells.append("" if stage is None else f"{_ms(stage['seconds'])} ({stage['operations']})")
        rows.append([_called(way), *cells])
    return table((f"{'ms (operations) in'} ", *names), rows)


_ORDER = ("tower", "projector", "scores", "selection", "compaction", "prefill", "rest")


def _methods_head(methods: dict[str, Any]) -> str:
    return (
        f"scores and selection, {methods['dtype']}, batch {methods['batch']}, {methods['words']} words; medians [smallest, "
        "largest]"
    )


def _methods_table(methods: dict[str, Any]) -> str:
    rows = [
        [
            row["method"],
            f"{row['keep']} of {row['tokens']}",
            _range(row["seconds"], 1e3),
            str(row["operations"]),
            str(row["waits"]),
            _number(row["flops"] / 1e9),
            _number(row["peak_bytes"] / 2**20),
        ]
        for row in methods["rows"]
    ]
    return table(("method", "tokens", "ms", "operations", "waits", "GFLOP", "peak, MiB"), rows)


def _notes(notes: Iterable[str]) -> list[str]:
    said = [note for note in notes if note]
    return ["\n".join(f"- {note}" for note in said)] if said else []


def _called(way: dict[str, Any]) -> str:
    return way["name"] if way["keep"] is None else f"{way['name']} {way['keep']}"


def _ms(seconds: dict[str, Any]) -> str:
    return _number(1e3 * seconds["median"])


def _range(values: dict[str, Any], factor: float = 1.0) -> str:
    low, high = _number(factor * values["low"]), _number(factor * values["high"])
    return f"{_number(factor * values['median'])} [{low}, {high}]"


def _number(value: float) -> str:
    """Three digits that mean something."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, with its columns in line."""
    cells = [list(heads), *map(list, rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(heads))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
