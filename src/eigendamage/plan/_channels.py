"""Whole channels: which groups may lose some, and what a threshold makes of their prices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from eigendamage.curvature import Curvature
from eigendamage.errors import EigenDamageError, NothingToCompressError
from eigendamage.layers import (
    ChannelGraph,
    ChannelGroup,
    Cost,
    Layer,
    Member,
    Sides,
    counts_left,
    kept_indices,
)
from eigendamage.plan._budget import Budget, Unit, counted
from eigendamage.plan._methods import ChannelRule
from eigendamage.plan._plan import CarrierPlan, Channels, CounterPlan, Repair
from eigendamage.plan._repair import rise
from eigendamage.plan._task import Result, Task, refuse_none
from eigendamage.plan._threshold import Cut, GlobalThreshold, keep_above
from eigendamage.plan._views import End, GroupView, LayerView

RankBy = Literal["price", "price_per_cost"]
"""Whether units are compared by their price, or by price for what their removal saves."""


@dataclass(frozen=True)
class ChannelCut(Cut):
    """What one threshold makes of the groups: for each the units that go."""

    dropped: Mapping[str, tuple[int, ...]]


class ChannelThreshold(GlobalThreshold[ChannelCut]):
    """Removes units of all groups of channels at one price.

    Args:
        prices: of each group's units.
        per: hold each price against what its unit saves of these; None compares prices alone.
        graph: the groups.
        layers: the layers that make and read them.
        curvature: which knows the layers' sizes.
        total: cost of the whole model as it is.
        max_ratio: the most of a group that may go.
    """

    def __init__(
        self,
        prices: Mapping[str, Float[Tensor, " units"]],
        per: Unit | None,
        graph: ChannelGraph,
        layers: Mapping[str, Layer],
        curvature: Curvature,
        total: Cost,
        max_ratio: float,
    ) -> None:
        super().__init__(total, max_ratio)
        self._graph = graph
        self._layers = layers
        self._curvature = curvature
        self._prices = dict(prices)
        if per is not None:
            saved = {name: counted(self._total - self._left({name: (0,)}), per) for name in prices}
            self._prices = {name: price / saved[name] for name, price in prices.items()}

    def units(self) -> Float[Tensor, " units"]:
        return torch.cat(list(self._prices.values()))

    def at(self, threshold: float, unit: Unit) -> ChannelCut:
        dropped: dict[str, tuple[int, ...]] = {}
        for name, prices in self._prices.items():
            gone = ~keep_above(prices, threshold, self._max_ratio)
            dropped[name] = tuple(gone.nonzero().flatten().tolist())
        return ChannelCut(self._left(dropped), any(dropped.values()), dropped)

    def _left(self, dropped: Mapping[str, tuple[int, ...]]) -> Cost:
        return cost_left(self._graph, self._layers, self._curvature, self._total, dropped)


def cost_left(
    graph: ChannelGraph,
    layers: Mapping[str, Layer],
    curvature: Curvature,
    total: Cost,
    dropped: Mapping[str, Sequence[int]],
) -> Cost:
    """What a model costs without some units of some groups.

    Args:
        graph: the groups.
        layers: the layers that make and read them.
        curvature: which knows the layers' sizes.
        total: cost of the whole model as it is.
        dropped: for each group the units that go.
    """
    outputs: Counter[str] = Counter()
    inputs: Counter[str] = Counter()
    left = total
    for name, units in dropped.items():
        group = graph.groups[name]
        left = left - Cost(group.macs * len(units), 0, 0)
        for side, members in ((outputs, group.producers), (inputs, group.readers)):
            for member in members:
                side[member.module] += len(units) * len(member.indices[0])
        size = curvature[group.producers[0].module].shape.itemsize
        for member in group.carriers:
            carrier = graph.carriers[member.module]
            gone = len(units) * len(member.indices[0])
            parameters = carrier.parameters * gone
            left = left - Cost(carrier.macs * gone, parameters, parameters * size)
    for name in {**outputs, **inputs}:
        layer, shape = layers[name], curvature[name].shape
        smaller = replace(
            shape, outputs=shape.outputs - outputs[name], inputs=shape.inputs - inputs[name]
        )
        left = left - (layer.cost(shape) - layer.cost(smaller))
    return left


def usable_groups(
    curvature: Curvature, layers: Mapping[str, Layer], ignored: Mapping[str, str]
) -> tuple[ChannelGraph, dict[str, str]]:
    """The groups of which all layers are known and none is to be left alone, and why not the rest.

    Raises:
        EigenDamageError: if channels were not traced.
        NothingToCompressError: if there is none.
    """
    graph = curvature.channels
    if graph is None:
        raise EigenDamageError(
            "this method removes channels, and which go together was not traced; give "
            "also=('channels',) to estimate_curvature"
        )
    kept = {f"channels of {name}": reason for name, reason in graph.left_alone.items()}
    groups: dict[str, ChannelGroup] = {}
    for name, group in graph.groups.items():
        reason = _why_kept(group, curvature, layers, ignored)
        if reason is None:
            groups[name] = group
        else:
            kept[f"channels of {name}"] = reason
    if not groups:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:6])
        raise NothingToCompressError(f"no channel of the model can be removed. {shown}")
    return graph.model_copy(update={"groups": groups}), kept


def _why_kept(
    group: ChannelGroup,
    curvature: Curvature,
    layers: Mapping[str, Layer],
    ignored: Mapping[str, str],
) -> str | None:
    for member in (*group.producers, *group.carriers, *group.readers):
        name = member.module
        if name in ignored:
            return f"'{name}' is {ignored[name]}"
    for member in (*group.producers, *group.readers):
        name = member.module
        if name not in layers:
            return f"'{name}' is left alone: {curvature.left_alone.get(name, 'it is not known')}"
    if group.size < 2:
        return "it has one channel only"
    return None


def view_of(
    name: str,
    group: ChannelGroup,
    views: Mapping[str, LayerView],
    model: nn.Module,
) -> GroupView:
    """A group as its prices see it."""
    scales: dict[str, Tensor] = {}
    for member in group.carriers:
        norm = model.get_submodule(member.module)
        if isinstance(norm, _BatchNorm) and norm.affine:
            by_channel = norm.weight.detach().double().cpu().abs()
            scales[member.module] = by_channel[torch.tensor(member.indices)].mean(1)
    return GroupView(
        name=name,
        size=group.size,
        producers=[_end(member, views) for member in group.producers],
        readers=[_end(member, views) for member in group.readers],
        scales=scales,
    )


def _end(member: Member, views: Mapping[str, LayerView]) -> End:
    return End(views[member.module], member.indices)


def channel_actions(
    graph: ChannelGraph,
    dropped: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, Layer],
    repair: Repair,
    damping: float,
) -> tuple[dict[str, Channels], dict[str, CarrierPlan]]:
    """What is kept of every layer and carrier that loses something.

    A factored layer is not repaired: the result would not fit its ranks.
    """
    sizes = {name: Sides(layer.outputs, layer.inputs) for name, layer in layers.items()}
    sizes |= {name: Sides(c.channels, c.channels) for name, c in graph.carriers.items()}
    gone = {name: units for name, units in dropped.items() if units}
    actions: dict[str, Channels] = {}
    carriers: dict[str, CarrierPlan] = {}
    for name, kept in kept_indices(graph, gone, sizes).items():
        if name in layers:
            size, module = sizes[name], layers[name].module
            actions[name] = Channels(
                outputs=tuple(range(size.outputs)) if kept.outputs is None else kept.outputs,
                inputs=tuple(range(size.inputs)) if kept.inputs is None else kept.inputs,
                repair=repair if isinstance(module, nn.Linear | nn.Conv2d) else "none",
                damping=damping,
            )
        elif kept.outputs is not None:
            carriers[name] = CarrierPlan(kept=kept.outputs, channels=sizes[name].outputs)
    return actions, carriers


def planned_counters(
    graph: ChannelGraph, dropped: Mapping[str, tuple[int, ...]]
) -> tuple[CounterPlan, ...]:
    """The attributes that have to follow when these units of these groups go."""
    return tuple(
        CounterPlan(module=module, attribute=attribute, before=before, after=after)
        for (module, attribute), (before, after) in counts_left(graph, dropped).items()
    )


def ranked_per(
    rule: ChannelRule, budget: Budget, rank_by: RankBy | None, method: str
) -> Unit | None:
    """What a price is held against, None for the price alone."""
    if rank_by is None:
        return budget.unit if rule.adds_up else None
    if rank_by == "price":
        return None
    if budget.unit is None or not rule.adds_up:
        what = "a budget in MACs or parameters" if rule.adds_up else f"another method than {method}"
        raise EigenDamageError(f"rank_by='price_per_cost' needs {what}; give rank_by='price'")
    return budget.unit


def plan_channels(
    task: Task, rule: ChannelRule, per: Unit | None, generator: torch.Generator
) -> Result:
    """Which channels go, and how the weights that stay are repaired.

    Args:
        task: what to start from.
        rule: how channels are priced and repaired.
        per: what a price is held against; see `ranked_per`.
        generator: of the draws of rules that draw.
    """
    graph, left_alone = usable_groups(task.curvature, task.layers, task.ignored)
    views = {name: task.view(name) for name in task.layers}
    parts: dict[str, Mapping[str, Tensor]] = {}
    for name, group in graph.groups.items():
        found = rule.prices(view_of(name, group, views, task.model), generator)
        if found is None:
            left_alone[f"channels of {name}"] = "it has nothing that this method prices"
            continue
        for layer, prices in found.items():
            task.refuse_non_finite(f"channels of {layer}", prices)
        parts[name] = found
    refuse_none(parts, left_alone)
    totals = {name: torch.stack(list(p.values())).sum(0) for name, p in parts.items()}
    chosen = ChannelThreshold(
        totals, per, graph, task.layers, task.curvature, task.total, task.max_ratio
    ).meet(task.budget)
    dropped = chosen.cut.dropped
    actions, carriers = channel_actions(graph, dropped, task.layers, rule.repair, task.damping)
    by_name: dict[str, float | None] = dict.fromkeys(task.layers, 0.0 if rule.is_rise else None)
    if rule.is_rise:
        for name, by_layer in parts.items():
            gone = torch.tensor(dropped[name], dtype=torch.long)
            for layer, each in by_layer.items():
                # A group is named after its first producer, so this is a layer in any case.
                by_name[layer] = (by_name[layer] or 0.0) + float(each[gone].sum())
    for name, action in actions.items():
        by_name[name] = _repaired_price(views[name], action, rule.repair, by_name[name])
    return Result(
        actions=actions,
        costs={
            name: task.layers[name].cost(
                replace(
                    task.curvature[name].shape,
                    outputs=len(action.outputs),
                    inputs=len(action.inputs),
                )
            )
            for name, action in actions.items()
        },
        prices=by_name,
        kept={**dict.fromkeys(task.layers, "all its channels stay"), **task.ignored},
        left=chosen.cut.left,
        ratio=chosen.ratio,
        changes=chosen.cut.changes,
        carriers=carriers,
        counters=planned_counters(graph, dropped),
        left_alone=left_alone,
    )


def _repaired_price(
    layer: LayerView, action: Channels, repair: Repair, alone: float | None
) -> float | None:
    """What the quadratic says of all that goes at once, where the method has an optimum for it.

    A channel is one event, though a layer makes and others read it: where both are repaired, the
    filters are priced. ``alone`` is the sum of the prices, for methods without an optimum.
    """
    every_row, every_column = range(layer.W.shape[0]), range(layer.W.shape[1])
    match repair:
        case "rows" | "both":
            mine: Repair = "rows" if action.repair == repair else "none"
            return rise(layer, action.outputs, every_column, mine)
        case "columns":
            return rise(layer, every_row, layer.kept_columns(action.inputs), action.repair)
        case _:
            return alone
