"""Channels that go together as options: how many, which, at what price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray
from torch import nn

from eigendamage.curvature import Curvature
from eigendamage.layers import ChannelGraph, ChannelGroup, Cost, Layer, Member
from eigendamage.plan._channels import cost_left, usable_groups
from eigendamage.plan._options import rank_grid
from eigendamage.plan._views import LayerView
from eigendamage.plan.prices import kron_obs

_COUNTS = 128


@dataclass(frozen=True, eq=False)
class GroupMenu:
    """How many channels of a group may go, which come first, and what that costs.

    The layers that read them are repaired, with a bias that takes up the mean of what goes; the
    price is the rise after that (backward elimination; see `kron_obs.eliminate`).

    Attributes:
        name: of the group.
        members: the layers that make or read its channels.
        order: units, the first to go first.
        counts: how many go, one an option, ascending.
        prices: expected rise of the loss.
        costs: of all members and carriers afterwards.
        whole: of all members and carriers as they are.
        carriers: of the carriers as they are, with what the channels cost outside of any module.
        per_unit: how many outputs and inputs a member loses with each unit.
        step: units are left in multiples of this.
    """

    name: str
    members: tuple[str, ...]
    order: tuple[int, ...]
    counts: NDArray[np.int64]
    prices: NDArray[np.float64]
    costs: tuple[Cost, ...]
    whole: Cost
    carriers: Cost
    per_unit: Mapping[str, tuple[int, int]]
    step: int

    def dropped(self, index: int) -> tuple[int, ...]:
        """The units that an option takes."""
        return tuple(sorted(self.order[: int(self.counts[index])]))


def group_menus(
    curvature: Curvature,
    layers: Mapping[str, Layer],
    ignored: Mapping[str, str],
    damping: float,
    multiple: int,
) -> tuple[dict[str, GroupMenu], ChannelGraph, dict[str, str]]:
    """The menus of groups that share no layer, the groups that are usable, and why others are not.

    A layer can be in one menu only: of groups that meet in a layer the one with the fewest layers
    comes first, then the one whose layers cost the most.

    Raises:
        NothingToCompressError: if no group is usable.
    """
    graph, left_alone = usable_groups(curvature, layers, ignored)
    found: dict[str, GroupMenu] = {}
    taken: dict[str, str] = {}  # the group that has a layer
    for name, group in sorted(graph.groups.items(), key=lambda item: _rank(*item, curvature)):
        members = _members(group)
        if any(not _is_plain(layers[m.module]) for m in group.readers):
            left_alone[f"channels of {name}"] = "a factored layer reads them, which is not repaired"
        elif shared := taken.keys() & set(members):
            left_alone[f"channels of {name}"] = (
                f"'{min(shared)}' makes or reads both these and the channels of "
                f"{taken[min(shared)]}, which are on the menu; both are weighed only all together"
            )
        else:
            taken.update(dict.fromkeys(members, name))
            found[name] = _menu(name, group, graph, layers, curvature, damping, multiple)
    return found, graph, left_alone


def _rank(name: str, group: ChannelGroup, curvature: Curvature) -> tuple[int, float, str]:
    members = _members(group)
    return len(members), -sum(curvature[m].shape.dense().macs for m in members), name


def _members(group: ChannelGroup) -> tuple[str, ...]:
    return tuple(dict.fromkeys(m.module for m in (*group.producers, *group.readers)))


def _is_plain(layer: Layer) -> bool:
    return isinstance(layer.module, nn.Linear | nn.Conv2d)


def _menu(
    name: str,
    group: ChannelGroup,
    graph: ChannelGraph,
    layers: Mapping[str, Layer],
    curvature: Curvature,
    damping: float,
    multiple: int,
) -> GroupMenu:
    readers: list[kron_obs.Reader] = []
    for member in group.readers:
        layer = layers[member.module]
        view = LayerView(
            layer.name, layer.weight(), layer.bias(), curvature[layer.name], damping
        ).with_bias()
        columns = [view.columns(unit) for unit in member.indices]
        readers.append(kron_obs.Reader(view.W, view.S, view.A_inverse, columns))
    found = kron_obs.eliminate(readers)
    block = min(len(member.indices[0]) for member in group.producers)
    step = multiple // gcd(multiple, block)  # so that the outputs left are a multiple
    kept = rank_grid(group.size, group.size - 1, step, _COUNTS)
    counts = np.array(sorted(group.size - k for k in kept), np.int64)
    prices = found.rises.cumsum(0).numpy()[counts - 1]
    members = _members(group)
    whole = Cost(0.0, 0, 0)
    for member in members:
        whole = whole + layers[member].cost(curvature[member].shape)
    size = curvature[members[0]].shape.itemsize
    carriers = Cost(group.macs * group.size, 0, 0)
    for path in dict.fromkeys(m.module for m in group.carriers):
        carrier = graph.carriers[path]
        parameters = carrier.parameters * carrier.channels
        carriers = carriers + Cost(carrier.macs * carrier.channels, parameters, parameters * size)
    # The bias that takes up the mean, where a reader has none.
    biases = sum(layers[m.module].outputs for m in group.readers if layers[m.module].bias() is None)
    added = Cost(0.0, biases, biases * size)
    costs = tuple(
        cost_left(graph, layers, curvature, whole + carriers, {name: range(count)}) + added
        for count in counts.tolist()
    )
    return GroupMenu(
        name=name,
        members=members,
        order=found.order,
        counts=counts,
        prices=prices,
        costs=costs,
        whole=whole + carriers,
        carriers=carriers,
        per_unit={
            path: (_channels(group.producers, path), _channels(group.readers, path))
            for path in members
        },
        step=step,
    )


def _channels(members: Sequence[Member], path: str) -> int:
    return sum(len(m.indices[0]) for m in members if m.module == path)
