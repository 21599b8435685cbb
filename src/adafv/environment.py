"""What a bug report needs to know of a machine: releases, devices, and which models this transformers has.

Nothing that is the user's own: no path, no name of a user or machine, no environment variable. So errors are named by
their kind alone, as their texts speak of files.
"""

import importlib.util
import os
import platform
import warnings
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from adafv.errors import VersionError

PACKAGES = (
    "pillow",
    "accelerate",
    "gradio",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "torchvision",
    "bitsandbytes",
    "peft",
    "torchao",
)
"""Whose releases matter beside those of torch, transformers and vLLM."""

Facts = dict[str, Any]


def environment() -> Facts:
    """All of it, as JSON has it. Whatever is missing or broken is said in its place; this never raises."""
    return {
        "adafv": _release("adafv"),
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "system": _system(),
        "torch": _found("torch", _torch),
        "transformers": _found("transformers", _transformers),
        "families": _or_problem(_families),
        "methods": _or_problem(_methods),
        "packages": {name: _release(name) for name in PACKAGES},
        "vllm": _or_problem(_vllm),
    }


def as_text(facts: Facts) -> str:
    """The same for people, one fact a line."""
    system, torch, transformers = facts["system"], facts["torch"], facts["transformers"]
    memory = "" if system["memory_gib"] is None else f", {system['memory_gib']} GiB of memory"
    python = facts["python"]
    rows = {
        "adafv": facts["adafv"] or "not installed, running from its source",
        "Python": f"{python['version']} ({python['implementation']})",
        "system": f"{system['name']} {system['release']}, {system['machine']}, {system['cpus']} CPUs{memory}",
        "torch": _torch_as_text(torch),
        "devices": ", ".join((torch or {}).get("devices", [])) or "unknown",
        "transformers": _transformers_as_text(transformers),
        **_families_as_text(facts["families"]),
        **_methods_as_text(facts["methods"]),
        **{name: release or "not installed" for name, release in facts["packages"].items()},
        "vLLM": _vllm_as_text(facts["vllm"]),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def _release(distribution: str) -> str | None:
    try:
        return str(version(distribution))
    except Exception:  # missing, or metadata that somebody damaged
        return None


def _or_problem(facts: Callable[[], Any]) -> Any:
    """What `facts` says, or why it cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return facts()
    except VersionError as error:  # our own words
        return {"problem": str(error)}
    except Exception as error:
        missing = f" ({error.name})" if isinstance(error, ModuleNotFoundError) else ""
        return {"problem": f"{type(error).__name__}{missing}"}


def _found(distribution: str, more: Callable[[], Facts]) -> Facts | None:
    release = _release(distribution)
    return None if release is None else {"version": release, **_or_problem(more)}


def _system() -> Facts:
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # Windows has none of it
        memory = None
    return {
        "name": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "memory_gib": memory,
    }


def _torch() -> Facts:
    import torch

    devices = ["cpu"]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        devices.append(f"cuda:{number} ({properties.name}, {properties.total_memory / 2**30:.1f} GiB)")
    if not torch.cuda.is_available() and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        devices.append(f"{kind.type if kind else 'another'} ({torch.accelerator.device_count()})")
    return {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": devices,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _transformers() -> Facts:
    from adafv.engines.transformers.releases import NEWEST_TESTED, OLDEST_TESTED

    installed = Version(version("transformers"))
    return {
        "tested": [OLDEST_TESTED, NEWEST_TESTED],
        "in_tested_range": Version(OLDEST_TESTED) <= installed <= Version(NEWEST_TESTED),
    }


def _families() -> Facts:
    import transformers

    from adafv.engines.transformers.families import found_families, known_families

    has = set(dir(transformers))  # hasattr would import every model
    present, absent = [], {}
    for family in known_families():
        lacking = [name for name in family.model_classes if name not in has]
        if lacking:
            absent[family.name] = lacking
        if len(lacking) < len(family.model_classes):
            present.append(family.name)
    return {"present": present, "absent": absent, "broken": [str(broken) for broken in found_families().broken]}


def _methods() -> Facts:
    from adafv.methods import found_methods

    found = found_methods()
    return {"known": list(found.classes), "broken": [str(broken) for broken in found.broken]}


def _vllm() -> Facts | None:
    from adafv.engines.vllm import RELEASES

    builds = packages_distributions().get("vllm", []) if importlib.util.find_spec("vllm") else []
    if not builds:
        return None
    release = version(builds[0])
    return {
        "build": builds[0],
        "version": release,
        "supported": RELEASES,
        "is_supported": SpecifierSet(RELEASES).contains(release, prereleases=True),
    }


def _torch_as_text(facts: Facts | None) -> str:
    if facts is None:
        return "not installed"
    if "problem" in facts:
        return f"{facts['version']}, cannot be imported: {facts['problem']}"
    built = next((f"{name} {facts[name]}" for name in ("cuda", "hip") if facts[name]), "CPUs")
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return f"{facts['version']}, built for {built}, {threads}, {facts['cpu_capability']}"


def _transformers_as_text(facts: Facts | None) -> str:
    if facts is None:
        return "not installed"
    if "problem" in facts:
        return f"{facts['version']}, adafv cannot use it: {facts['problem']}"
    oldest, newest = facts["tested"]
    where = "within" if facts["in_tested_range"] else "OUTSIDE"
    return f"{facts['version']}, {where} what adafv is tested with ({oldest} to {newest})"


def _families_as_text(facts: Facts) -> dict[str, str]:
    if "problem" in facts:
        return {"families": f"unknown: {facts['problem']}"}
    lacking = "; ".join(f"{family} ({', '.join(classes)})" for family, classes in facts["absent"].items())
    rows = {"families": f"{len(facts['present'])} in this transformers: {', '.join(facts['present'])}"}
    rows |= {"lacking": lacking} if lacking else {}
    return rows | ({"families not loaded": "; ".join(facts["broken"])} if facts["broken"] else {})


def _methods_as_text(facts: Facts) -> dict[str, str]:
    if "problem" in facts:
        return {"methods": f"unknown: {facts['problem']}"}
    rows = {"methods": f"{len(facts['known'])}: {', '.join(facts['known'])}"}
    return rows | ({"methods not loaded": "; ".join(facts["broken"])} if facts["broken"] else {})


def _vllm_as_text(facts: Facts | None) -> str:
    if facts is None:
        return "not installed"
    if "problem" in facts:
        return f"unknown: {facts['problem']}"
    where = "supported" if facts["is_supported"] else "NOT supported"
    return f"{facts['version']} ({facts['build']}), {where} ({facts['supported']})"
