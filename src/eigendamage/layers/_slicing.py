"""Keep some channels of a module: slices of its weights, in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from torch.nn.modules.instancenorm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from torch.nn.utils import parametrize

from eigendamage.errors import EigenDamageError, LayerError, ShapeError
from eigendamage.layers._channel_graph import ChannelGraph, Member
from eigendamage.layers._factored import FactoredConv2d, FactoredLinear

Norm = BatchNorm1d | BatchNorm2d | BatchNorm3d | InstanceNorm1d | InstanceNorm2d | InstanceNorm3d


class Sides(NamedTuple):
    """How many channels a module makes and reads."""

    outputs: int
    inputs: int


class Kept(NamedTuple):
    """The channels that a module keeps, in order; None for a side that keeps all."""

    outputs: tuple[int, ...] | None
    inputs: tuple[int, ...] | None


def is_depthwise(module: nn.Module) -> bool:
    """Whether it is a Conv2d with a kernel of its own for each of several channels."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def sides(module: nn.Module, *, name: str | None = None) -> Sides:
    """How many channels a module that `slice_channels` knows makes and reads.

    Raises:
        LayerError: if it is none of them. ``name``, its dotted path, goes into the message.
    """
    if isinstance(module, nn.Linear | FactoredLinear):
        return Sides(module.out_features, module.in_features)
    dense = isinstance(module, nn.Conv2d) and module.groups == 1
    if dense or is_depthwise(module) or isinstance(module, FactoredConv2d):
        conv = cast(nn.Conv2d, module)
        return Sides(conv.out_channels, conv.in_channels)
    if isinstance(module, Norm):
        return Sides(module.num_features, module.num_features)
    if isinstance(module, nn.PReLU):
        return Sides(module.num_parameters, module.num_parameters)
    kind = type(module).__name__
    if isinstance(module, nn.Conv2d):
        kind = f"grouped Conv2d (groups={module.groups})"
    raise LayerError(
        name or type(module).__name__,
        f"the channels of a {kind} cannot be removed one by one; that is known of Linear, Conv2d "
        f"(dense or depthwise), batch and instance norms, PReLU and factored layers",
    )


def slice_channels(
    module: nn.Module,
    *,
    outputs: Sequence[int] | None = None,
    inputs: Sequence[int] | None = None,
    name: str | None = None,
) -> None:
    """Keep these output and input channels of a module, in place and in this order.

    Linear and Conv2d lose rows and columns, a depthwise Conv2d, a norm or a PReLU channels (on
    both sides at once), a factored layer rows of its last and columns of its first stage. New
    parameters have the dtype, device, memory format and ``requires_grad`` of the old, and no grad.

    Args:
        module: a Linear, Conv2d (dense or depthwise), BatchNorm, InstanceNorm, PReLU,
            FactoredConv2d or FactoredLinear.
        outputs: channels to keep of those it makes; None keeps all.
        inputs: channels to keep of those it reads; None keeps all.
        name: its dotted path, for messages.

    Raises:
        LayerError: if it is another kind of module, or its weight is parametrized.
        ShapeError: if a channel does not exist or is named twice, if none would be left, or if the
            two sides of a module that passes channels on are to keep different ones.
    """
    have = sides(module, name=name)
    label = name or type(module).__name__
    if parametrize.is_parametrized(module):
        raise LayerError(label, "its weight is parametrized; remove the parametrization first")
    _check(label, "output", outputs, have.outputs)
    _check(label, "input", inputs, have.inputs)
    if isinstance(module, FactoredConv2d | FactoredLinear):
        slice_channels(module[0], inputs=inputs, name=f"{label}.0")
        slice_channels(module[-1], outputs=outputs, name=f"{label}.{len(module) - 1}")
    elif isinstance(module, nn.Linear):
        _slice_parameters(module, outputs, inputs)
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d) and not is_depthwise(module):
        _slice_parameters(module, outputs, inputs)
        module.out_channels, module.in_channels = module.weight.shape[:2]
    else:
        if outputs is not None and inputs is not None and list(outputs) != list(inputs):
            raise ShapeError(label, "it passes channels on: both sides must keep the same ones")
        channels = inputs if outputs is None else outputs
        if channels is not None:
            _slice_carrier(module, channels)


def zero_inputs(module: nn.Module, inputs: Sequence[int], *, name: str | None = None) -> None:
    """Set the weights that read these input channels to zero, in place.

    Raises:
        LayerError: if the module is not a Linear, a dense Conv2d or a factored layer.
        ShapeError: if a channel does not exist.
    """
    stage = module[0] if isinstance(module, FactoredConv2d | FactoredLinear) else module
    label = name or type(module).__name__
    if not isinstance(stage, nn.Linear | nn.Conv2d) or is_depthwise(stage):
        raise LayerError(label, f"{type(stage).__name__} has no weights by input channel")
    _refuse_unknown(label, "input", inputs, sides(stage, name=name).inputs)
    with torch.no_grad():
        stage.weight[:, list(inputs)] = 0


def kept_indices(
    graph: ChannelGraph, dropped: Mapping[str, Sequence[int]], sizes: Mapping[str, Sides]
) -> dict[str, Kept]:
    """What each module keeps when some units of some groups go.

    Where several groups meet in one module (a reader of a concatenation) their channels add up.
    Carriers have theirs under ``outputs``.

    Args:
        graph: the groups.
        dropped: for each group the units to remove.
        sizes: for each module of these groups how many channels it has (see `sides`).

    Returns:
        For each module that loses something, by dotted path, what it keeps.

    Raises:
        EigenDamageError: if there is no such group or unit.
        ShapeError: if a module would keep nothing, or has no such channel.
    """
    outputs: dict[str, set[int]] = defaultdict(set)
    inputs: dict[str, set[int]] = defaultdict(set)
    for key, units in dropped.items():
        group = graph.groups.get(key)
        if group is None:
            known = ", ".join(list(graph.groups)[:8]) or "none"
            raise EigenDamageError(f"there is no group of channels '{key}'; groups are: {known}")
        unknown = [u for u in units if not 0 <= u < group.size]
        if unknown:
            raise EigenDamageError(
                f"group '{key}' has units 0 to {group.size - 1}, no unit {unknown[0]}"
            )
        for member in (*group.producers, *group.carriers):
            outputs[member.module].update(channels_of(member, units))
        for member in group.readers:
            inputs[member.module].update(channels_of(member, units))
    return {
        path: Kept(
            _rest(path, "output", outputs[path], sizes[path].outputs),
            _rest(path, "input", inputs[path], sizes[path].inputs),
        )
        for path in {**outputs, **inputs}
        if outputs[path] or inputs[path]
    }


def remove_units(model: nn.Module, graph: ChannelGraph, units: Mapping[str, Sequence[int]]) -> None:
    """Remove units of groups from all modules that hold them, in place.

    Nothing is changed if the units do not fit.

    Args:
        model: the model that ``graph`` was found on, with all its channels.
        graph: the groups.
        units: for each group, by its name, the units to remove.

    Raises:
        EigenDamageError: if there is no such group, unit or channel, or a module would be empty.
    """
    members = {m.module for key in units if key in graph.groups for m in _members(graph, key)}
    modules = {path: model.get_submodule(path) for path in members}
    sizes = {path: sides(module, name=path) for path, module in modules.items()}
    for path, kept in kept_indices(graph, units, sizes).items():
        slice_channels(modules[path], outputs=kept.outputs, inputs=kept.inputs, name=path)
    for (path, attribute), (_, left) in counts_left(graph, units).items():
        setattr(model.get_submodule(path), attribute, left)


def counts_left(
    graph: ChannelGraph, dropped: Mapping[str, Sequence[int]]
) -> dict[tuple[str, str], tuple[int, int]]:
    """What attributes that count units are, and are to be when some units of some groups go.

    Args:
        graph: the groups.
        dropped: for each group the units to remove.

    Returns:
        By dotted path of the module and name of the attribute, its value before and after.
    """
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for key, units in dropped.items():
        for counter in graph.groups[key].counters if units else ():
            place = counter.module, counter.attribute
            whole, left = counts.get(place, (counter.whole, counter.whole))
            counts[place] = whole, left - counter.per_unit * len(units)
    return counts


def channels_of(member: Member, units: Sequence[int]) -> list[int]:
    """The channels of a member that go with these units."""
    return [channel for unit in units for channel in member.indices[unit]]


def _members(graph: ChannelGraph, key: str) -> tuple[Member, ...]:
    group = graph.groups[key]
    return (*group.producers, *group.carriers, *group.readers)


def _rest(path: str, side: str, gone: set[int], size: int) -> tuple[int, ...] | None:
    _refuse_unknown(path, side, sorted(gone), size)
    if len(gone) == size:
        raise ShapeError(path, f"all its {size} {side} channels would go; keep at least one")
    return tuple(i for i in range(size) if i not in gone) if gone else None


def _check(label: str, side: str, kept: Sequence[int] | None, size: int) -> None:
    if kept is None:
        return
    if not kept:
        raise ShapeError(label, f"no {side} channel would be left; keep at least one")
    if len(set(kept)) != len(kept):
        raise ShapeError(label, f"an {side} channel to keep is named twice")
    _refuse_unknown(label, side, kept, size)


def _refuse_unknown(label: str, side: str, channels: Sequence[int], size: int) -> None:
    unknown = [c for c in channels if not 0 <= c < size]
    if unknown:
        raise ShapeError(
            label, f"{side} channel {unknown[0]} does not exist; it has 0 to {size - 1}"
        )


def _slice_parameters(
    layer: nn.Linear | nn.Conv2d, outputs: Sequence[int] | None, inputs: Sequence[int] | None
) -> None:
    if outputs is not None:
        layer.weight = _parameter(layer.weight, 0, outputs)
        if layer.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            layer.bias = _parameter(layer.bias, 0, outputs)
    if inputs is not None:
        layer.weight = _parameter(layer.weight, 1, inputs)


def _slice_carrier(module: nn.Module, channels: Sequence[int]) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, _parameter(parameter, 0, channels))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.ndim == 1:  # running statistics; a counter of batches has no axis
            setattr(module, name, _selected(buffer, 0, channels))
    if isinstance(module, nn.Conv2d):
        module.out_channels = module.in_channels = module.groups = len(channels)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(channels)
    else:
        cast(nn.BatchNorm2d, module).num_features = len(channels)


def _parameter(old: Tensor, axis: int, kept: Sequence[int]) -> nn.Parameter:
    return nn.Parameter(_selected(old, axis, kept), requires_grad=old.requires_grad)


def _selected(old: Tensor, axis: int, kept: Sequence[int]) -> Tensor:
    index = torch.tensor(list(kept), dtype=torch.long, device=old.device)
    new = old.detach().index_select(axis, index)
    # Where both formats fit (1×1 kernels), strides say which one is meant: keep contiguous ones.
    if old.ndim == 4 and not old.is_contiguous():
        return new.contiguous(memory_format=torch.channels_last)
    return new
