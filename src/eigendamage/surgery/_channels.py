"""Taking channels from a layer, and giving what they did to those that stay."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from eigendamage.curvature import LayerCurvature
from eigendamage.layers import Layer, slice_channels
from eigendamage.plan import Channels, LayerView, repaired


def cut_channels(
    module: nn.Module, layer: Layer, curvature: LayerCurvature, action: Channels
) -> None:
    """Slice a module, in place, to the channels that an action keeps, repaired as it says.

    Args:
        module: a copy of the layer's module.
        layer: the layer as it was.
        curvature: of the layer; only a repair needs it.
        action: what is kept.
    """
    slice_channels(module, outputs=action.outputs, inputs=action.inputs, name=layer.name)
    if action.repair == "none":
        return
    view = LayerView(layer.name, layer.weight(), layer.bias(), curvature, action.damping)
    if action.bias:
        view = view.with_bias()
        if not isinstance(module.bias, Tensor):
            weight = cast(nn.Parameter, module.weight)
            bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=weight.requires_grad)
            module.register_parameter("bias", bias)
    X = repaired(view, action.outputs, view.kept_columns(action.inputs), action.repair)
    write_matrix(module, X)


def write_matrix(module: nn.Module, matrix: Tensor) -> None:
    """Copy an (o, iK) matrix, and the bias as its last column if there is one, into a module."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_(matrix[:, : weight[0].numel()].reshape(weight.shape))
        if isinstance(bias, Tensor):
            bias.copy_(matrix[:, -1])
