"""In front of the installed torchvision, which it becomes; see the package this folder lies in."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parents[1]

_spec = PathFinder.find_spec("torchvision", [entry for entry in sys.path if Path(entry).resolve() != _HERE])
if _spec is None or _spec.loader is None:
    raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

_operators = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

_installed = module_from_spec(_spec)
_installed.__dict__["_adafv_operators"] = _operators  # which are gone when it is
sys.modules["torchvision"] = _installed
_spec.loader.exec_module(_installed)
