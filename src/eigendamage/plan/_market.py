"""The menus in the units of one budget, and what an allocation takes from them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from eigendamage.errors import BudgetError
from eigendamage.layers import FORMS
from eigendamage.plan._budget import Unit, counted
from eigendamage.plan._calibrate import OF_CHANNELS, Calibration
from eigendamage.plan._group_menu import GroupMenu
from eigendamage.plan._knapsack import Allocation, allocate, least
from eigendamage.plan._latency import LatencyTable
from eigendamage.plan._menu import LayerMenu, floors_of, metric_of
from eigendamage.plan._menus import ACTIONS, ActionKind, Menus
from eigendamage.plan._options import Kind
from eigendamage.plan._sites import Listing, Site, group_site, layer_site
from eigendamage.plan._task import Task

Floats = NDArray[np.float64]
_KINDS: dict[ActionKind, Kind] = {"low-rank": Kind.LOW_RANK, "blocks": Kind.BLOCK}

_REPLACEABLE = ("not a Linear or Conv2d", "overrides the forward")
_SHAPES = re.compile(r"shape \([^)]*\) |\d+")  # what differs between layers with the same reason


@dataclass(frozen=True, eq=False)
class AutoOptions:
    """What an allocation heeds beside the budget.

    Attributes:
        refine: L-BFGS steps on the input bases of chosen options; 0 for none.
        calibration: of the prices.
        latency: of the layers; needed for a budget of latency.
        floors: by shell pattern, the fraction of a layer's MACs that has to stay.
        actions: which of what is on the menus may be taken.
    """

    refine: int = 30
    calibration: Calibration = field(default_factory=Calibration)
    latency: LatencyTable | None = None
    floors: Mapping[str, float] = field(default_factory=dict[str, float])
    actions: tuple[ActionKind, ...] = ACTIONS


@dataclass(frozen=True, eq=False)
class Basket:
    """What an allocation takes.

    Attributes:
        layers: for each layer that is not cut by channels the option of its menu.
        groups: for each group that loses channels its option.
        allocation: prices, costs and bound.
    """

    layers: Mapping[str, int]
    groups: Mapping[str, int]
    allocation: Allocation


class Market:
    """The menus in the units of one budget.

    Args:
        task: the model, its layers and the budget.
        menus: of the model.
        options: what else to heed.
    """

    def __init__(self, task: Task, menus: Menus, options: AutoOptions) -> None:
        self.layers = dict(menus.layers)
        self._task = task
        self._menus = menus
        self._options = options
        self._floors = floors_of(options.floors, list(menus.layers))
        self._sites: dict[str, Site] = {}
        self._totals = {unit: counted(task.total, unit) for unit in task.budget.limits}
        limits = {unit: f * self._totals[unit] for unit, f in task.budget.limits.items()}
        self._limits: dict[str, float] = dict(limits)
        self._whole: dict[str, float] = dict(self._totals)
        if task.budget.latency is not None:
            if options.latency is None:
                raise BudgetError(
                    "a budget of latency needs a table of measured latencies: give "
                    "latency=measure_latency_table(…), or use compress, which measures one"
                )
            self._whole["latency"] = options.latency.summed
            self._limits["latency"] = task.budget.latency * options.latency.summed
        grouped = {m for group in menus.groups.values() for m in group.members}
        self._alone = [name for name in menus.layers if name not in grouped]
        self._rest = {unit: self._outside(unit) for unit in self._limits}

    def allocate(self) -> Basket:
        """The least total price within the budget, with the bases refined so far.

        Raises:
            BudgetError: if nothing is within it.
        """
        for name in self._alone:
            if name not in self._sites:
                self._sites[name] = layer_site(name, self._listing(self.layers[name]))
        for name, group in self._menus.groups.items():
            if name not in self._sites:
                self._sites[name] = self._group_site(group)
        sites = list(self._sites.values())
        limits = [limit - self._rest[unit] for unit, limit in self._limits.items()]
        allocation = allocate([site.menu for site in sites], limits)
        if allocation is None:
            raise self._impossible(sites)
        layers: dict[str, int] = {}
        groups: dict[str, int] = {}
        for site, at in zip(sites, allocation.choice, strict=True):
            if site.group is not None and site.channels[at] >= 0:
                groups[site.group] = int(site.channels[at])
            else:
                layers.update(zip(site.layers, site.picks[at].tolist(), strict=True))
        return Basket(layers, groups, allocation)

    def refine(self, basket: Basket, done: set[tuple[str, int, int]]) -> bool:
        """Put refined input bases for what is in a basket on the menus; whether any is new.

        Args:
            basket: the last allocation.
            done: the (layer, r_o, r_i) that were refined before; those of now are added.
        """
        new = False
        keys = [key for key in self._with_input_basis(basket) if key not in done]
        done.update(keys)
        self._menus.refine(self._task.layers, keys, self._options.refine)
        for key in keys:
            name = key[0]
            menu, layer = self.layers[name], self._task.layers[name]
            basis = self._menus.refined(layer, *key[1:], self._options.refine)
            if basis is None:
                continue
            metric = metric_of(layer, self._task.curvature[name], self._menus.damping)
            self.layers[name] = menu.with_basis(metric, basis, self._menus.multiple)
            for site in [s for s, found in self._sites.items() if name in found.layers]:
                del self._sites[site]
            new = True
        return new

    def _with_input_basis(self, basket: Basket) -> Iterator[tuple[str, int, int]]:
        """The (layer, r_o, r_i) of a basket that are low-rank forms with a basis of the inputs."""
        for name, index in basket.layers.items():
            o = self.layers[name].options
            if o.kind[index] == Kind.LOW_RANK and o.basis[index] >= 0:
                yield name, int(o.rank_out[index]), int(o.rank_in[index])

    def _listing(self, menu: LayerMenu) -> Listing:
        o = menu.options
        allowed = o.macs >= self._floors.get(menu.name, 0.0) * o.macs[0]
        allowed &= np.isin(o.kind, [_KINDS[a] for a in self._options.actions if a in _KINDS])
        if "latency" in self._limits and menu.shape.offsets == 1:
            # Without a kernel two stages are what is timed, and what is best.
            allowed &= o.form == FORMS.index("merge_in")
        allowed[0] = True
        index = np.flatnonzero(allowed)
        prices = self._options.calibration.weighed(menu.name, o.prices[index])
        costs = np.stack([self._spent(menu, unit)[index] for unit in self._limits], 1)
        return Listing(prices, costs, index)

    def _spent(self, menu: LayerMenu, unit: str) -> Floats:
        match unit:
            case "macs":
                return menu.options.macs
            case "params":
                return menu.options.params
            case "bytes":
                return menu.options.params * menu.shape.itemsize
            case _:
                return self._milliseconds(menu)

    def _milliseconds(self, menu: LayerMenu) -> Floats:
        o = menu.options
        found = np.empty(len(o))
        found[0] = self._as_it_is(menu.name, "latency")
        for at, form in enumerate(FORMS):
            which = o.form == at
            which[0] = False
            if menu.shape.offsets == 1 and form != "merge_in":
                found[which] = np.inf  # not timed, and not taken; see _listing
            elif which.any():
                ranks = o.rank_out[which], o.rank_in[which]
                found[which] = self._table.milliseconds_at(menu.name, form, *ranks)
        return found

    @property
    def _table(self) -> LatencyTable:
        assert self._options.latency is not None
        return self._options.latency

    def _as_it_is(self, name: str, unit: str) -> float:
        """What a layer costs now."""
        layer = self._task.layers[name]
        if unit == "latency":
            return self._table.as_it_is(name)
        return counted(layer.cost(self._task.curvature[name].shape), cast(Unit, unit))

    def _outside(self, unit: str) -> float:
        """What of the whole model is in no site."""
        inside = sum(self._as_it_is(name, unit) for name in self._alone)
        for group in self._menus.groups.values():
            inside += self._group_as_it_is(group, unit)
        return self._whole[unit] - inside

    def _group_as_it_is(self, group: GroupMenu, unit: str) -> float:
        if unit == "latency":
            return sum(self._as_it_is(m, unit) for m in group.members)
        return counted(group.whole, cast(Unit, unit))

    def _group_site(self, group: GroupMenu) -> Site:
        prices = self._options.calibration.weighed(OF_CHANNELS + group.name, group.prices)
        costs = np.stack([self._group_spent(group, unit) for unit in self._limits], 1)
        index = np.flatnonzero(self._above_floors(group))
        channels = Listing(prices[index], costs[index], index)
        inside = [m for m in group.members if m in self.layers]
        fixed = [
            self._group_as_it_is(group, unit) - sum(self._as_it_is(m, unit) for m in inside)
            for unit in self._limits
        ]
        listings = {name: self._listing(self.layers[name]) for name in inside}
        return group_site(group.name, channels, listings, np.maximum(0.0, np.array(fixed)))

    def _group_spent(self, group: GroupMenu, unit: str) -> Floats:
        if unit != "latency":
            return np.array([counted(cost, cast(Unit, unit)) for cost in group.costs])
        found = np.zeros(len(group.counts))
        for name, (outputs, inputs) in group.per_unit.items():
            layer = self._task.layers[name]
            left_out = layer.outputs - outputs * group.counts
            left_in = layer.inputs - inputs * group.counts
            found += self._table.milliseconds_at(name, "dense", left_out, left_in)
        return found

    def _above_floors(self, group: GroupMenu) -> NDArray[np.bool_]:
        fine = np.full(len(group.counts), "channels" in self._options.actions)
        if "latency" in self._limits and any(self._task.layers[m].factored for m in group.per_unit):
            fine[:] = False  # the table has no times of stages with fewer channels
        for name, (outputs, inputs) in group.per_unit.items():
            layer = self._task.layers[name]
            left = (1 - outputs * group.counts / layer.outputs) * (
                1 - inputs * group.counts / layer.inputs
            )
            fine &= left >= self._floors.get(name, 0.0)
        return fine

    def _impossible(self, sites: list[Site]) -> BudgetError:
        found = {
            unit: (least([s.menu for s in sites], k) + self._rest[unit]) / self._whole[unit]
            for k, unit in enumerate(self._limits)
        }
        told = ", ".join(f"{part:.4f} of the model's {unit}" for unit, part in found.items())
        return BudgetError(
            f"a budget of {self._task.budget} cannot be met: the least that can be reached is "
            f"{told}{' (each alone)' if len(found) > 1 else ''}; the rest lies in what is kept "
            f"whole or cannot be cut.{_mostly_left_alone(self._task)} Give a larger budget",
            found,
        )


def _mostly_left_alone(task: Task) -> str:
    """Why most of the weights that are left alone are, as a sentence; empty if none is.

    By their number, as what they cost is not known of all; an embedding's count where parameters
    do.
    """
    sizes = "params" in task.budget.given or "bytes" in task.budget.given
    weights: dict[str, int] = defaultdict(int)
    reasons: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, reason in {**task.curvature.left_alone, **task.ignored}.items():
        if name.startswith("channels of ") or "no weight matrix" in reason:
            continue
        module = task.model.get_submodule(name)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and not sizes:
            continue
        kind = _SHAPES.sub("", reason)
        reasons[kind].append((name, reason))
        weights[kind] += sum(p.numel() for p in module.parameters(recurse=False))
    if not reasons:
        return ""
    (name, reason), *more = reasons[max(weights, key=weights.__getitem__)]
    others = f" and {len(more)} more" if more else ""
    advice = ""
    if any(words in reason for words in _REPLACEABLE):
        advice = (
            " Where you can, put plain nn.Linear or nn.Conv2d layers with the same outputs in "
            "their place."
        )
    return f" '{name}'{others} cannot be cut: {reason}.{advice}"
