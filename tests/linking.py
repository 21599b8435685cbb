"""Packages of the environment that runs this, in another one of the same Python: as links, without installing them again.

    python tests/linking.py ENVIRONMENT PACKAGE ...

For whatever looks there, pip included, they are installed. What is compiled of them is shared, too.
"""

import sys
from importlib.metadata import distribution
from pathlib import Path


def link(name: str, site: Path) -> list[str]:
    """Link to a package from a folder of packages, without what it needs and without its commands.

    Returns:
        What is there already, in which case nothing is linked.
    """
    found = distribution(name)
    assert found.files is not None
    folder = Path(str(found.locate_file("")))
    parts = {path.parts[0] for path in found.files} - {"..", "__pycache__"}
    there = sorted(part for part in parts if (site / part).exists())
    if not there:
        for part in parts:
            (site / part).symlink_to(folder / part)
    return there


def main(environment: str, *names: str) -> None:
    """Link to all of them; links that an earlier call left are made anew."""
    site = Path(environment) / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
    for path in site.iterdir():
        if path.is_symlink():
            path.unlink()
    for name in names:
        if there := link(name, site):
            sys.exit(f"{name}: {environment} has a {there[0]} of its own")


if __name__ == "__main__":
    main(*sys.argv[1:])
