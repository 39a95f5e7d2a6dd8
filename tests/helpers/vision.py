"""torchvision, also where its compiled operations do not fit the torch at hand.

A torchvision that was built for CUDA does not load them beside a torch for the CPU, and then not even its
networks can be imported, nor what imports torchvision where it finds it: timm, transformers, lightning. None
needs the operations.
"""

import importlib.util
import sys

import torch

OPERATIONS = ("nms", "qnms")
WITH_GRADIENTS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")


def torchvision():
    """The module, None where it is not installed; to be called before what imports it."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in (*OPERATIONS, *WITH_GRADIENTS, *(f"_{name}_backward" for name in WITH_GRADIENTS)):
            torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
        return importlib.import_module("torchvision")
