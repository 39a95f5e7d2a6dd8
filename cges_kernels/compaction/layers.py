"""The layers that are Linear or convolutions, and the names of modules' attributes for sizes of weights.

This is the only table of layers in compaction/; everything else follows operations.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor, nn

CONVOLUTION = nn.modules.conv._ConvNd
WEIGHTED = (nn.Linear, CONVOLUTION)
Weighted: TypeAlias = nn.Linear | CONVOLUTION  # one of them, for annotations
PLAIN_FORWARDS = {
    cls.forward
    for cls in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
}


def is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def channel_dim(layer: Weighted) -> int:
    """The dim of the layer's input, counted from the end, that holds the channels."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)


def columns(layer: Weighted) -> Tensor:
    """The weight as [in / blocks, out, *kernel], a detached view: its columns read one input channel each."""
    dim = 0 if getattr(layer, "transposed", False) else 1
    return layer.weight.detach().movedim(dim, 0)


def bias_of(name: str) -> str:
    """The name of the bias that goes with a weight, from the weight's name."""
    layer, dot, own = name.rpartition(".")
    return layer + dot + own.replace("weight", "bias")


def sizes(module: nn.Module) -> dict[str, int]:
    """{attribute: size} of the attributes that hold the sizes of `module`'s parameters, by their shapes."""
    weight = module._parameters.get("weight")
    if weight is None and not isinstance(
        module, (nn.modules.batchnorm._NormBase, nn.RNNBase, nn.RNNCellBase)
    ):
        return {}  # its weight is computed from other parameters
    shape = [] if weight is None else list(weight.shape)
    match module:
        case nn.Linear():
            return {"out_features": shape[0], "in_features": shape[1]}
        case nn.modules.conv._ConvNd():
            groups = module.groups
            made, read = (1, 0) if module.transposed else (0, 1)
            if groups > 1:  # whole groups have gone, and the others are as large as before
                before = module.in_channels if module.transposed else module.out_channels
                groups = shape[0] // (before // groups)
            names = {"groups": groups, "out_channels": shape[made], "in_channels": shape[read]}
            return names | {"in_channels" if made == 0 else "out_channels": shape[1] * groups}
        case nn.modules.batchnorm._NormBase():
            own = next((x for x in (module.weight, module.running_mean) if x is not None), None)
            return {"num_features": module.num_features if own is None else len(own)}
        case nn.PReLU():
            return {"num_parameters": shape[0]}
        case nn.Embedding() | nn.EmbeddingBag():
            return {"embedding_dim": shape[1]}
        case nn.RNNBase() if {"weight_ih_l0", "weight_hh_l0"} <= module._parameters.keys():
            hidden = module.hidden_size if module.proj_size else module.get_parameter("weight_hh_l0").shape[1]
            return {"input_size": module.get_parameter("weight_ih_l0").shape[1], "hidden_size": hidden}
        case nn.RNNCellBase() if {"weight_ih", "weight_hh"} <= module._parameters.keys():
            return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
    if type(module).__name__ == "Conv1D" and len(shape) == 2:  # the layer of transformers
        return {"nx": shape[0], "nf": shape[1]}
    return {}
