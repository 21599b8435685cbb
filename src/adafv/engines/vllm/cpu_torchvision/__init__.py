"""A folder for PYTHONPATH where torchvision and torch were built for different machines.

vLLM and transformers import torchvision. Package registries may have it for CUDA alone, whose compiled part does not load
beside a CPU build of torch, and then nothing of it can be imported: "operator torchvision::nms does not exist". What vLLM
uses of it, resizing and normalising images, is written in Python over torch's own operators and needs no compiled part.

So the folder holds a module `torchvision` that declares the names that the import misses, and then loads the installed
torchvision in its own place. As a folder of the path rather than a module to be imported first, because vLLM starts
processes of its own; and only there, so no other program and no other import sees it. `adafv serve` puts it there where
it is needed, and says so.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parent

MISSES_COMPILED_PART = "operator torchvision::"
"""How the error begins with which such a torchvision fails to be imported."""


def import_error() -> str | None:
    """Why the installed torchvision cannot be imported here; None: it can, or there is none."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # of compiled parts that do not fit, errors of many kinds
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None


def load() -> None:
    """Import the installed torchvision without its compiled part, in this process."""
    sys.path.insert(0, str(FOLDER))
    try:
        importlib.import_module("torchvision")
    finally:
        sys.path.remove(str(FOLDER))
