"""What only a GPU can say, in one script: `make gpu`, or `PYTHONPATH=src python tests/gpu.py --output FOLDER`.

Needs torch with CUDA and transformers; where pytest is, the tests that ask for CUDA run beside the first parts. Parts, by
worth: the oracle (pruned equals the stock model with the dropped placeholders masked), waits for the device, what methods
cost, `bench speed` at true 7B shapes. A part that fails is reported and the rest goes on; results are written after every
part, to gpu.json and gpu.md. Exit status: 0 all is well, 1 something failed, 3 there is no CUDA.

`--rehearse` runs all of it on the CPU with tiny shapes, to try the script itself.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "src")]

import torch  # noqa: E402

NO_CUDA = 3
FAMILIES = ("llava", "llava-next", "qwen2.5-vl")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FLOAT32_TOLERANCE = 1e-4
"""Of logits of up to 10. Kernels for masked and for causal attention add up in another order."""
ROUGH = 2.0
"""How far from the oracle, in units of the oracle's own distance from itself in float32. Two roundings that know nothing of
each other are 1.4 apart."""
KEEP = 0.3
BESIDE = ("facet",)
"""Methods that are measured inside whole calls, beside AdaFV."""


@dataclass
class Part:
    """A part of the script."""

    name: str
    run: Callable[[], Any]
    expected: float
    """Seconds that it may take; it is left out where less is left."""


class Script:
    """Runs parts, and writes what they said."""

    def __init__(self, device: torch.device, output: Path, seconds: float, rehearse: bool) -> None:
        self.device, self.output, self.rehearse = device, output, rehearse
        self.started, self.allowed = time.monotonic(), seconds
        self.result: dict[str, Any] = {
            "schema": "adafv.gpu/1",
            "machine": {},
            "oracle": [],
            "waits": {},
            "methods": [],
            "models": [],
            "suite": None,
            "failed": [],
            "left_out": [],
            "seconds": {},
        }

    @property
    def left(self) -> float:
        return self.allowed - (time.monotonic() - self.started)

    def run(self, parts: list[Part]) -> None:
        for part in parts:
            if self.left < part.expected:
                self.result["left_out"].append(part.name)
                print(f"{part.name}: left out, {self.left:.0f} s are left", flush=True)
                self.write()
                continue
            begun = time.monotonic()
            try:
                part.run()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
            except BaseException as error:
                self.result["failed"].append({"part": part.name, "traceback": traceback.format_exc()})
                print(f"{part.name}: FAILED: {type(error).__name__}: {error}", flush=True)
                if isinstance(error, KeyboardInterrupt):
                    raise
            lasted = self.result["seconds"][part.name] = round(time.monotonic() - begun, 1)
            print(f"{part.name}: {lasted} s", flush=True)
            gc.collect()
            if self.device.type == "cuda":
                with contextlib.suppress(Exception):
                    torch.cuda.empty_cache()
            self.write()

    def write(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        scratch = self.output / "gpu.json.part"
        scratch.write_text(json.dumps(self.result, indent=1) + "\n")
        scratch.replace(self.output / "gpu.json")
        with contextlib.suppress(Exception):
            (self.output / "gpu.md").write_text(self.text() + "\n")

    def text(self) -> str:
        from adafv.evaluation.speed.report import as_tables, table

        found = self.result
        rows = [
            [
                *(row["case"].get(name, "") for name in ("family", "dtype", "attention", "what")),
                *(
                    "" if row[name] is None else f"{row[name]:.2g}"
                    for name in ("difference", "allowed", "reordering", "to_unpruned")
                ),
                str(row["same_tokens"]),
                "ok" if row["passed"] else "FAILED",
            ]
            for row in found["oracle"]
        ]
        heads = (
            "model",
            "dtype",
            "attention",
            "what",
            "rms to oracle",
            "allowed",
            "stock reordered",
            "rms to unpruned",
        )
        parts = [table((*heads, "same tokens", ""), rows)] if rows else []
        parts += [f"waits: {json.dumps(found['waits'])}", f"tests on CUDA: {found['suite']}"]
        if found["machine"]:
            parts.insert(0, as_tables(found))
        return "\n\n".join([*parts, f"left out: {found['left_out']}", f"seconds: {found['seconds']}"])


# The oracle ----------------------------------------------------------------------------------------------------------


def moved(inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def attentions() -> list[str]:
    flash = ["flash_attention_2"] if importlib.util.find_spec("flash_attn") else []
    return ["sdpa", "eager", *flash]


@torch.no_grad()
def oracle_of_family(script: Script, name: str) -> None:
    """Small models of the stock classes, two prompts, padded: logits and tokens against the masked stock model."""
    from models import FAMILIES as ROWS
    from models import make_inputs
    from oracle import kept_logits, masked_inputs

    from adafv import AdaFV

    [row] = [row for row in ROWS if row.name == name]
    exact = row.build()
    plain = make_inputs(row, exact, [1, 1])  # asks the model how many tokens an image has: on the CPU
    exact.to(script.device)
    for attention in attentions():
        for kind, dtype in DTYPES.items():
            if attention.startswith("flash") and kind == "float32":
                continue
            model = row.build().to(script.device, dtype)
            model.set_attn_implementation(attention)
            inputs = moved(plain, script.device, dtype)
            with AdaFV(keep=KEEP)(model) as handle:
                pruned = model(**inputs).logits
            mask = handle.last.keep_mask
            oracle = masked_inputs(inputs, mask, row=row, model=model)
            expected, full = model(**oracle).logits, model(**inputs).logits
            true = exact(**moved(oracle, script.device, torch.float32)).logits
            again = reordered(model, oracle)
            mine, theirs, best, other, all_of_it = (
                torch.cat(kept_logits(logits.float(), oracle["attention_mask"]))
                for logits in (pruned, expected, true, again, full)
            )
            greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
            with AdaFV(keep=KEEP)(model):
                answer = model.generate(**inputs, **greedy)
            target = model.generate(**masked_inputs(inputs, mask, row=row, model=model, generates=True), **greedy)
            allowed = ROUGH * rms(theirs - best)
            if kind == "float32":
                allowed = FLOAT32_TOLERANCE * max(1.0, float(theirs.abs().max()) / 10)
            noted(
                script,
                {"family": name, "dtype": kind, "attention": attention, "what": "small"},
                difference=float((mine - theirs).abs().max()) if kind == "float32" else rms(mine - theirs),
                allowed=allowed,
                reordering=rms(theirs - other),
                to_unpruned=rms(mine - all_of_it),
                same_tokens=torch.equal(answer, target),
                must_agree=kind == "float32",
            )


def reordered(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The stock model's logits for each prompt of a batch on its own: the same sums, in kernels of other sizes."""
    half = len(inputs["input_ids"]) // 2
    if half != 1 or "pixel_values" not in inputs:
        return model(**inputs).logits  # type: ignore[no-any-return]
    parts = []
    for number in range(2):
        own = {}
        for name, value in inputs.items():
            if name == "position_ids" and value.dim() == 3:
                own[name] = value[:, number : number + 1]
            elif name == "pixel_values" and "image_grid_thw" in inputs:
                own[name] = value.split(inputs["image_grid_thw"].prod(-1).tolist())[number]
            else:
                own[name] = value[number : number + 1]
        parts.append(model(**own).logits)
    return torch.cat(parts)


def noted(
    script: Script,
    case: dict[str, Any],
    *,
    difference: float,
    allowed: float,
    reordering: float | None,
    to_unpruned: float,
    same_tokens: bool,
    must_agree: bool,
    clear: float = 5.0,
) -> None:
    # Were the model blind to its image, or the mask not heeded, the comparison could not fail.
    passed = difference <= allowed and to_unpruned > clear * allowed and (same_tokens or not must_agree)
    script.result["oracle"].append(
        {
            "case": case,
            "difference": difference,
            "allowed": allowed,
            "reordering": reordering,
            "to_unpruned": to_unpruned,
            "same_tokens": same_tokens,
            "passed": passed,
        }
    )
    if not passed:
        script.result["failed"].append(
            {"part": f"oracle {case}", "traceback": f"AssertionError: {script.result['oracle'][-1]}"}
        )


@torch.no_grad()
def oracle_of_bundled(script: Script) -> None:
    """The trained model that comes along, on its pictures: greedy answers, token by token."""
    from oracle import masked_inputs
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from adafv import AdaFV
    from adafv.bundled import bundled_model, sample_pictures
    from adafv.evaluation.speed.shapes import opened

    kinds = {"float32": torch.float32} if script.rehearse else DTYPES
    for name in ("llava", "llava-next"):
        folder = bundled_model(name)
        processor = AutoProcessor.from_pretrained(folder)
        exact = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().to(script.device)
        for kind, dtype in kinds.items():
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval().to(script.device)
            same, mine, theirs, best, full = [], [], [], [], []
            for picture in sample_pictures()[: 1 if script.rehearse else None]:
                content = [{"type": "image"}, {"type": "text", "text": "What color is the banana?"}]
                text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
                given = processor(images=[opened(picture)], text=[text], return_tensors="pt")
                inputs = moved(dict(given), script.device, dtype)
                with AdaFV(keep="10%")(model) as handle:
                    mine.append(model(**inputs).logits[:, -1].float())
                    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
                oracle = masked_inputs(inputs, handle.last.keep_mask)
                theirs.append(model(**oracle).logits[:, -1].float())
                best.append(exact(**moved(oracle, script.device, torch.float32)).logits[:, -1])
                full.append(model(**inputs).logits[:, -1].float())
                same.append(torch.equal(answer, model.generate(**oracle, max_new_tokens=8, do_sample=False)))
            of_all = torch.cat(mine) - torch.cat(theirs)
            allowed = ROUGH * rms(torch.cat(theirs) - torch.cat(best))
            if kind == "float32":
                allowed = FLOAT32_TOLERANCE * max(1.0, float(torch.cat(theirs).abs().max()) / 10)
            noted(
                script,
                {
                    "family": f"bundled {name}",
                    "dtype": kind,
                    "attention": "sdpa",
                    "what": f"{sum(same)} of {len(same)}",
                },
                difference=float(of_all.abs().max()) if kind == "float32" else rms(of_all),
                allowed=allowed,
                reordering=None,
                to_unpruned=rms(torch.cat(mine) - torch.cat(full)),
                same_tokens=all(same),
                must_agree=kind == "float32",
                clear=1.0,
            )


# Waits ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def nothing_waits(script: Script) -> None:
    """Scores and selection with PyTorch told to raise where the host would wait; and the same choice as on the host."""
    from adafv.core import joint_search, text_to_image_attention

    device, cuda = script.device, script.device.type == "cuda"
    for tokens, keep in ((576, 1), (576, 3), (576, 58), (2928, 144), (2928, 640)):
        text = torch.randn(4, 20, 64, device=device, dtype=torch.bfloat16)
        visual = torch.randn(4, tokens, 64, device=device, dtype=torch.bfloat16)
        saliency = torch.rand(4, tokens, device=device)
        shown, counted = saliency > 0.1, torch.ones(4, 20, dtype=torch.bool, device=device)
        joint_search(text_to_image_attention(text, visual, counted, shown), saliency, keep, shown)  # loads kernels
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            attention = text_to_image_attention(text, visual, counted, shown)
            found = joint_search(attention, saliency, keep, shown)
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode(0)
        assert bool((found.indices.diff(dim=-1) > 0).all())
        there = joint_search(attention.cpu(), saliency.cpu(), keep, shown.cpu())
        torch.testing.assert_close(found.objective.cpu(), there.objective, rtol=1e-4, atol=0)
    script.result["waits"]["scores and selection"] = 0


@torch.no_grad()
def waits_of_calls(script: Script, name: str) -> None:
    """Of `compress` on encoded images, and of whole calls."""
    from models import FAMILIES as ROWS
    from models import make_inputs

    from adafv import AdaFV, compress, encode
    from adafv.evaluation.speed.counting import counted_waits
    from adafv.evaluation.speed.stages import Stages, listening

    if script.device.type != "cuda":
        return
    [row] = [row for row in ROWS if row.name == name]
    model = row.build()
    plain = make_inputs(row, model, [1])
    model.to(script.device)
    inputs = moved(plain, script.device, torch.float32)
    asked = {each: value for each, value in plain.items() if each.startswith("image")}  # sizes, said on the host
    asked = {**inputs, "images": encode(model, inputs), **asked}
    asked.pop("pixel_values")

    def compressed() -> None:
        compress(model, asked, KEEP)

    def forward() -> None:
        with AdaFV(keep=KEEP)(model):
            model(**inputs)

    def stock() -> None:
        model(**inputs)

    found = script.result["waits"][name] = {}
    for what, run in (("compress, encoded", compressed), ("forward", forward), ("stock forward", stock)):
        run()
        torch.cuda.synchronize()
        heard: dict[str, int] = {}
        stages = Stages()
        with listening(stages), counted_waits(stages, heard):
            run()
        found[what] = heard
    assert sum(found["compress, encoded"].values()) <= 1, found


# Speed ---------------------------------------------------------------------------------------------------------------


def methods_cost(script: Script, batch: int, names: tuple[str, ...] = ()) -> None:
    from adafv.evaluation.speed.choosing import SIZES, measure_methods

    sizes = ((24, 6),) if script.rehearse else SIZES
    limit = min(50.0, max(5.0, script.left - 60))
    found = measure_methods(names, script.device, sizes, batch, rounds=2 if script.rehearse else 10, limit=limit)
    script.result["methods"].append(found)


def speed(
    script: Script,
    name: str,
    budgets: tuple[int, ...],
    batches: tuple[int, ...],
    limit: float,
    old_search: bool = False,
) -> None:
    from adafv.evaluation.speed.run import Options, measure
    from adafv.evaluation.speed.shapes import subject
    from adafv.methods import known_methods, method_named

    if script.rehearse:
        name, budgets = "-".join([*name.split("-")[:-1], "tiny"]).replace("-1.5", ""), (16, 8)
    built = subject(name, script.device, "bfloat16")
    beside: list[Any] = [name for name in BESIDE if name in known_methods()]
    if old_search:
        beside.append(method_named("adafv", objective="frank-wolfe"))
    for batch in batches:
        if batch > 1 and script.left < 15:
            script.result["left_out"].append(f"{name}, batch {batch}")
            continue
        rounds, decode = (2, 2) if script.rehearse else (15, 8)
        options = Options(budgets, beside, batch=batch, rounds=rounds, warm=2, decode=decode, limit=limit)
        script.result["models"].append(measure(built, options))
        script.write()
    if batches == (1,):
        whole_oracle(script, built, budgets[-1])


@torch.no_grad()
def whole_oracle(script: Script, built: Any, keep: int) -> None:
    """The oracle at the true shape, in the precision that is served and in float32, which the model is left in. Positions of
    Qwen are checked on small models."""
    from oracle import masked_inputs

    from adafv import AdaFV

    if "image_grid_thw" in built.inputs():
        return
    model, inputs = built.model, built.inputs(2)
    with AdaFV(keep=keep)(model) as handle:
        pruned = model(**inputs, logits_to_keep=1).logits.float()
    oracle = masked_inputs(inputs, handle.last.keep_mask)
    expected = model(**oracle, logits_to_keep=1).logits.float()
    model.float()
    inputs, oracle = (moved(each, script.device, torch.float32) for each in (inputs, oracle))
    best, full = (model(**each, logits_to_keep=1).logits for each in (oracle, inputs))
    case = {"family": built.name, "attention": "sdpa", "what": "true shape"}
    noted(
        script,
        {**case, "dtype": "bfloat16"},
        difference=rms(pruned - expected),
        allowed=ROUGH * rms(expected - best),
        reordering=None,
        to_unpruned=rms(best - full),
        same_tokens=torch.equal(pruned.argmax(-1), expected.argmax(-1)),
        must_agree=False,
        clear=0.0,  # random weights look at hundreds of tokens alike; in float32 the difference is plain
    )
    with AdaFV(keep=keep)(model) as handle:
        pruned = model(**inputs, logits_to_keep=1).logits
    best = model(**masked_inputs(inputs, handle.last.keep_mask), logits_to_keep=1).logits
    noted(
        script,
        {**case, "dtype": "float32"},
        difference=float((pruned - best).abs().max()),
        allowed=FLOAT32_TOLERANCE * max(1.0, float(best.abs().max()) / 10),
        reordering=None,
        to_unpruned=rms(pruned - full),
        same_tokens=torch.equal(pruned.argmax(-1), best.argmax(-1)),
        must_agree=True,
    )


# The suite -----------------------------------------------------------------------------------------------------------


class Suite:
    """The tests that ask for CUDA, in a process of their own beside the parts that measure no time."""

    ARGUMENTS = (
        "tests/test_operations.py",
        "tests/test_operations_of_a_call.py",
        "-k",
        "gpu",
        "-q",
        "-rs",
        "--tb=short",
    )

    def __init__(self, script: Script, least: float) -> None:
        self.script, self.until, self.process, self.log = script, time.monotonic() + least, None, None
        if importlib.util.find_spec("pytest") is None:
            script.result["suite"] = "pytest is not installed"
            return
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), *filter(None, sys.path[2:])]),
        }
        script.output.mkdir(parents=True, exist_ok=True)
        self.log = (script.output / "suite.txt").open("w")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *self.ARGUMENTS]
        self.process = subprocess.Popen(
            command, cwd=TESTS.parent, env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )

    def wait(self) -> None:
        """Until it is done, or its time is over: nothing else may run where time is measured."""
        if self.process is None or self.log is None:
            return
        try:
            code: Any = self.process.wait(max(1.0, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = "stopped, for time"
        self.log.close()
        lines = (self.script.output / "suite.txt").read_text().strip().splitlines()
        self.script.result["suite"] = {"exit": code, "last": lines[-1] if lines else ""}
        if code not in (0, "stopped, for time"):
            raise AssertionError("\n".join(lines[-30:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--seconds", type=float, default=450, help="parts that do not fit are left out")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("PyTorch finds no CUDA here, so nothing was measured; --rehearse tries the script on the CPU")
        return NO_CUDA
    device = torch.device("cpu" if options.rehearse else "cuda:0")
    torch.backends.cudnn.allow_tf32 = False
    warnings.simplefilter("ignore")
    script = Script(device, options.output, options.seconds, options.rehearse)
    suite = Suite(script, least=min(100.0, options.seconds / 2))

    def facts() -> None:
        from adafv.evaluation.speed.report import machine

        script.result["machine"] = machine(device)

    script.run(
        [
            Part("machine", facts, 0),
            *(Part(f"oracle {name}", lambda name=name: oracle_of_family(script, name), 5) for name in FAMILIES),
            Part("oracle bundled", lambda: oracle_of_bundled(script), 5),
            Part("nothing waits", lambda: nothing_waits(script), 2),
            *(Part(f"waits of {name}", lambda name=name: waits_of_calls(script, name), 3) for name in FAMILIES),
            Part("tests on CUDA", suite.wait, 0),
            Part("llava-1.5-7b", lambda: speed(script, "llava-1.5-7b", (192, 58), (1,), 25, old_search=True), 20),
            Part("llava-next-7b", lambda: speed(script, "llava-next-7b", (320, 144), (1,), 25, old_search=True), 25),
            Part("methods", lambda: methods_cost(script, 1), 25),
            Part("qwen2.5-vl-7b", lambda: speed(script, "qwen2.5-vl-7b", (130,), (1,), 20), 20),
            Part("llava-1.5-7b, batch 8", lambda: speed(script, "llava-1.5-7b", (58,), (8,), 15), 20),
            Part("llava-next-7b, batch 8", lambda: speed(script, "llava-next-7b", (144,), (8,), 15), 30),
            Part("adafv, batch 8", lambda: methods_cost(script, 8, ("adafv",)), 10),
        ]
    )
    print(script.text())
    return 1 if script.result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
