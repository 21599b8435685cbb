"""adafv: keep the visual tokens that matter for the question (AdaFV, arXiv 2501.09532), on stock models.

    from adafv import AdaFV

    with AdaFV(keep=64)(model) as adafv:
        output = model.generate(**inputs)
    print(adafv.last.kept)

The pure functions are in `adafv.core`; methods in `adafv.methods`; engines, which put them to
work, in `adafv.engines`.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adafv.core.budget import Budget
    from adafv.engines.transformers import (
        AdaFV,
        CompressedInputs,
        EncodedImages,
        ImageRecord,
        ImageStore,
        Pruner,
        Record,
        compress,
        encode,
    )
    from adafv.errors import AdaFVError
    from adafv.methods import Kept, Method, Plan, VisualTokens

try:
    __version__ = version("adafv")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

# torch and transformers take seconds to import; `adafv --help` and the pure functions shall not wait for both.
_HOMES = {
    "AdaFV": "adafv.engines.transformers",
    "AdaFVError": "adafv.errors",
    "Budget": "adafv.core.budget",
    "CompressedInputs": "adafv.engines.transformers",
    "EncodedImages": "adafv.engines.transformers",
    "ImageRecord": "adafv.engines.transformers",
    "ImageStore": "adafv.engines.transformers",
    "Kept": "adafv.methods",
    "Method": "adafv.methods",
    "Plan": "adafv.methods",
    "Pruner": "adafv.engines.transformers",
    "Record": "adafv.engines.transformers",
    "VisualTokens": "adafv.methods",
    "compress": "adafv.engines.transformers",
    "encode": "adafv.engines.transformers",
}

__all__ = [
    "AdaFV",
    "AdaFVError",
    "Budget",
    "CompressedInputs",
    "EncodedImages",
    "ImageRecord",
    "ImageStore",
    "Kept",
    "Method",
    "Plan",
    "Pruner",
    "Record",
    "VisualTokens",
    "compress",
    "encode",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
