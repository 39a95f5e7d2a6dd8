"""Imports torchvision even where its compiled operations do not fit the installed torch.

A torchvision built for CUDA cannot load its operations beside a torch for the CPU. Then its networks cannot
be imported either, nor libraries that import torchvision when they find it: timm, transformers, lightning.
None of them needs these operations here, so stand-ins are declared.
"""

import importlib.util
import sys

import torch

OPERATIONS = ("nms", "qnms")
WITH_GRADIENTS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")


def torchvision():
    """The module, or None where it is not installed. Call this before importing a library that uses it."""
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
