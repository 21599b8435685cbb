"""Twelve deliberate faults, one at a time in a copy of src/, and the tests that catch them.

    python tests/faults.py                      # each fault against the files named with it
    python tests/faults.py --only cache-length  # one of them
    python tests/faults.py -- tests/test_oracle.py -n 2   # all against what is named here

It is no test (no pytest file), but the proof that a smaller selection of tests still notices. A fault that nothing catches,
or whose text is not in src/ any more, ends the run with a status of 1.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Fault:
    name: str
    old: str
    """Text that occurs in one file of src/, whatever its spaces and line breaks."""
    new: str
    tests: str
    """Arguments of pytest: where it is to be caught."""
    times: int = 1
    """How often the text is there, in one file: all of it is changed."""


FAULTS = [
    Fault(
        "position",
        "return reached - total, total",
        "return reached - total + 1, total",
        "tests/test_oracle.py -k 'qwen2-vl and turn'",
    ),
    Fault(
        "text-mask",
        "attention.masked_fill(~text_mask.unsqueeze(-1), 0.0)",
        "attention.masked_fill(~text_mask.unsqueeze(-1) & False, 0.0)",
        "tests/test_core.py -k text_attention",
        times=2,
    ),
    Fault(
        "layer",
        "return self.deepest, signal.kind",
        "return self.deepest - 1, signal.kind",
        "tests/test_families.py -k 'class_row or feature_layers'",
    ),
    Fault(
        "rounding",
        "math.floor(self.keep * available + 0.5)",
        "math.floor(self.keep * available)",
        "tests/test_budget.py -k rounded",
    ),
    Fault(
        "labels",
        "return values.gather(1, behind.clamp_min(0))",
        "return values.gather(1, columns.clamp_min(0))",
        "tests/test_ways_of_calling.py -k losses",
    ),
    Fault(
        "cache-length",
        "int(cache.get_seq_length())",
        "int(cache.get_seq_length()) + 1",
        "tests/test_oracle.py -k second_turn",
    ),
    Fault(
        "row",
        "lambda rows: rows.repeat_interleave(repeats)",
        "lambda rows: rows.repeat(repeats)",
        "tests/test_ways_of_calling.py -k several_answers",
    ),
    Fault(
        "precision",
        "logits = (query[..., :1, :].float() @ key.float().transpose(-1, -2)) * scaling",
        "logits = (query[..., :1, :] @ key.transpose(-1, -2)) * scaling",
        "tests/test_core.py -k half_precision",
    ),
    Fault("streaming", "value = self._restorer.restore(value)", "pass", "tests/test_modes.py -k streaming"),
    Fault(
        "deepstack",
        "deepstack = take(kept, _stack([images[i].encoded.deepstack for i in members]))",
        "deepstack = take(replace(kept, indices=kept.indices.flip(-1)), "
        "_stack([images[i].encoded.deepstack for i in members]))",
        "tests/test_oracle.py -k 'qwen3-vl and test_forward'",
    ),
    Fault(
        "stopping",
        "return wrapped(restorer.restore(input_ids), scores",
        "return wrapped(input_ids, scores",
        "tests/test_modes.py -k hooks_see",
    ),
    Fault("vllm-key", "self.budget.key, self.text", "self.text", "tests/test_vllm_request.py"),
]


def apply(fault: Fault, source: Path) -> Path:
    """Puts the fault into the one file that has its text, and returns that file."""
    pattern = re.compile(r"\s+".join(map(re.escape, fault.old.split())))
    hits = [(path, match) for path in source.rglob("*.py") for match in pattern.finditer(path.read_text())]
    if len(hits) != fault.times or len({path for path, _ in hits}) != 1:
        raise SystemExit(f"{fault.name}: its text occurs {len(hits)} times in src/, not {fault.times}; write it anew")
    path, _ = hits[0]
    path.write_text(pattern.sub(lambda _: fault.new, path.read_text()))
    compile(path.read_text(), str(path), "exec")
    return path.relative_to(source)


def caught_by(fault: Fault, tests: list[str]) -> tuple[str | None, str]:
    """(the first test that fails, None where none does; the last line of pytest)."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        place = apply(fault, source)
        print(f"{fault.name} in {place}", flush=True)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *tests]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(ROOT)])}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{fault.name}: pytest could not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - |$)", done.stdout, re.MULTILINE)
    return (failed[1] if failed else None), done.stdout.strip().splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[fault.name for fault in FAULTS])
    parser.add_argument("--check", action="store_true", help="only whether each text is there")
    parser.add_argument("tests", nargs="*", help="arguments of pytest, in the place of those of each fault")
    options = parser.parse_args()
    missed = []
    for fault in FAULTS:
        if options.only and fault.name not in options.only:
            continue
        if options.check:
            with tempfile.TemporaryDirectory() as folder:
                shutil.copytree(ROOT / "src", Path(folder) / "src")
                print(f"{fault.name}: {apply(fault, Path(folder) / 'src')}")
            continue
        start = time.monotonic()
        arguments = shlex.split(fault.tests)
        test, last = caught_by(fault, options.tests or arguments)
        print(f"  {test or 'NOT CAUGHT'} ({time.monotonic() - start:.0f} s; {last})", flush=True)
        missed += [] if test else [fault.name]
    if missed:
        print(f"caught by nothing: {', '.join(missed)}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
