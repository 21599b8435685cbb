"""Lets torchvision be imported beside a CPU build of torch; for tests of vLLM alone, which find it on PYTHONPATH.

The registry has torchvision for CUDA alone. Its image operations run without its compiled part, if two of that part's
operators are declared before it is imported. vLLM starts processes of its own, so this must work in every interpreter
that inherits the environment; torch is imported only where torchvision is.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class _DeclareOperators(MetaPathFinder):
    library: Any = None

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = type(self).library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define(
                "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )


sys.meta_path.insert(0, _DeclareOperators())
