"""Throughput and time to the first token of a server, pruned against unpruned: `python -m benchmarks.serving`.

Needs vLLM and its environment (`make test-vllm`); the server is the real one, over HTTP, in processes of its own.

What is compared. The same requests to the same server: a picture of its own each, the same words, the same number of
tokens to answer with. Unpruned ones ask for keep=1.0, pruned ones for `--keep` tokens. No cache can help: no two
requests of one side share a picture, and the caches of prefixes, processed and encoded images are off.

How. At each concurrency so many clients send requests one after the other, until a block of them is done. Blocks take
turns, A B B A A B ..., and a pair of neighbours, which saw the same pictures, gives one ratio: what slows the machine slows
both. The median over the pairs is shown, with the smallest and the largest. Above 1 is better for throughput, below 1
for times. A few requests of each side come first and are not counted.

On which model. Stock classes and random weights, in the layer shapes of LLaVA-1.5-7B (CLIP-L/14-336, Vicuna-7B) with
few of the layers, as many as make the benchmark end: by default 3 of the 32 of the language model and 1 of the 23 of the
tower that are run. In multiplications, tower and projector are then 5 % of what one unpruned prompt of 640 tokens costs,
as in the whole model, where they are 4.5 %. Where there is room, `--layers 32 --tower-layers 24` is the whole model.

Why it comes out as it does: the steps that the server logs meanwhile are shown by side. vLLM fills a step with prompts
up to `--max-num-batched-tokens` and counts an image by the tokens that are kept, so a step holds more images the more is
pruned. All its requests get their first token together, at its end, and those that were answering wait for it. Fewer
tokens per step let the first ones go earlier: compare `-- --max-num-batched-tokens 512`.
"""

import argparse
import base64
import io
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table

from adafv.bundled import bundled_model
from adafv.evaluation.speed.report import processor_name
from adafv.evaluation.speed.shapes import DTYPES, SHAPES, Shape, build

SIDES = UNPRUNED, PRUNED = ("unpruned", "pruned")
WORDS = (
    "You see a photo of a house and a tree. On the left there is a car, on the right there is a boat and below it one "
    "large bird. Describe the biggest object in the picture, what color it is and how many of it you see. Is it yellow?"
)
"""Some 60 tokens with the template, none of them unknown to the bundled tokenizer."""

MODEL = "model"
"""What the server calls it."""

START_SECONDS = 300.0
"""To wait for the server to start."""
REQUEST_SECONDS = 600.0


@dataclass(frozen=True)
class Load:
    """How the server is asked at one concurrency."""

    concurrency: int
    requests: int
    """Per block."""
    pairs: int


LOADS = (Load(1, 6, 6), Load(8, 24, 5), Load(32, 64, 4))
WARM_UP = Load(4, 4, 1)
"""Not counted."""
QUICK_LOADS = (Load(1, 1, 2), Load(4, 4, 2))


# What was measured ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One request, by a clock that all share, in seconds."""

    sent: float
    arrivals: tuple[float, ...]
    """Of the answer's tokens."""
    prompt_tokens: int

    @property
    def first_token(self) -> float:
        """Seconds from sending to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def per_token(self) -> float:
        """Mean seconds between a token and the next."""
        return (self.arrivals[-1] - self.arrivals[0]) / (len(self.arrivals) - 1)


@dataclass(frozen=True)
class Block:
    """One block of requests of one side."""

    answers: tuple[Answer, ...]
    steps: tuple["Step", ...] = ()

    @property
    def seconds(self) -> float:
        return max(each.arrivals[-1] for each in self.answers) - min(each.sent for each in self.answers)

    @property
    def throughput(self) -> float:
        """Requests per second."""
        return len(self.answers) / self.seconds


@dataclass(frozen=True)
class Step:
    """One step of vLLM's engine, as it logs it."""

    prompts: int
    prompt_tokens: int
    generating: int
    seconds: float
    images: int
    """That went through the tower."""


METRICS: dict[str, Callable[[Block], float]] = {
    "requests per second": lambda block: block.throughput,
    "first token, mean s": lambda block: statistics.fmean(each.first_token for each in block.answers),
    "first token, median s": lambda block: statistics.median(each.first_token for each in block.answers),
    "first token, 95th percentile s": lambda block: percentile([each.first_token for each in block.answers], 95),
    "time per further token, mean s": lambda block: statistics.fmean(each.per_token for each in block.answers),
}


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, linearly."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Ratio:
    """One metric at one concurrency: pruned / unpruned, pair by pair."""

    concurrency: int
    metric: str
    unpruned: float
    """Median over the blocks."""
    pruned: float
    ratio: float
    """Median over the pairs, not the ratio of the medians."""
    lowest: float
    highest: float
    pairs: int


def ratios(concurrency: int, pairs: Sequence[dict[str, Block]]) -> list[Ratio]:
    """All metrics of one concurrency.

    Args:
        pairs: per pair, the block of each side.
    """
    found = []
    for metric, measure in METRICS.items():
        values = [{side: measure(pair[side]) for side in SIDES} for pair in pairs]
        each = [value[PRUNED] / value[UNPRUNED] for value in values]
        unpruned, pruned = (statistics.median(value[side] for value in values) for side in SIDES)
        middle = statistics.median(each)
        found.append(Ratio(concurrency, metric, unpruned, pruned, middle, min(each), max(each), len(each)))
    return found


_STEP = re.compile(
    r"Iteration\(\d+\): (\d+) context requests, (\d+) context tokens, (\d+) generation requests, \d+ generation tokens, "
    r"iteration elapsed time: ([\d.]+) ms(.*)"
)
_IMAGES = re.compile(r"encoder inputs: (\d+)")


def steps_in(log: str) -> tuple[Step, ...]:
    """The steps in a piece of vLLM's log, written with `--enable-logging-iteration-details`."""
    found = []
    for line in _STEP.finditer(log):
        images = _IMAGES.search(line[5])
        found.append(
            Step(int(line[1]), int(line[2]), int(line[3]), float(line[4]) / 1000, int(images[1]) if images else 0)
        )
    return tuple(found)


@dataclass(frozen=True)
class Steps:
    """What the steps of one side at one concurrency had in common."""

    concurrency: int
    side: str
    steps: int
    images: float
    """Mean over the steps with images."""
    most_images: int
    longest: float
    """Seconds, of the longest step that some request waited for its next token in."""


def summary(concurrency: int, side: str, steps: Sequence[Step]) -> Steps:
    images = [step.images for step in steps if step.images] or [0]
    stalls = [step.seconds for step in steps if step.generating] or [0.0]
    return Steps(concurrency, side, len(steps), statistics.fmean(images), max(images), max(stalls))


# Requests -------------------------------------------------------------------------------------------------------------


def order(pairs: int) -> list[tuple[int, str]]:
    """(pair, side) of the blocks in turn: neither side always comes first, nor after the same one."""
    return [(pair, side) for pair in range(pairs) for side in (SIDES if pair % 2 == 0 else SIDES[::-1])]


def picture(seed: int, side: int) -> str:
    """A picture that comes with adafv under noise of its own, as a data URL."""
    random = Random(seed)
    samples = sorted((bundled_model().parent / "samples").glob("*.png"))
    with Image.open(random.choice(samples)) as sample:
        shown = sample.convert("RGB").resize((side, side))
    noise = Image.frombytes("RGB", (side, side), random.randbytes(3 * side * side))
    buffer = io.BytesIO()
    Image.blend(shown, noise, 0.2).save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def body(image: str, keep: int | float, tokens: int) -> bytes:
    """Of one request to /v1/chat/completions."""
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": WORDS}]
    request = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "mm_processor_kwargs": {"adafv": {"keep": keep}},
    }
    return json.dumps(request).encode()


def ask(port: int, request: bytes) -> Answer:
    """Send one request and read its answer to the end.

    Raises:
        RuntimeError: the server refused it, or broke off.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=REQUEST_SECONDS)
    try:
        sent = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", request, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {response.read().decode()[:500]}")
        arrivals: list[float] = []
        prompt_tokens = None
        for line in response:
            now = time.perf_counter()
            event = line.decode().strip().removeprefix("data: ")
            if not event or event == "[DONE]":
                continue
            chunk = json.loads(event)
            if "error" in chunk:
                raise RuntimeError(f"the server broke off: {event[:500]}")
            for choice in chunk["choices"]:
                arrivals += [now] * len(choice.get("token_ids") or ())
            usage = chunk.get("usage")
            prompt_tokens = usage["prompt_tokens"] if usage else prompt_tokens
    finally:
        connection.close()
    if prompt_tokens is None or not arrivals:
        raise RuntimeError("the answer ended early")
    return Answer(sent, tuple(arrivals), prompt_tokens)


def run_block(port: int, requests: Sequence[bytes], concurrency: int) -> Block:
    """All requests, at most so many at a time."""
    with ThreadPoolExecutor(concurrency) as clients:
        return Block(tuple(clients.map(lambda request: ask(port, request), requests)))


# The server -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What is run."""

    keep: int = 64
    tokens: int = 16
    """Of every answer."""
    layers: int = 3
    tower_layers: int = 2
    """With the last one, which the projector does not read."""
    shape: Shape = SHAPES["llava-1.5-7b"]
    dtype: str = "bfloat16"
    threads: int = 2
    server: tuple[str, ...] = ()
    """Further arguments of vLLM's server."""

    @property
    def side(self) -> int:
        """Of a picture, in pixels."""
        return int(self.shape.vision["image_size"])

    @property
    def patches(self) -> int:
        return (self.side // int(self.shape.vision["patch_size"])) ** 2


def write_checkpoint(folder: Path, options: Options) -> None:
    """A LLaVA of random weights at `options.shape`, with the bundled model's tokenizer and image processor."""
    source = bundled_model()
    vocabulary = len(json.loads((source / "tokenizer.json").read_text())["model"]["vocab"])
    vision = {**options.shape.vision, "num_hidden_layers": options.tower_layers}
    shape = replace(options.shape, vision=vision, text={**options.shape.text, "vocab_size": vocabulary})
    model = build(shape, torch.device("cpu"), DTYPES[options.dtype], options.layers)
    given = json.loads((source / "config.json").read_text())
    model.config.image_token_id = given["image_token_index"]
    model.save_pretrained(folder)
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    processor = json.loads((source / "processor_config.json").read_text())
    processor["patch_size"] = vision["patch_size"]
    images = processor["image_processor"]
    side = options.side
    images["crop_size"], images["size"] = {"height": side, "width": side}, {"shortest_edge": side}
    (folder / "processor_config.json").write_text(json.dumps(processor))


def command(folder: Path, port: int, options: Options) -> list[str]:
    """`adafv serve`, with budgets per request, and without caches."""
    return [
        *(sys.executable, "-m", "adafv", "serve", str(folder), "--keep", str(options.keep), "--request-budgets"),
        *("--tower-cache-mb", "0", "--host", "127.0.0.1", "--port", str(port), "--"),
        *("--served-model-name", MODEL, "--dtype", options.dtype, "--max-model-len", "1024", "--max-num-seqs", "64"),
        *("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0", "--enforce-eager"),
        "--enable-logging-iteration-details",
        *options.server,
    ]


@contextmanager
def server(folder: Path, log: Path, options: Options) -> Iterator[int]:
    """The port of a running server; its log goes to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(options.threads),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("wb") as lines:
        process = subprocess.Popen(
            command(folder, port, options), env=environment, stdout=lines, stderr=lines, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start; the end of its log:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the engine's processes, should they still be there
        process.wait()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


# Command line ---------------------------------------------------------------------------------------------------------


def measure(port: int, log: Path, load: Load, options: Options, seed: int) -> list[dict[str, Block]]:
    """Per pair, the block of each side, at one concurrency.

    Raises:
        RuntimeError: the answers are not as long as asked for, or the prompts not as much shorter as they must be.
    """
    pairs: list[dict[str, Block]] = [{} for _ in range(load.pairs)]
    keeps = {UNPRUNED: 1.0, PRUNED: options.keep}

    def block(side: str, first_picture: int, requests: int) -> Block:
        seeds = range(first_picture, first_picture + requests)
        bodies = [body(picture(each, options.side), keeps[side], options.tokens) for each in seeds]
        before = log.stat().st_size
        answers = run_block(port, bodies, load.concurrency).answers
        time.sleep(0.2)  # for the log
        with log.open("rb") as lines:
            lines.seek(before)
            return Block(answers, steps_in(lines.read().decode(errors="replace")))

    for pair, side in order(load.pairs):
        pairs[pair][side] = block(side, seed + pair * load.requests, load.requests)
    for pair_of_blocks in pairs:
        check_lengths(pair_of_blocks, options)
    return pairs


def check_lengths(pair: dict[str, Block], options: Options) -> None:
    """Raise RuntimeError if this is not what was to be measured."""
    visual = {UNPRUNED: options.patches, PRUNED: options.keep}
    words = {answer.prompt_tokens - visual[side] for side in SIDES for answer in pair[side].answers}
    if len(words) != 1 or min(words) < 1:
        raise RuntimeError(f"without {visual} visual tokens, the same words take {sorted(words)} tokens")
    lengths = {len(answer.arrivals) for side in SIDES for answer in pair[side].answers}
    if lengths != {options.tokens}:
        raise RuntimeError(f"answers have {sorted(lengths)} tokens, not {options.tokens}")


def header(port: int, options: Options) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/version", timeout=30) as response:
        release = json.loads(response.read())["version"]
    text, vision = options.shape.text, options.shape.vision
    return {
        "vllm": release,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "load average": round(os.getloadavg()[0], 2),
        "threads": f"{options.threads} of the engine",
        "dtype": options.dtype,
        "language model": f"{options.layers} layers of {text['num_hidden_layers']}, width {text['hidden_size']}",
        "tower": f"{options.tower_layers} layers of {vision['num_hidden_layers']}, the last one not run",
        "visual tokens": f"{options.patches}, pruned {options.keep}",
        "answer": f"{options.tokens} tokens",
        "further options": " ".join(options.server) or "none",
    }


def print_ratios(console: Console, found: Sequence[Ratio]) -> None:
    table = Table(title="pruned / unpruned, median over the pairs", title_justify="left", title_style="bold")
    for column in ("number", *SIDES, "ratio", "smallest .. largest", "pairs"):
        table.add_column(column, justify="left" if column == "number" else "right", no_wrap=True)
    for row in found:
        values = [
            f"{row.unpruned:.3f}",
            f"{row.pruned:.3f}",
            f"{row.ratio:.2f}",
            f"{row.lowest:.2f} .. {row.highest:.2f}",
        ]
        table.add_row(row.metric, *values, str(row.pairs))
    console.print(table)


def print_steps(console: Console, found: Sequence[Steps]) -> None:
    table = Table(title="steps of the engine", title_justify="left", title_style="bold")
    for column in ("side", "steps", "images per step", "most", "longest stall, s"):
        table.add_column(column, justify="left" if column == "side" else "right", no_wrap=True)
    for row in found:
        values = [str(row.steps), f"{row.images:.1f}", str(row.most_images), f"{row.longest:.2f}"]
        table.add_row(row.side, *values)
    console.print(table)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=(__doc__ or "").split("\n\n")[0])
    default = Options()
    parser.add_argument("--quick", action="store_true", help="two pairs of few requests, to see that it works")
    parser.add_argument("--keep", type=int, default=default.keep, help="visual tokens of a pruned image (default: 64)")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="of every answer (default: 16)")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", choices=[load.concurrency for load in LOADS], help="only these"
    )
    parser.add_argument("--pairs", type=int, help="pairs of blocks at each concurrency")
    parser.add_argument("--requests", type=int, help="requests per block at each concurrency")
    parser.add_argument("--layers", type=int, default=default.layers, help="of the language model (default: 3)")
    parser.add_argument(
        "--tower-layers", type=int, default=default.tower_layers, help="(default: 2, the last one unread)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default=default.dtype)
    parser.add_argument("--threads", type=int, default=default.threads, help="of the engine (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the server's log there")
    parser.add_argument("server", nargs="*", help="after --: further arguments of vLLM's server")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.keep < default.patches:
        parser.error(f"--keep must be from 1 to {default.patches - 1}")
    if arguments.quick and arguments.concurrency:
        parser.error("--quick has its own concurrencies")
    if any(load.requests < load.concurrency or load.pairs < 1 for load in loads(arguments)):
        parser.error("--requests must be the largest concurrency or more, and --pairs 1 or more")
    if arguments.tokens < 2:
        parser.error("--tokens must be 2 or more, or there is no time per token")
    return arguments


def loads(arguments: argparse.Namespace) -> list[Load]:
    """What was asked for on the command line."""
    chosen = QUICK_LOADS if arguments.quick else LOADS
    given = {name: getattr(arguments, name) for name in ("pairs", "requests") if getattr(arguments, name) is not None}
    wanted = arguments.concurrency or [load.concurrency for load in chosen]
    return [replace(load, **given) for load in chosen if load.concurrency in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = arguments_of(argv)
    options = Options(
        keep=arguments.keep,
        tokens=arguments.tokens,
        layers=arguments.layers,
        tower_layers=arguments.tower_layers,
        dtype=arguments.dtype,
        threads=arguments.threads,
        server=tuple(arguments.server),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves no server behind
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    found: list[Ratio] = []
    steps: list[Steps] = []
    with tempfile.TemporaryDirectory() as folder:
        transformers.utils.logging.disable_progress_bar()
        log = arguments.log or Path(folder) / "server.log"
        checkpoint = Path(folder) / "model"
        write_checkpoint(checkpoint, options)
        with server(checkpoint, log, options) as port:
            facts = header(port, options)
            console.print("\n".join(f"{name}: {value}" for name, value in facts.items()), markup=False)
            measure(port, log, WARM_UP, options, 0)
            for number, load in enumerate(loads(arguments), start=1):
                start = time.perf_counter()
                pairs = measure(port, log, load, options, number * 1_000_000)
                rows = ratios(load.concurrency, pairs)
                taken = [
                    summary(load.concurrency, side, [step for pair in pairs for step in pair[side].steps])
                    for side in SIDES
                ]
                console.print(f"\nconcurrency {load.concurrency}, {time.perf_counter() - start:.0f} s")
                print_ratios(console, rows)
                print_steps(console, taken)
                found += rows
                steps += taken
    if arguments.json is not None:
        everything = {"header": facts, "ratios": list(map(asdict, found)), "steps": list(map(asdict, steps))}
        arguments.json.write_text(json.dumps(everything, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
