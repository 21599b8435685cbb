"""Train the small model, from nothing, on this machine.

    python -m training.train                  # everything, into training/run
    python -m training.train --stage together # one stage, from the stages before it

Stages that do not need each other run side by side, on one core each. Stop at any time and start again with the same
command: every stage goes on from its last checkpoint, and batches are the same as without the stop. The log of losses
and of right answers is `log-STAGE.jsonl`; `python -m training.curves` draws it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from training.batches import batches
from training.optimiser import Optimiser
from training.stages import STAGES, Pupil, Stage

SIDE_BY_SIDE = ((("tower",), ("list", "grid")), (("projector", "together"),))
"""Stages after one another; in each, rows of stages that run at the same time."""
CHECKPOINT_SECONDS = 120
REPORT_STEPS = 25


def train_stage(stage: Stage, folder: Path, steps: int) -> None:
    """Run a stage to its end; go on from its checkpoint where there is one."""
    finished, checkpoint = folder / f"{stage.name}.pt", folder / f"{stage.name}.checkpoint.pt"
    if finished.exists():
        print(f"{stage.name}: done before", flush=True)
        return
    pupil = Pupil()
    for earlier in stage.needs:
        pupil.load_state_dict(torch.load(folder / f"{earlier}.pt", weights_only=True), strict=False)
    optimiser = Optimiser(
        stage.parameters(pupil),
        steps=steps,
        matrix_rate=stage.rate,
        other_rate=stage.other_rate,
        position_rate=stage.position_rate,
    )
    first, spent = 0, 0.0
    if not checkpoint.exists():
        stage.prepare(pupil)
    else:
        saved = torch.load(checkpoint, weights_only=True)
        pupil.load_state_dict(saved["weights"], strict=False)
        optimiser.load_state_dict(saved["optimiser"])
        first, spent = saved["step"], saved["seconds"]
        print(f"{stage.name}: going on from step {first}", flush=True)

    begun = saved_at = time.monotonic() - spent
    figures: dict[str, list[float]] = defaultdict(list)
    for step, batch in enumerate(batches(stage.make, size=stage.size, count=steps, first=first), first):
        with torch.autocast("cpu", torch.bfloat16):
            outcome = stage.learn(pupil, batch)
        outcome.loss.backward()
        optimiser.step(step)
        for name, figure in outcome.figures.items():
            figures[name].append(figure)
        done, now = step + 1, time.monotonic()
        if done % REPORT_STEPS == 0 or done == steps:
            means = {name: round(sum(values) / len(values), 4) for name, values in sorted(figures.items())}
            entry = {"stage": stage.name, "step": done, "seconds": round(now - begun), **means}
            with open(folder / f"log-{stage.name}.jsonl", "a") as log:
                log.write(json.dumps(entry) + "\n")
            shown = "  ".join(f"{name} {figure:.3f}" for name, figure in means.items())
            print(f"{stage.name} {done}/{steps} {now - begun:.0f} s  {shown}", flush=True)
            figures.clear()
        if now - saved_at > CHECKPOINT_SECONDS and done < steps:
            state = {"optimiser": optimiser.state_dict(), "step": done, "seconds": now - begun}
            _save({"weights": _weights(stage, pupil), **state}, checkpoint)
            saved_at = now
    _save(_weights(stage, pupil), finished)
    checkpoint.unlink(missing_ok=True)


def _weights(stage: Stage, pupil: Pupil) -> dict[str, torch.Tensor]:
    """What the stage or one that it needs has trained."""
    trained, todo = set(stage.trained), list(stage.needs)
    while todo:
        earlier = STAGES[todo.pop()]
        trained.update(earlier.trained)
        todo += earlier.needs
    return {name: value for name, value in pupil.state_dict().items() if name.startswith(tuple(trained))}


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
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.stage:
        if options.threads:
            torch.set_num_threads(options.threads)
        for stage in (STAGES[name] for name in options.stage):
            train_stage(stage, options.output, max(1, round(stage.steps * options.share)))
        return
    for rows in SIDE_BY_SIDE:
        threads = max(1, (os.cpu_count() or 1) // len(rows))
        command = [
            sys.executable,
            "-m",
            "training.train",
            "--output",
            str(options.output),
            "--share",
            str(options.share),
        ]
        running = [subprocess.Popen([*command, "--threads", str(threads), "--stage", *row]) for row in rows]
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
