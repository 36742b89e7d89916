"""Couplings of torch-pruning's graph as groups of channels, and why some are none."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from torch import nn

from eigendamage.layers._channel_graph import ChannelGroup, Member
from eigendamage.layers._dependencies import Coupling, Place
from eigendamage.layers._factored import FactoredConv2d, FactoredLinear
from eigendamage.layers._slicing import is_depthwise, sides

Role = Literal["producer", "carrier", "reader"]


def traced_groups(
    base: nn.Module,
    couplings: Sequence[Coupling],
    order: Sequence[str],
    reasons: Mapping[str, str],
) -> tuple[dict[str, ChannelGroup], dict[str, str]]:
    """The couplings that make a group, by name, and by first producer why the others do not."""
    rank = {path: number for number, path in enumerate(order)}
    modules = dict(base.named_modules())
    stages = {
        f"{path}.{i}".lstrip("."): (path, i, len(module))
        for path, module in modules.items()
        if isinstance(module, FactoredConv2d | FactoredLinear)
        for i in range(len(module))
    }
    groups: dict[str, ChannelGroup] = {}
    left_alone: dict[str, str] = {}
    for coupling in couplings:
        reason = _refusal(modules.keys(), coupling, stages, reasons) or _misfit(modules, coupling)
        if reason is not None:
            left_alone.setdefault(coupling.root, reason)
            continue
        members: dict[Role, list[Member]] = {"producer": [], "carrier": [], "reader": []}
        for place in sorted(coupling.places, key=lambda p: rank[p.path]):
            role = _role(modules[place.path], place)
            if role is not None:
                path = stages[place.path][0] if place.path in stages else place.path
                members[role].append(Member(module=path, indices=coupling.places[place]))
        names = [m.module for m in members["producer"] if m.module not in groups]
        size = len(next(iter(coupling.places.values())))
        if not names:
            left_alone.setdefault(coupling.root, "its channels are divided among several readers")
        elif not members["reader"]:
            left_alone[names[0]] = "no layer reads its channels: they are an output of the model"
        elif size < 2:
            left_alone[names[0]] = "there is one channel only, and one has to stay"
        else:
            groups[names[0]] = ChannelGroup(
                size=size,
                producers=tuple(members["producer"]),
                carriers=tuple(members["carrier"]),
                readers=tuple(members["reader"]),
            )
    return groups, left_alone


def _role(module: nn.Module, place: Place) -> Role | None:
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return None  # one slope for all channels
    if isinstance(module, nn.Linear | nn.Conv2d) and not is_depthwise(module):
        return "producer" if place.side == "out" else "reader"
    return "carrier"


def _refusal(
    known: Collection[str],
    coupling: Coupling,
    stages: Mapping[str, tuple[str, int, int]],
    reasons: Mapping[str, str],
) -> str | None:
    """Why a coupling is no group, by what is in it."""
    for path, side in coupling.places:
        if path in stages:
            layer, stage, count = stages[path]
            outside = stage == count - 1 if side == "out" else stage == 0
            if not outside:
                return f"inside the factored layer '{layer}' there are ranks, which are no channels"
            if layer in reasons:
                return f"'{layer}': {reasons[layer]}"
        if path in reasons:
            return reasons[path] if path == coupling.root else f"'{path}': {reasons[path]}"
        if path not in known:
            return f"the parameter '{path}', outside of any known layer, goes with them"
    if coupling.is_output:
        return "they are an output of the model, whose shape would change"
    if not coupling.traceable:
        return "heads that are read several times lie between its channels and others"
    return None


def _misfit(modules: Mapping[str, nn.Module], coupling: Coupling) -> str | None:
    """Whether a place has not the channels that it is said to have: they were padded on the way."""
    for place, units in coupling.places.items():
        module = modules[place.path]
        if _role(module, place) is None:
            continue
        have = sides(module, name=place.path)
        size = have.inputs if place.side == "in" else have.outputs
        if any(not 0 <= channel < size for unit in units for channel in unit):
            return (
                f"they could not be followed to '{place.path}', which has {size} channels; "
                f"something without a layer of its own, such as padding, changes their number"
            )
    return None
