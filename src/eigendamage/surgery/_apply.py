"""apply_plan: a new model in which the planned layers are replaced."""

from __future__ import annotations

import copy

from torch import nn

from eigendamage.curvature import Curvature
from eigendamage.errors import MismatchError
from eigendamage.layers import Layer, find_layers
from eigendamage.plan import EigenBlock, LayerPlan, Plan
from eigendamage.surgery._factor import block_stages, factored_module


def apply_plan(model: nn.Module, plan: Plan, curvature: Curvature) -> nn.Module:
    """Build the smaller model that a plan describes. The input model is not touched.

    Layers become factored ones (subclasses of ``nn.Sequential`` made of plain layers); everything
    else is a deep copy. A layer of which everything is kept computes the same function.

    Raises:
        MismatchError: if the plan names a layer that the model or the curvature has not, or that
            has another shape there.
    """
    found = find_layers(model).compressible
    for name, layer_plan in plan.layers.items():
        _check(name, layer_plan, found.get(name), curvature)
    # Replaced modules are built from the original: no need to copy their weights first.
    replaced = {
        id(found[name].module): factored_module(
            found[name], block_stages(found[name].weight(), curvature[name], layer_plan.action)
        )
        for name, layer_plan in plan.layers.items()
        if isinstance(layer_plan.action, EigenBlock)
    }
    return copy.deepcopy(model, memo=dict(replaced))


def _check(name: str, planned: LayerPlan, layer: Layer | None, curvature: Curvature) -> None:
    if layer is None:
        raise MismatchError(f"the plan names layer '{name}', which the model has not")
    if name not in curvature and planned.changes:
        raise MismatchError(f"the plan changes layer '{name}', which the curvature has not")
    shape = (layer.outputs, layer.inputs, layer.offsets)
    if shape != planned.shape:
        raise MismatchError(
            f"layer '{name}' has a weight of shape {shape} (o, i, K), the plan is for "
            f"{planned.shape}"
        )
    if planned.changes and tuple(curvature[name].eigenvalues.shape) != shape:
        raise MismatchError(
            f"layer '{name}' has a weight of shape {shape} (o, i, K), the curvature is for "
            f"{tuple(curvature[name].eigenvalues.shape)}"
        )
    action = planned.action
    if isinstance(action, EigenBlock):
        for what, indices, size in (
            ("rows", action.rows, layer.outputs),
            ("columns", action.columns, layer.inputs),
        ):
            unique = set(indices)
            if not indices or len(unique) != len(indices) or not unique <= set(range(size)):
                raise MismatchError(
                    f"layer '{name}': the {what} of the plan must be distinct indices below {size}"
                )
