"""Lets torchvision's package for CUDA be imported next to a CPU torch, with a `.pth` file that imports this module.

vLLM needs torchvision, and PyPI has it for CUDA only: its library does not load, and its Python code then stumbles over
operators that do not exist. They are declared here; nothing of LLaVA calls them.
"""

import sys
from importlib.abc import MetaPathFinder


class _Declare(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            global library  # kept: its operators go with it
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _Declare())
