"""The paper's allocation: one threshold over the prices of all units of all layers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from eigendamage.errors import BudgetError, NothingToCompressError
from eigendamage.layers import FORMS, Cost, Form, LayerShape
from eigendamage.plan._budget import Budget, Unit, counted
from eigendamage.plan._plan import Action, EigenBlock, Keep
from eigendamage.plan.prices.eigendamage import UnitPrices, kept_above, threshold_at

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
class Selection:
    """What one threshold makes of all layers, and the fraction of units that do not exceed it."""

    choices: Mapping[str, Choice]
    ratio: float


class GlobalThreshold:
    """Cuts every layer at one price (paper, section 4.2 and algorithm 1).

    Args:
        candidates: the layers that may be cut, by dotted path.
        total: cost of the whole model as it is.
        max_ratio: where more than this fraction of a side would go, the side has its own threshold.
        form: ``three`` for the paper's three stages, ``cheapest`` to multiply neighbours together
            where that costs less (the product is the same).
    """

    def __init__(
        self, candidates: Mapping[str, Candidate], total: Cost, max_ratio: float, form: FormChoice
    ) -> None:
        self._candidates = candidates
        self._total = total
        self._max_ratio = max_ratio
        self._forms: tuple[Form, ...] = FORMS if form == "cheapest" else ("three",)

    def meet(self, budget: Budget) -> Selection:
        """The mildest threshold that meets the budget.

        Raises:
            BudgetError: if the strongest does not; the message says what is possible.
            NothingToCompressError: if a ratio above 0 leaves every layer as it is.
        """
        unit = budget.unit
        if unit is None:
            return self._at_ratio(budget.limit)
        limit = budget.limit * counted(self._total, unit)
        met = self._first_step(lambda choices: self._left(choices, unit) <= limit, unit)
        if met is None:
            raise BudgetError(self._impossible(budget, unit))
        return Selection(self._cut(met, unit), self._ratio(met))

    def _at_ratio(self, ratio: float) -> Selection:
        prices = {n: c.prices for n, c in self._candidates.items()}
        choices = self._cut(threshold_at(prices, ratio), "params")
        if ratio > 0 and all(isinstance(c.action, Keep) for c in choices.values()):
            raise NothingToCompressError(self._too_mild(ratio))
        return Selection(choices, ratio)

    def _steps(self) -> list[float]:
        """All thresholds that make a difference; the first changes nothing."""
        every = [torch.cat([c.prices.rows, c.prices.columns]) for c in self._candidates.values()]
        return [-1.0, *torch.cat(every).unique().tolist()]

    def _first_step(
        self, holds: Callable[[Mapping[str, Choice]], bool], unit: Unit
    ) -> float | None:
        """The mildest threshold at which a property holds that stays true for stronger ones.

        Units that fall do not come back at a higher threshold, and a layer's cost only falls with
        them, so bisection is exact.
        """
        steps = self._steps()
        if not holds(self._cut(steps[-1], unit)):
            return None
        return steps[bisect_left(steps, True, key=lambda s: holds(self._cut(s, unit)))]

    def _ratio(self, threshold: float) -> float:
        every = [torch.cat([c.prices.rows, c.prices.columns]) for c in self._candidates.values()]
        return float((torch.cat(every) <= threshold).double().mean())

    def _left(self, choices: Mapping[str, Choice], unit: Unit) -> float:
        saved = sum(
            counted(self._candidates[n].cost, unit) - counted(c.cost, unit)
            for n, c in choices.items()
        )
        return counted(self._total, unit) - saved

    def _cut(self, threshold: float, unit: Unit) -> dict[str, Choice]:
        return {name: self._cut_one(c, threshold, unit) for name, c in self._candidates.items()}

    def _cut_one(self, candidate: Candidate, threshold: float, unit: Unit) -> Choice:
        shape, prices = candidate.shape, candidate.prices
        rows = kept_above(prices.rows, threshold, self._max_ratio)
        columns = kept_above(prices.columns, threshold, self._max_ratio)
        if len(rows) == shape.outputs and len(columns) == shape.inputs:
            return Choice(Keep(reason="all its units stay"), candidate.cost, 0.0)
        form = min(
            self._forms, key=lambda f: counted(shape.factored(len(rows), len(columns), f), unit)
        )
        cost = shape.factored(len(rows), len(columns), form)
        if counted(cost, unit) >= counted(candidate.cost, unit):
            reason = f"would not shrink at ranks ({len(rows)}, {len(columns)})"
            return Choice(Keep(reason=reason), candidate.cost, 0.0)
        # A side that is multiplied into the core is there in full; only the other one is cut.
        if form == "merge_in":
            columns = tuple(range(shape.inputs))
        elif form == "merge_out":
            rows = tuple(range(shape.outputs))
        price = prices.of_block(torch.tensor(rows), torch.tensor(columns))
        return Choice(EigenBlock(rows=rows, columns=columns, form=form), cost, price)

    def _impossible(self, budget: Budget, unit: Unit) -> str:
        total = counted(self._total, unit)
        best = self._left(self._cut(self._steps()[-1], unit), unit)
        fixed = total - sum(counted(c.cost, unit) for c in self._candidates.values())
        return (
            f"a budget of {budget} cannot be met: the smallest that can be reached is "
            f"{best / total:.4f} of the model's {unit} (max_ratio={self._max_ratio:g}; "
            f"{fixed / total:.4f} lies outside the layers that may be cut)"
        )

    def _too_mild(self, ratio: float) -> str:
        mildest = self._first_step(
            lambda choices: any(not isinstance(c.action, Keep) for c in choices.values()), "params"
        )
        if mildest is not None:
            return (
                f"at ratio {ratio:g} no layer would become smaller, so nothing would be "
                f"compressed; the mildest ratio that changes a layer is about "
                f"{self._ratio(mildest):.3f}"
            )
        return (
            f"no layer would become smaller at any ratio (max_ratio={self._max_ratio:g}); "
            f"the layers are too narrow to be factored"
        )
