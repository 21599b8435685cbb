"""adafv inside vLLM: an out-of-tree plug-in that keeps K visual tokens per image, in every cache and every count.

    adafv serve llava-hf/llava-1.5-7b-hf --keep 64

    vllm serve llava-hf/llava-1.5-7b-hf \\
        --hf-overrides '{"architectures": ["AdaFVLlavaForConditionalGeneration"], "adafv": {"keep": 64}}'

Why it looks like this. vLLM decides the length of a prompt before any tensor exists, in the process that takes requests,
and trusts three caches with it: of processed images, of encoded images, and of the prompt's keys and values. So the
pruning is split where vLLM splits a model. `processor.py`, in the front, writes K placeholders instead of N, and puts
the words that count and the budget into what the caches know an image by. `model.py`, in the worker, runs vLLM's own
tower and projector and selects with the same `adafv.core` and `adafv.methods` as any engine. Both are mixins in front of
vLLM's own classes: nothing of vLLM is patched, and who does not name an AdaFV architecture runs vLLM as it is.

    processor.py    K placeholders, the caches' keys
    model.py        tower, selection, tensor parallelism
    crops.py        some crops of an image alone, the thumbnails first
    tap.py          queries and keys of the tower's layer that the projector reads
    rotary.py       positions in time, height and width of what was kept
    cpu.py          the memory that a server on a CPU takes
    launch.py       the command line of vLLM's server
    cpu_torchvision/  torchvision without its compiled part
    families/       one file per model family: what differs between vLLM's model classes

This package's own module imports neither vLLM nor torch.
"""

import ast
import pkgutil
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from adafv.errors import UnsupportedModelError, VersionError

if TYPE_CHECKING:
    from adafv.core.crops import Crops

PREFIX = "AdaFV"

RELEASES = ">=0.31,<0.34"
"""Of vLLM, whose classes the plug-in extends."""

CHOOSE_CROPS = ("LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration")
"""Stock architectures that see an image as a thumbnail and crops, of which some can be encoded without the others."""


def chooses_crops(architecture: str) -> bool:
    """Whether crops of an image can be chosen from, for a checkpoint of this architecture, stock or pruned."""
    return architecture.removeprefix(PREFIX) in CHOOSE_CROPS


def check_crops(crops: "Crops", architecture: str) -> None:
    """Raise UnsupportedModelError where crops are chosen and the architecture, stock or pruned, cannot."""
    if crops.chosen and not chooses_crops(architecture):
        raise UnsupportedModelError(
            f"crops={str(crops)!r}: {architecture.removeprefix(PREFIX)} does not see an image as a thumbnail and crops, as "
            f'{" and ".join(CHOOSE_CROPS)} do in vLLM; leave crops out, or give crops="all"'
        )


@cache
def architectures() -> dict[str, str]:
    """Architecture of a stock checkpoint -> "module:class" that serves it pruned.

    Read from the source, which is not run: vLLM asks plug-ins not to import models when they are loaded.
    """
    found = {}
    folder = files(f"{__name__}.families")
    for module in pkgutil.iter_modules([str(folder)]):
        source = (folder / f"{module.name}.py").read_text(encoding="utf-8")
        for statement in ast.parse(source).body:
            if isinstance(statement, ast.ClassDef) and statement.name.startswith(PREFIX):
                found[statement.name.removeprefix(PREFIX)] = f"{__name__}.families.{module.name}:{statement.name}"
    return found


def check_release(release: str, build: str = "vllm") -> None:
    """Raise VersionError for a release of vLLM that is not supported; `build` is the distribution that it comes from."""
    from packaging.specifiers import SpecifierSet

    from adafv.extras import install_command

    if not SpecifierSet(RELEASES).contains(release, prereleases=True):
        raise VersionError(
            f"vLLM {release} is installed, but adafv supports {RELEASES}; run: {install_command('vllm', build=build)}"
        )


def register() -> None:
    """Make the architectures known to vLLM; the entry point `vllm.general_plugins`, called in each of its processes.

    Raises:
        VersionError: of vLLM. It logs that and goes on, but knows no AdaFV architecture.
    """
    from vllm import ModelRegistry, __version__

    check_release(__version__)
    for name, home in architectures().items():
        ModelRegistry.register_model(PREFIX + name, home)
