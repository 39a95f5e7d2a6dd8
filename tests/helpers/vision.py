"""torchvision and timm, also where torchvision's compiled operations do not fit the torch at hand.

A torchvision that was built for CUDA does not load them beside a torch for the CPU, and then not even its
networks can be imported; of those none needs the operations.
"""

import importlib
import sys

import torch

OPERATIONS = ("nms", "qnms")
WITH_GRADIENTS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")

try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in (*OPERATIONS, *WITH_GRADIENTS, *(f"_{name}_backward" for name in WITH_GRADIENTS)):
        torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
    import torchvision

timm = importlib.import_module("timm")  # which imports torchvision

__all__ = ["timm", "torchvision"]
