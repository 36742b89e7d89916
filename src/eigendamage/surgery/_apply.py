"""apply_plan: a new model in which the planned layers are replaced."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from eigendamage.curvature import Curvature
from eigendamage.errors import EigenDamageError, MismatchError
from eigendamage.layers import (
    COUNTERS,
    Layer,
    Origin,
    copy_model,
    find_layers,
    fused_calls,
    recounted_origin,
    require_near,
    reshaped_origin,
    set_following,
    set_origin,
    sides,
    sketch_of,
    slice_channels,
)
from eigendamage.plan import (
    Action,
    CarrierPlan,
    Channels,
    CounterPlan,
    DepthwiseBlock,
    EigenBlock,
    LayerPlan,
    LowRank,
    Mask,
    Plan,
)
from eigendamage.surgery._channels import cut_channels
from eigendamage.surgery._factor import factored_module, low_rank_stages, planned_stages
from eigendamage.surgery._made import Made, set_made
from eigendamage.surgery._mask import mask_weights


@torch.inference_mode(False)
def apply_plan(model: nn.Module, plan: Plan, curvature: Curvature) -> nn.Module:
    """Build the smaller model that a plan describes. The input model is not touched.

    Layers become factored ones (subclasses of ``nn.Sequential`` made of plain layers), lose
    channels, or get masks (``torch.nn.utils.prune``); everything else is a deep copy. A layer of
    which everything is kept computes the same function.

    What each changed module was is noted on it, and the plan on the model, as attributes that are
    no part of the state dict, for `save` to read.

    Raises:
        MismatchError: if the plan names a layer that the model or the curvature has not, or that
            has another shape there, or weights of another model.
    """
    found = find_layers(model).compressible
    _require_fit(model, found, plan, curvature)
    for name in plan.changed:
        now = sketch_of(found[name].weight())
        require_near(name, now, plan.layers[name].sketch, "plan")
        require_near(name, now, curvature.sketches.get(name), "curvature")
    return _applied(model, found, plan, curvature)


def apply_own_plan(model: nn.Module, plan: Plan, curvature: Curvature) -> nn.Module:
    """`apply_plan` of a plan that was just made of this model: no weights are compared."""
    with torch.inference_mode(False):
        found = find_layers(model).compressible
        _require_fit(model, found, plan, curvature)
        return _applied(model, found, plan, curvature)


def _applied(
    model: nn.Module, found: Mapping[str, Layer], plan: Plan, curvature: Curvature
) -> nn.Module:
    # Replaced modules are built from the original: no need to copy their weights first.
    replaced: dict[int, nn.Module] = {}
    for name, layer_plan in plan.layers.items():
        action = layer_plan.action
        if isinstance(action, EigenBlock | DepthwiseBlock):
            stages = planned_stages(found[name].weight(), curvature[name], action)
            replaced[id(found[name].module)] = factored_module(found[name], stages)
        elif isinstance(action, LowRank):
            stages, bias = low_rank_stages(found[name], curvature[name], action)
            replaced[id(found[name].module)] = factored_module(found[name], stages, bias)
    smaller = copy_model(model, replaced)
    for name, layer_plan in plan.layers.items():
        action = layer_plan.action
        if isinstance(action, Channels):
            cut_channels(smaller.get_submodule(name), found[name], curvature[name], action)
        elif isinstance(action, Mask):
            mask_weights(smaller.get_submodule(name), found[name], curvature[name], action)
        if layer_plan.changes:
            set_origin(smaller.get_submodule(name), _origin(found[name], action))
    for name, carrier in plan.carriers.items():
        module = smaller.get_submodule(name)
        origin = reshaped_origin(module, outputs=carrier.kept)
        slice_channels(module, outputs=carrier.kept, name=name)
        set_origin(module, origin)
    for counter in plan.counters:
        module = smaller.get_submodule(counter.module)
        set_origin(module, recounted_origin(module, counter.attribute, counter.before))
        set_following(module, counter.attribute, counter.after)
    _call_factored_layers(smaller, replaced.values())
    set_made(smaller, Made(plan))
    return smaller


def _call_factored_layers(model: nn.Module, factored: Collection[nn.Module]) -> None:
    """Turn off what would read the weights of factored layers past their forward."""
    for path, attribute in fused_calls(model, factored):
        module = model.get_submodule(path)
        set_origin(module, recounted_origin(module, attribute, int(getattr(module, attribute))))
        set_following(module, attribute, 0)


def _origin(layer: Layer, action: Action) -> Origin:
    if isinstance(action, Channels):
        return reshaped_origin(layer.module, outputs=action.outputs, inputs=action.inputs)
    return reshaped_origin(layer.module)


def _require_fit(
    model: nn.Module, found: Mapping[str, Layer], plan: Plan, curvature: Curvature
) -> None:
    """Refuse a plan or a curvature of another model, as far as shapes show.

    Raises:
        MismatchError: naming the first layer that does not fit.
    """
    for name, layer_plan in plan.layers.items():
        _check(name, layer_plan, found.get(name), curvature)
    for name, carrier in plan.carriers.items():
        _check_carrier(model, name, carrier)
    for counter in plan.counters:
        _check_counter(model, counter)


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
    if isinstance(action, EigenBlock | DepthwiseBlock):
        _check_indices(name, "rows", action.rows, layer.outputs)
        _check_indices(name, "columns", action.columns, layer.inputs)
    elif isinstance(action, Channels):
        _check_indices(name, "outputs", action.outputs, layer.outputs)
        _check_indices(name, "inputs", action.inputs, layer.inputs)
    elif isinstance(action, LowRank):
        action.directions(layer.inputs)
        whole = action.form == "merge_out"
        if action.rank > layer.outputs or (whole and action.rank < layer.outputs):
            raise MismatchError(
                f"layer '{name}' has {layer.outputs} outputs, the plan's rank is {action.rank}"
            )
    elif isinstance(action, Mask):
        action.keep(shape)


def _check_carrier(model: nn.Module, name: str, planned: CarrierPlan) -> None:
    try:
        channels = sides(model.get_submodule(name), name=name).outputs
    except (AttributeError, EigenDamageError) as error:
        raise MismatchError(
            f"the plan takes channels from '{name}', which the model has not, or not as a module "
            f"that passes channels on"
        ) from error
    if channels != planned.channels:
        raise MismatchError(f"'{name}' has {channels} channels, the plan is for {planned.channels}")
    _check_indices(name, "channels", planned.kept, channels)


def _check_counter(model: nn.Module, planned: CounterPlan) -> None:
    place = f"'{planned.attribute}' of '{planned.module}'"
    if planned.attribute not in COUNTERS:
        raise MismatchError(
            f"the plan sets {place}, which is no count of heads; those are {', '.join(COUNTERS)}"
        )
    try:
        found = getattr(model.get_submodule(planned.module), planned.attribute)
    except AttributeError as error:
        raise MismatchError(f"the plan sets {place}, which the model has not") from error
    if found != planned.before:
        raise MismatchError(f"{place} is {found!r}, the plan is for {planned.before}")


def _check_indices(name: str, what: str, indices: Sequence[int], size: int) -> None:
    unique = set(indices)
    if not indices or len(unique) != len(indices) or not unique <= set(range(size)):
        raise MismatchError(
            f"layer '{name}': the {what} of the plan must be distinct indices below {size}"
        )
