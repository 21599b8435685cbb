"""adafv: keep the visual tokens that matter for the question (AdaFV, arXiv 2501.09532), on stock models.

    from adafv import AdaFV

    with AdaFV(keep=64)(model) as adafv:
        output = model.generate(**inputs)
    print(adafv.last.kept)

The pure functions are in `adafv.core`; methods in `adafv.methods`, model families in `adafv.families`.
"""

from importlib.metadata import PackageNotFoundError, version

from adafv.engines.transformers import AdaFV, CompressedInputs, Pruner, Record, compress
from adafv.errors import AdaFVError
from adafv.methods import Kept, Method, VisualTokens

try:
    __version__ = version("adafv")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "AdaFV",
    "AdaFVError",
    "CompressedInputs",
    "Kept",
    "Method",
    "Pruner",
    "Record",
    "VisualTokens",
    "compress",
]
