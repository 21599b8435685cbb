"""Train the small model, from nothing, on this machine.

    python -m training.train                  # everything, into training/run
    python -m training.train --stage together # one stage, from the stages before it
    python -m training.train --device cuda --workers 13 --crops 16 --seconds 270   # on a GPU, in that time

Stages that do not need each other run side by side, on one core each or together on one GPU. Stop at any time and start
again with the same command: every stage goes on from its last checkpoint, and batches are the same as without the stop.
The log of losses and of right answers is `log-STAGE.jsonl`; `python -m training.curves` draws it.

With `--seconds`, a stage that would take too long ends early, and its rates go to zero by then: how many steps there were
is in the log. Without, a run is the same steps anywhere; on a GPU not the same bits.
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from training.batches import batches, moved
from training.optimiser import Optimiser
from training.stages import STAGES, Pupil, Stage, lesson

SIDE_BY_SIDE = ((("tower",), ("list", "grid")), (("projector", "together"),))
"""Stages after one another; in each, rows of stages that run at the same time."""
SECONDS = {"tower": 0.3, "list": 0.19, "grid": 0.09, "projector": 0.07}
"""Share of `--seconds` that a stage may take at most; "together" has what is left."""
CHECKPOINT_SECONDS = 60
REPORT_STEPS = 25
TEXT_WORKERS = 0.2
"""Share of the drawing processes that is for the language model's own stages."""
OPEN_FILES = 32768
CLOSING_SECONDS = 4
"""What it takes to stop the drawing and to write the weights."""


def train_stage(
    stage: Stage,
    folder: Path,
    steps: int,
    *,
    device: str = "cpu",
    workers: int = 1,
    seconds: float | None = None,
    copies: Path | None = None,
) -> None:
    """Run a stage to its end; go on from its checkpoint where there is one.

    Args:
        stage: what to learn.
        folder: for weights, checkpoints and the log.
        steps: how many, where `seconds` allow.
        device: of the weights.
        workers: processes that draw.
        seconds: time for this call; the schedule ends with it.
        copies: another folder for the weights, in half precision: as soon as the stage is done, and at checkpoints.
    """
    begun_here = time.monotonic()
    if copies:
        copies.mkdir(parents=True, exist_ok=True)
    finished, checkpoint = folder / f"{stage.name}.pt", folder / f"{stage.name}.checkpoint.pt"
    if finished.exists():
        print(f"{stage.name}: done before", flush=True)
        return
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint.exists() else None
    first, spent = (saved["step"], saved["seconds"]) if saved else (0, 0.0)
    # The drawing begins before the device is touched: processes are forked, and it is not theirs.
    drawn = batches(stage.make, size=stage.size, count=steps, first=first, workers=workers)
    pupil = Pupil()
    for earlier in stage.needs:
        weights = torch.load(folder / f"{earlier}.pt", map_location="cpu", weights_only=True)
        pupil.load_state_dict(weights, strict=False)
    pupil.to(device)
    optimiser = Optimiser(
        stage.parameters(pupil),
        steps=steps,
        matrix_rate=stage.rate,
        other_rate=stage.other_rate,
        position_rate=stage.position_rate,
    )
    if saved is None:
        stage.prepare(pupil)
    else:
        pupil.load_state_dict(saved["weights"], strict=False)
        optimiser.load_state_dict(saved["optimiser"])
        print(f"{stage.name}: going on from step {first}", flush=True)

    begun = saved_at = time.monotonic() - spent
    waited = 0.0
    figures: dict[str, list[float]] = defaultdict(list)
    for step in range(first, steps):
        asked = time.monotonic()
        batch = moved(next(drawn), torch.device(device))
        waited += time.monotonic() - asked
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            outcome = stage.learn(pupil, batch)
        outcome.loss.backward()
        left = 1.0 if seconds is None else 1 - (time.monotonic() - begun_here) / seconds
        optimiser.step(step, left)
        for name, figure in outcome.figures.items():
            figures[name].append(figure)
        done, now = step + 1, time.monotonic()
        last = done == steps or left <= 0
        if done % REPORT_STEPS == 0 or last:
            means = {name: round(sum(values) / len(values), 4) for name, values in sorted(figures.items())}
            entry = {"stage": stage.name, "step": done, "seconds": round(now - begun), **means}
            with open(folder / f"log-{stage.name}.jsonl", "a") as log:
                log.write(json.dumps(entry) + "\n")
            shown = "  ".join(f"{name} {figure:.3f}" for name, figure in means.items())
            print(f"{stage.name} {done}/{steps} {now - begun:.0f} s ({waited:.0f} s waited)  {shown}", flush=True)
            figures.clear()
        if last:
            break
        if now - saved_at > CHECKPOINT_SECONDS:
            state = {"optimiser": optimiser.state_dict(), "step": done, "seconds": now - begun}
            weights = _weights(stage, pupil)
            _save({"weights": weights, **state}, checkpoint)
            if copies:
                _save(_halved(weights), copies / f"{stage.name}.unfinished.pt")
            saved_at = now
    del drawn  # ends the drawing
    weights = _weights(stage, pupil)
    _save(weights, finished)
    if copies:
        _save(_halved(weights), copies / f"{stage.name}.pt")
        (copies / f"{stage.name}.unfinished.pt").unlink(missing_ok=True)
    checkpoint.unlink(missing_ok=True)


def _weights(stage: Stage, pupil: Pupil) -> dict[str, torch.Tensor]:
    """What the stage or one that it needs has trained, on the CPU."""
    trained, todo = set(stage.trained), list(stage.needs)
    while todo:
        earlier = STAGES[todo.pop()]
        trained.update(earlier.trained)
        todo += earlier.needs
    return {name: value.cpu() for name, value in pupil.state_dict().items() if name.startswith(tuple(trained))}


def _halved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}


def _save(what: Any, path: Path) -> None:
    """Whole or not at all: a stop in the middle of writing must not cost the checkpoint before."""
    written = path.with_suffix(".writing")
    torch.save(what, written)
    os.replace(written, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small model that comes with adafv.")
    parser.add_argument("--output", type=Path, default=Path("training/run"))
    parser.add_argument("--stage", choices=STAGES, nargs="+", help="only these, one after the other")
    parser.add_argument("--threads", type=int, help="cores for this stage (default: all, or one where two run)")
    parser.add_argument("--share", type=float, default=1.0, help="share of every stage's steps; below 1 for a trial")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that draw (default: 1), of all stages at a time"
    )
    parser.add_argument("--crops", type=int, help="scenes in a batch for the twin (default: a sixth of the others)")
    parser.add_argument("--seconds", type=float, help="end in this time, with fewer steps where need be")
    parser.add_argument("--copies", type=Path, help="another folder for weights, in half precision, as they are done")
    parser.add_argument(
        "--begun", type=float, help=argparse.SUPPRESS
    )  # by the clock; so that --seconds count from there
    options = parser.parse_args()
    begun = options.begun or time.time()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.stage:
        if options.threads:
            torch.set_num_threads(options.threads)
        # Every tensor of a batch on its way from the drawing takes a file, and there are many.
        files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if most == resource.RLIM_INFINITY or most > OPEN_FILES:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, OPEN_FILES), most))
        for stage in (STAGES[name] for name in options.stage):
            if options.crops and stage.make is lesson:
                stage = dataclasses.replace(stage, make=partial(stage.make, crops=options.crops))
            seconds = None
            if options.seconds:
                rest = begun + options.seconds - time.time() - CLOSING_SECONDS
                seconds = max(1.0, min(SECONDS.get(stage.name, 1.0) * options.seconds, rest))
            train_stage(
                stage,
                options.output,
                max(1, round(stage.steps * options.share)),
                device=options.device,
                workers=options.workers,
                seconds=seconds,
                copies=options.copies,
            )
        return
    for rows in SIDE_BY_SIDE:
        threads = max(1, (os.cpu_count() or 1) // len(rows)) if options.device == "cpu" else 1
        command = [
            *(sys.executable, "-m", "training.train"),
            *("--output", str(options.output), "--share", str(options.share), "--device", options.device),
            *("--begun", str(begun), "--threads", str(threads)),
        ]
        for name in ("crops", "seconds", "copies"):
            if getattr(options, name) is not None:
                command += [f"--{name}", str(getattr(options, name))]
        running = []
        for row in rows:
            # Pictures take far longer to draw than scene text.
            workers = options.workers
            if len(rows) > 1 and workers > 1:
                text = max(1, round(workers * TEXT_WORKERS))
                workers = text if row[0] == "list" else max(1, workers - text)
            running.append(subprocess.Popen([*command, "--workers", str(workers), "--stage", *row]))
        try:
            codes = [process.wait() for process in running]
        except KeyboardInterrupt:
            for process in running:
                process.wait()
            raise SystemExit("stopped; the same command goes on from here") from None
        if any(codes):
            raise SystemExit(f"one of {rows} failed; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    main()
