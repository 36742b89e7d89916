"""EigenDamage's units: rows and columns of each layer's weight in its eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.curvature import Curvature, EigenvalueKind, LayerCurvature
from eigendamage.layers import FORMS, Cost, DenseForm, LayerShape
from eigendamage.plan._budget import Unit, counted
from eigendamage.plan._plan import Action, DepthwiseBlock, EigenBlock, Keep
from eigendamage.plan._task import Result, Task, refuse_none
from eigendamage.plan._threshold import Cut, GlobalThreshold
from eigendamage.plan.prices.eigendamage import UnitPrices, layer_prices, rotated_weight
from eigendamage.plan.prices.eigendamage_dw import block_price, default_rank, layer_cp

FormChoice = Literal["cheapest", "three"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A layer that the threshold may cut: its unit prices, its sizes, its cost as it is."""

    prices: UnitPrices
    shape: LayerShape
    cost: Cost


@dataclass(frozen=True)
class Choice:
    """What one threshold makes of a layer."""

    action: Action
    cost: Cost
    price: float


@dataclass(frozen=True)
class BlockCut(Cut):
    """What one threshold makes of each layer."""

    choices: Mapping[str, Choice]


class BlockThreshold(GlobalThreshold[BlockCut]):
    """Cuts rows and columns of every layer's W' at one price (paper, algorithm 1).

    Args:
        candidates: the layers that may be cut, by dotted path.
        total: cost of the whole model as it is.
        max_ratio: see `GlobalThreshold`.
        form: ``three`` for the paper's three stages, ``cheapest`` to multiply neighbours together
            where that costs less (the product is the same), ``depthwise`` for a depthwise middle
            stage in layers with a kernel.
    """

    def __init__(
        self,
        candidates: Mapping[str, Candidate],
        total: Cost,
        max_ratio: float,
        form: FormChoice | Literal["depthwise"],
    ) -> None:
        super().__init__(total, max_ratio)
        self._candidates = candidates
        self._form = form

    def units(self) -> Float[Tensor, " units"]:
        return torch.cat([c.prices.units for c in self._candidates.values()])

    def at(self, threshold: float, unit: Unit) -> BlockCut:
        choices = {n: self._cut_one(c, threshold, unit) for n, c in self._candidates.items()}
        left = self._total
        for name, choice in choices.items():
            left = left - (self._candidates[name].cost - choice.cost)
        changes = any(not isinstance(c.action, Keep) for c in choices.values())
        return BlockCut(left=left, changes=changes, choices=choices)

    def _cut_one(self, candidate: Candidate, threshold: float, unit: Unit) -> Choice:
        shape, prices = candidate.shape, candidate.prices
        rows, columns = prices.kept(threshold, self._max_ratio)
        if (len(rows), len(columns)) == prices.ranks:
            return Choice(Keep(reason="all its units stay"), candidate.cost, 0.0)
        if self._form == "depthwise" and shape.offsets > 1:
            rank = default_rank(len(rows), len(columns), shape.offsets)
            action = DepthwiseBlock(rows=rows, columns=columns, rank=rank)
            cost = shape.factored(rank, rank, "depthwise")
        else:
            form = min(
                self._forms(),
                key=lambda f: counted(shape.factored(len(rows), len(columns), f), unit),
            )
            cost = shape.factored(len(rows), len(columns), form)
            # A side that is multiplied into the core is there in full; only the other one is cut.
            if form == "merge_in":
                columns = tuple(range(shape.inputs))
            elif form == "merge_out":
                rows = tuple(range(shape.outputs))
            action = EigenBlock(rows=rows, columns=columns, form=form)
        if counted(cost, unit) >= counted(candidate.cost, unit):
            reason = f"would not shrink at ranks ({len(rows)}, {len(columns)})"
            return Choice(Keep(reason=reason), candidate.cost, 0.0)
        price = prices.of_block(torch.tensor(rows), torch.tensor(columns))
        return Choice(action, cost, price)

    def _forms(self) -> tuple[DenseForm, ...]:
        return ("three",) if self._form == "three" else FORMS


def plan_blocks(
    task: Task, form: FormChoice | Literal["depthwise"], kind: EigenvalueKind
) -> Result:
    """Which rows and columns go in the eigenbasis of each layer; the classifier is kept."""
    kept = dict.fromkeys(task.curvature.classifier, "it is the classifier") | dict(task.ignored)
    candidates: dict[str, Candidate] = {}
    for name, layer in task.layers.items():
        if name in kept:
            continue
        known = _priced_by(task.curvature, name, kind)
        prices = layer_prices(layer.weight(), known)
        task.refuse_non_finite(f"layer {name}", prices.loss)
        candidates[name] = Candidate(prices, known.shape, layer.cost(known.shape))
    refuse_none(candidates, kept)
    chosen = BlockThreshold(candidates, task.total, task.max_ratio, form).meet(task.budget)
    choices = chosen.cut.choices
    totals: dict[str, float | None] = {name: c.price for name, c in choices.items()}
    for name, choice in choices.items():
        if isinstance(choice.action, DepthwiseBlock):
            totals[name] = _depthwise_price(task, name, choice.action, kind)
    return Result(
        actions={name: c.action for name, c in choices.items()},
        costs={name: c.cost for name, c in choices.items()},
        prices=totals,
        kept=kept,
        left=chosen.cut.left,
        ratio=chosen.ratio,
        changes=chosen.cut.changes,
    )


def _priced_by(curvature: Curvature, name: str, kind: EigenvalueKind) -> LayerCurvature:
    known = curvature[name]
    if kind == curvature.kind:
        return known
    return replace(known, eigenvalues=known.kfac_eigenvalues())


def _depthwise_price(task: Task, name: str, action: DepthwiseBlock, kind: EigenvalueKind) -> float:
    known = _priced_by(task.curvature, name, kind)
    weight = task.layers[name].weight().cpu()
    cp = layer_cp(weight, known, action.rows, action.columns, action.rank)
    rotated = rotated_weight(weight, known.Q_S.cpu(), known.Q_A.cpu())
    return block_price(rotated, known.eigenvalues.cpu(), action.rows, action.columns, cp)
