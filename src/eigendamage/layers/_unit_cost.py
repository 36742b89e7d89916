"""What a unit of a group costs outside of the layers that hold it: a head its attention."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eigendamage.batches import Batch, call
from eigendamage.layers._channel_graph import ChannelGraph, ChannelGroup
from eigendamage.layers._slicing import remove_units


def with_unit_macs(
    base: nn.Module, batch: Batch, groups: Mapping[str, ChannelGroup]
) -> dict[str, ChannelGroup]:
    """The groups whose units are blocks of outputs with what a unit costs outside of its layers.

    It is counted, by one forward pass for each such group, without one of its units. A head's
    products of queries with keys, and of what they weigh with values, are among it.

    Args:
        base: a model in eval mode without hooks. Random states are not preserved.
        batch: what to run it on.
        groups: of the model, each proven to be removable.
    """
    blocks = {name: group for name, group in groups.items() if group.has_blocks}
    whole = _macs(base, batch) if blocks else {}
    found = dict(groups)
    for name, group in blocks.items():
        smaller = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        graph = ChannelGraph(groups={name: group}, carriers={}, left_alone={})
        remove_units(smaller, graph, {name: [0]})
        members = {member.module for member in (*group.producers, *group.readers)}
        before, after = (
            macs[""] - sum(macs.get(member, 0.0) for member in members)
            for macs in (whole, _macs(smaller, batch))
        )
        found[name] = group.model_copy(update={"macs": max(0.0, before - after)})
    return found


def _macs(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Multiply-accumulates of one example by dotted path of a module; "" is the whole model."""
    counter = FlopCounterMode(display=False)
    # Fused attention on the CPU is unknown to the counter; its plain form is not.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call(model, batch)
    inside = f"{type(model).__name__}."
    counts = {
        path.removeprefix(inside): sum(by_operation.values()) / 2 / batch.size
        for path, by_operation in counter.get_flop_counts().items()
        if path.startswith(inside)
    }
    return {**counts, "": counter.get_total_flops() / 2 / batch.size}
