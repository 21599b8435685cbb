"""Checkpoints on disk, as vLLM wants them."""

import shutil
from pathlib import Path

from engines import BUNDLED


def bundled(name: str, folder: Path) -> Path:
    """The trained model that comes with adafv, "llava" or "llava-next", in a folder of its own.

    vLLM reads no weights from beside a checkpoint's folder, where the second has most of its own.
    """
    if name == "llava":
        return BUNDLED / name
    target = folder / name
    if not target.exists():
        shutil.copytree(BUNDLED / name, target)
        shutil.copy(BUNDLED / "llava/model.safetensors", target)
        (target / "model.safetensors.index.json").unlink()
    return target
