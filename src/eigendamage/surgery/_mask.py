"""Setting single weights to zero, in place and for good: torch's own pruning masks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune

from eigendamage.curvature import LayerCurvature
from eigendamage.layers import Layer
from eigendamage.plan import LayerView, Mask
from eigendamage.plan.prices.obs import masked_update
from eigendamage.surgery._channels import write_matrix

# Of the repair: a hundredth of the gradient that plain masking leaves.
_TOLERANCE = 1e-2


def mask_weights(module: nn.Module, layer: Layer, curvature: LayerCurvature, action: Mask) -> None:
    """Put a mask on a module's weight, in place, after repairing what stays as the action says.

    The mask is a ``torch.nn.utils.prune`` one: training keeps it, and ``prune.remove`` makes its
    zeros ordinary weights.

    Args:
        module: a copy of the layer's module.
        layer: the layer as it was.
        curvature: of the layer; only a repair needs it.
        action: the mask.
    """
    keep = action.keep((layer.outputs, layer.inputs, layer.offsets))
    if action.repair == "masked":
        view = LayerView(layer.name, layer.weight(), layer.bias(), curvature, action.damping)
        flat = keep.flatten(1)
        if view.bias is not None:  # the bias always stays
            flat = torch.cat([flat, flat.new_ones(len(flat), 1)], 1)
        write_matrix(module, masked_update(view.W, view.S, view.A, flat, 0.0, tolerance=_TOLERANCE))
    weight = layer.dense_weight()
    with torch.no_grad():
        prune.custom_from_mask(module, "weight", keep.reshape(weight.shape).to(weight.device))
