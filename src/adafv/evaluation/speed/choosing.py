"""What every method costs: scores and selection of K of N visual tokens, apart from any model.

A method is shown what the engines show it, through their one preparation (`adafv.core.select`), with random values. Methods
that mix what the projector reads pay for projecting their mixes, as they do in a model. Methods inside the language model
are given the attention that they choose by; the rows of attention themselves are not in the number.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adafv.core.encoded import EncodedImage
from adafv.core.layout import ImageLayout
from adafv.core.select import Wanted, chosen_by, cuts_of, plan_of, select_tokens, visual_tokens
from adafv.core.tokens import LAST_ATTENTION, SALIENCY, WORD_ATTENTION, Plan, Signal, VisualTokens
from adafv.errors import AdaFVError, OptionError
from adafv.evaluation.speed.counting import Counting, counted_waits
from adafv.evaluation.speed.run import spread
from adafv.evaluation.speed.stages import StageClock, Stages, listening
from adafv.methods import Method, known_methods, method_named
from adafv.methods.base import IMAGE, LAYERS

SIZES = ((576, 58), (2880, 144))
"""(N, K): LLaVA-1.5, and LLaVA-NeXT's five crops, each at the strictest budget of the paper."""
WIDTH, TOWER_WIDTH, HEADS, WORDS_ASKED, DEPTH = 4096, 1024, 16, 20, 32
"""Of a 7B model and CLIP-L/14."""
OF_VIDEOS, FRAMES = ("evs",), 24
"""Methods that compare the frames of a video, and how many frames the tokens are then shared by."""
SEARCHES = ({"objective": "joint"}, {"objective": "split"}, {"objective": "frank-wolfe"}, {"variant": "published"})
"""Of AdaFV: its search, the paper's, the one before, and the published code's."""


def choices(names: Iterable[str] = ()) -> list[tuple[str, Method]]:
    """Methods by label; empty: all of them, and AdaFV with each of its searches.

    Raises:
        OptionError: there is no method of that name.
    """
    found = []
    for name in list(names) or list(known_methods()):
        variants: Sequence[dict[str, str]] = SEARCHES if name == "adafv" else ({},)
        found += [(" ".join([name, *options.values()]), method_named(name, **options)) for options in variants]
    return found


@torch.no_grad()
def measure_methods(
    names: Iterable[str] = (),
    device: str | torch.device = "cpu",
    sizes: Sequence[tuple[int, int]] = SIZES,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 10,
    limit: float | None = None,
) -> dict[str, Any]:
    """Milliseconds, operations, waits and memory of scores and selection, per method and size.

    Args:
        sizes: (N, K); N is 576 times a number of crops, or any number, which is then one row of patches. For methods that
            compare frames, N is a video of 24 frames.
        batch: images that are chosen together.
        limit: seconds after which no further method begins; those left out are named.
    """
    if rounds < 1 or batch < 1:
        raise OptionError("rounds and batch are 1 or more")
    device, started = torch.device(device), time.monotonic()
    projector = _projector(device, dtype)
    rows, notes = [], []
    for tokens, keep in sizes:
        for label, method in choices(names):
            if limit is not None and time.monotonic() - started > limit:
                notes.append(f"{label} at {keep} of {tokens}: left out, for time")
                continue
            try:
                run = _chosen(method, tokens, keep, batch, device, dtype, projector)
                rows.append({"method": label, "tokens": tokens, "keep": keep, **_measured(run, device, rounds)})
            except (AdaFVError, torch.OutOfMemoryError) as error:
                notes.append(f"{label} at {keep} of {tokens}: {error}")
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "words": WORDS_ASKED,
        "rows": rows,
        "notes": notes,
    }


def _measured(run: Callable[[], object], device: torch.device, rounds: int) -> dict[str, Any]:
    for _ in range(1 + 2 * (device.type == "cuda")):
        run()
    stages = Stages()
    count = Counting(stages, device)
    with listening(stages), count:
        run()
    counts = count.counts.values()
    waits, peak = sum(each.waits for each in counts), count.living.peak
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        heard: dict[str, int] = {}
        with listening(stages), counted_waits(stages, heard):
            run()
        torch.cuda.synchronize(device)
        waits, peak = sum(heard.values()), torch.cuda.max_memory_allocated(device) - before
    seconds: list[float] = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clock = StageClock(device)
        with listening(clock):
            run()
        seconds.append(sum(clock.seconds().values()))
    return {
        "seconds": spread(seconds),
        "operations": sum(each.operations for each in counts),
        "on_host": sum(each.on_host for each in counts),
        "waits": waits,
        "flops": sum(each.flops for each in counts),
        "bytes": sum(each.bytes for each in counts),
        "peak_bytes": peak,
    }


def _projector(device: torch.device, dtype: torch.dtype) -> nn.Module:
    with device:
        layers = nn.Sequential(nn.Linear(TOWER_WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    return layers.to(dtype)


def _layout(tokens: int) -> ImageLayout:
    """Crops of 24 x 24 patches where the number allows it."""
    crops, rest = divmod(tokens, 576)
    if rest:
        return ImageLayout(torch.arange(tokens), 1, 1, tokens)
    tiling = {5: (2, 2)}.get(crops)
    return ImageLayout(torch.arange(tokens), crops, 24, 24, tiling)


def _chosen(
    method: Method,
    tokens: int,
    keep: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    projector: nn.Module,
) -> Callable[[], object]:
    """What runs scores and selection on random images."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def of_tower(signal: Signal) -> Tensor:
        if signal.kind == SALIENCY.kind:
            return torch.randn(tokens, generator=generator).mul(2).softmax(-1).to(device)
        return random(tokens, HEADS, TOWER_WIDTH // HEADS) if signal.kind == "keys" else random(tokens, TOWER_WIDTH)

    if method.stages == {IMAGE}:
        return lambda: None
    inside = LAYERS in method.stages
    layout = _layout(tokens)
    if method.name in OF_VIDEOS:
        layout = ImageLayout(layout.source, FRAMES, 1, tokens // FRAMES, frames=True)
    plan = Plan(None) if inside else plan_of(method, layout, keep)
    project = projector if method.mixes != "tokens" else None
    wanted = []
    for _ in range(batch):
        encoded = EncodedImage(
            random(tokens, WIDTH), {signal: of_tower(signal) for signal in sorted(method.of_tower, key=str)}, layout
        )
        words = random(WORDS_ASKED, WIDTH) if method.needs_words else None
        ids = torch.arange(3, 3 + WORDS_ASKED) if method.needs_words else None
        most = keep if plan.keep is None else plan.keep
        wanted.append(Wanted(encoded, method, plan, most, words, ids, project=project))
    if not inside:
        return lambda: select_tokens(wanted)
    return _chosen_inside(method, wanted, tokens, keep, device)


def _chosen_inside(
    method: Method, wanted: list[Wanted], tokens: int, keep: int, device: torch.device
) -> Callable[[], object]:
    """All cuts of a method that acts inside the language model, one image after the other, with attention that is given."""
    cuts = cuts_of(method, DEPTH, tokens, keep)
    shown: list[list[tuple[int, VisualTokens]]] = []
    for image in wanted:
        whole = visual_tokens([image])
        steps: list[tuple[int, VisualTokens]] = []
        for cut in cuts:
            left = tokens if not steps else steps[-1][0]
            attention = torch.rand(1, left, WORDS_ASKED, device=device) / tokens
            steps.append(
                (
                    cut.keep,
                    replace(
                        whole,
                        features=whole.features[:, :left],
                        candidates=whole.candidates[:, :left],
                        source=whole.source[:, :left],
                        signals={LAST_ATTENTION: attention[..., 0], WORD_ATTENTION: attention},
                        read=whole.features,
                    ),
                )
            )
        shown.append(steps)

    def run() -> None:
        for steps in shown:
            for keep, some in steps:
                chosen_by(method, some, keep)

    return run
