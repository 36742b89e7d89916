"""The allocation: one action a layer, at the least total price within the budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from eigendamage.distributed import decided
from eigendamage.errors import BudgetError, NothingToCompressError
from eigendamage.layers import ON_REQUEST, Cost, Layer
from eigendamage.plan._calibrate import OF_CHANNELS
from eigendamage.plan._channels import channel_actions, plan_channels, planned_counters
from eigendamage.plan._market import AutoOptions, Basket, Market
from eigendamage.plan._menus import Menus
from eigendamage.plan._methods import READERS_REPAIRED
from eigendamage.plan._plan import Action, CarrierPlan, Channels, CounterPlan, Keep
from eigendamage.plan._task import Result, Task
from eigendamage.plan._views import GroupPrices, GroupView

_ALL_TOGETHER = (
    "groups of channels that meet in layers, removed all together by one threshold, were cheaper "
    "than the best allocation of the menus; its gap says nothing here"
)
_ROUNDING = 1e-6  # prices that differ by less are one price, worked out in another order
_ROUNDS = 3  # of refining what was chosen and choosing again


def plan_auto(task: Task, menus: Menus, options: AutoOptions) -> Result:
    """One action for every layer, at the least total price within the budget.

    Chosen input bases are refined and everything is allocated again with their prices, until no
    new one is chosen.

    Raises:
        BudgetError: if the budget cannot be met; the message says what can.
    """
    if task.budget.ratio is not None or task.budget.loss is not None:
        raise BudgetError(
            f"a budget of {task.budget} says no size, which method 'auto' allocates; give macs, "
            f"params, bytes or latency (compress also takes a loss)"
        )
    task = replace(task, curvature=menus.seen)
    market = Market(task, menus, options)
    refined: set[tuple[str, int, int]] = set()
    basket = decided(market.allocate)
    for _ in range(_ROUNDS if options.refine else 0):
        if not market.refine(basket, refined):
            break
        basket = decided(market.allocate)
    result = _result(task, menus, options, market, basket)
    return _chained(task, menus, options, result) or result


def _chained(task: Task, menus: Menus, options: AutoOptions, found: Result) -> Result | None:
    """What removing channels alone makes of a model whose groups meet in layers, if it is cheaper.

    The menus hold only groups that share no layer. Where there are others, as in a chain of
    layers, all groups together are weighed against what was found: by one threshold over their
    prices for what they save.
    """
    graph, unit = menus.graph, task.budget.unit
    plain = not options.floors and menus.multiple == 1 and task.budget.latency is None
    if (
        graph is None
        or unit is None
        or not plain
        or "channels" not in options.actions
        or len(graph.groups) == len(menus.groups)
    ):
        return None
    same = replace(
        task,
        damping=menus.damping,
        max_ratio=menus.max_ratio,
        ignored={name: why for name, why in menus.kept.items() if why.startswith(ON_REQUEST)},
    )

    def priced(group: GroupView, generator: torch.Generator) -> GroupPrices | None:
        return menus.group_prices(group.name, lambda: READERS_REPAIRED.prices(group, generator))

    rule = replace(READERS_REPAIRED, prices=priced)
    try:
        other = plan_channels(same, rule, unit, torch.Generator())
    except (BudgetError, NothingToCompressError):
        return None
    weighed = options.calibration.weighed

    def total(result: Result) -> float:
        return sum(
            float(weighed(_calibrated_as(name, result), np.array([price]))[0])
            for name, price in result.prices.items()
            if price
        )

    if total(other) >= (1 - _ROUNDING) * total(found):
        return None
    calibrated = {
        name: float(
            options.calibration.corrected(_calibrated_as(name, other), np.array([price]))[0]
        )
        for name, price in other.prices.items()
        if price
    }
    return replace(
        other,
        ratio=None,
        calibrated=calibrated if options.calibration.points else {},
        notes=(*menus.notes, _ALL_TOGETHER),
    )


def _calibrated_as(name: str, result: Result) -> str:
    channels = isinstance(result.actions.get(name), Channels)
    return OF_CHANNELS + name if channels else name


def _result(
    task: Task, menus: Menus, options: AutoOptions, market: Market, basket: Basket
) -> Result:
    actions: dict[str, Action] = {}
    costs: dict[str, Cost] = {}
    prices: dict[str, float | None] = {}
    calibrated: dict[str, float] = {}
    left = task.total

    def note(name: str, key: str, price: float) -> None:
        prices[name] = price
        if options.calibration.points:
            calibrated[name] = float(options.calibration.corrected(key, np.array([price]))[0])

    for name, index in basket.layers.items():
        menu = market.layers[name]
        actions[name] = menu.action(index)
        if not isinstance(actions[name], Keep):
            note(name, name, float(menu.options.prices[index]))
            costs[name] = menu.cost(index)
            left = left - (task.layers[name].cost(task.curvature[name].shape) - costs[name])
    carriers: dict[str, CarrierPlan] = {}
    counters: tuple[CounterPlan, ...] = ()
    if basket.groups and menus.graph is not None:
        dropped = {name: menus.groups[name].dropped(at) for name, at in basket.groups.items()}
        cut, carriers = channel_actions(menus.graph, dropped, task.layers, "columns", menus.damping)
        counters = planned_counters(menus.graph, dropped)
        for name, action in cut.items():
            actions[name], costs[name] = _with_bias(action, task.layers[name], task)
        for name, at in basket.groups.items():
            group = menus.groups[name]
            note(name, OF_CHANNELS + name, float(group.prices[at]))
            left = left - (group.whole - group.costs[at])
    return Result(
        actions=actions,
        costs=costs,
        prices=prices,
        calibrated=calibrated,
        kept={**dict.fromkeys(task.layers, "its channels are decided with others"), **menus.kept},
        left=left,
        ratio=None,
        gap=basket.allocation.gap,
        changes=any(not isinstance(action, Keep) for action in actions.values()),
        carriers=carriers,
        counters=counters,
        left_alone=menus.left_alone,
        notes=menus.notes,
    )


def _with_bias(action: Channels, layer: Layer, task: Task) -> tuple[Channels, Cost]:
    """A layer's cut, with a bias if it reads what goes, and what it costs then."""
    reads = len(action.inputs) < layer.inputs and isinstance(layer.module, nn.Linear | nn.Conv2d)
    shape = replace(
        task.curvature[layer.name].shape,
        outputs=len(action.outputs),
        inputs=len(action.inputs),
    )
    if reads:
        shape = replace(shape, bias=True)
    return action.model_copy(update={"bias": reads}), layer.cost(shape)
