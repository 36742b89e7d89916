"""Taking channels from a layer, and giving what they did to those that stay."""

from __future__ import annotations

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
