"""What a unit of a group costs outside of the layers that hold it: a head its attention."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from eigendamage.batch import Batch
from eigendamage.calls import call
from eigendamage.layers._channel_graph import ChannelGraph, ChannelGroup
from eigendamage.layers._copy import copy_model
from eigendamage.layers._slicing import remove_units
from eigendamage.layers._trace import counted_operations


def with_unit_macs(
    base: nn.Module, batch: Batch, groups: Mapping[str, ChannelGroup]
) -> dict[str, ChannelGroup]:
    """Groups, and where units are blocks of outputs what one costs outside of its layers.

    It is counted, by a forward pass without one unit of each such group: what the module that
    holds the group's layers does less, but for the layers. A head's products of queries with keys,
    and of what they weigh with values, are among it. Groups that one module holds, or modules of
    which one is in another, take a pass each.

    Args:
        base: a model in eval mode without hooks. Random states are not preserved.
        batch: what to run it on.
        groups: of the model, each proven to be removable.
    """
    blocks = {name: group for name, group in groups.items() if group.has_blocks}
    found = dict(groups)
    whole = _macs(base, batch) if blocks else {}
    for together in _apart(blocks):
        smaller = copy_model(base, {id(p): p for p in base.parameters()})
        graph = ChannelGraph(groups=together, carriers={}, left_alone={})
        remove_units(smaller, graph, {key: [0] for key in together})
        left = _macs(smaller, batch)
        for name, group in together.items():
            # Carriers are counted by themselves, as layers are.
            parts = (*group.producers, *group.carriers, *group.readers)
            members = {member.module for member in parts}
            before, after = (
                macs.get(group.holder, 0.0) - sum(macs.get(member, 0.0) for member in members)
                for macs in (whole, left)
            )
            found[name] = group.model_copy(update={"macs": max(0.0, before - after)})
    return found


def _apart(groups: Mapping[str, ChannelGroup]) -> list[dict[str, ChannelGroup]]:
    """The groups in sets, in none of which the module that holds one is in that of another."""
    sets: list[dict[str, ChannelGroup]] = []
    for name, group in groups.items():
        free = (
            others
            for others in sets
            if not any(_nested(group.holder, other.holder) for other in others.values())
        )
        fitting = next(free, None)
        if fitting is None:
            sets.append(fitting := {})
        fitting[name] = group
    return sets


def _nested(one: str, other: str) -> bool:
    return any(f"{a}.".startswith(f"{b}." if b else "") for a, b in ((one, other), (other, one)))


def _macs(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Multiply-accumulates of one example by dotted path of a module; "" is the whole model."""
    with counted_operations(model) as counter:
        call(model, batch)
    inside = f"{type(model).__name__}."
    counts = {
        path.removeprefix(inside): sum(by_operation.values()) / 2 / batch.size
        for path, by_operation in counter.get_flop_counts().items()
        if path.startswith(inside)
    }
    return {**counts, "": counter.get_total_flops() / 2 / batch.size}
