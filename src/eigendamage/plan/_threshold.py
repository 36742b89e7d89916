"""The paper's allocation: one threshold over the prices of all units of all layers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eigendamage.errors import BudgetError, NothingToCompressError
from eigendamage.layers import Cost
from eigendamage.plan._budget import Budget, Unit, counted


@dataclass(frozen=True)
class Cut:
    """What one threshold makes of a model; subclasses say of what.

    Attributes:
        left: cost of the whole model afterwards.
        changes: whether anything is changed.
    """

    left: Cost
    changes: bool


C = TypeVar("C", bound=Cut)


@dataclass(frozen=True)
class Selection(Generic[C]):
    """The cut that was chosen, and the fraction of units that do not exceed its threshold."""

    cut: C
    ratio: float


class GlobalThreshold(ABC, Generic[C]):
    """Removes every unit whose price does not exceed one threshold (paper, section 4.2).

    Subclasses say what the units are and what a threshold makes of the model. Units that fall do
    not come back at a higher threshold, and the cost only falls with them.

    Args:
        total: cost of the whole model as it is.
        max_ratio: where more than this fraction of a side would go, the side has its own threshold.
    """

    def __init__(self, total: Cost, max_ratio: float) -> None:
        self._total = total
        self._max_ratio = max_ratio

    @abstractmethod
    def units(self) -> Float[Tensor, " units"]:
        """The prices of all units."""

    @abstractmethod
    def at(self, threshold: float, unit: Unit) -> C:
        """What a threshold makes of the model; choices between equals are made by ``unit``."""

    def meet(self, budget: Budget) -> Selection[C]:
        """The mildest threshold that meets the budget.

        Raises:
            BudgetError: if the strongest does not; the message says what is possible.
            NothingToCompressError: if a ratio above 0 leaves every layer as it is.
        """
        unit = budget.unit
        if unit is None:
            return self._at_ratio(budget.ratio or 0.0)
        limits: dict[Unit, float] = {
            u: f * counted(self._total, u) for u, f in budget.limits.items()
        }

        def holds(cut: C) -> bool:
            return all(counted(cut.left, u) <= limit for u, limit in limits.items())

        met = self._first_step(holds, unit)
        if met is None:
            raise BudgetError(self._impossible(budget, unit))
        return Selection(self.at(met, unit), self._ratio(met))

    def _at_ratio(self, ratio: float) -> Selection[C]:
        cut = self.at(threshold_at(self.units(), ratio), "params")
        if ratio > 0 and not cut.changes:
            raise NothingToCompressError(self._too_mild(ratio))
        return Selection(cut, ratio)

    def _steps(self) -> list[float]:
        """All thresholds that make a difference; the first changes nothing."""
        return [-math.inf, *self.units().unique().tolist()]

    def _first_step(self, holds: Callable[[C], bool], unit: Unit) -> float | None:
        """The mildest threshold at which a property holds that stays true for stronger ones.

        Bisection is exact, as the property is monotone.
        """
        steps = self._steps()
        if not holds(self.at(steps[-1], unit)):
            return None
        return steps[bisect_left(steps, True, key=lambda s: holds(self.at(s, unit)))]

    def _ratio(self, threshold: float) -> float:
        return float((self.units() <= threshold).double().mean())

    def _impossible(self, budget: Budget, unit: Unit) -> str:
        smallest = self.at(self._steps()[-1], unit).left
        return (
            f"a budget of {budget} cannot be met: the smallest that can be reached is "
            f"{fractions_left(smallest, self._total, budget)} (max_ratio={self._max_ratio:g}; the "
            f"rest lies in what is kept whole or cannot be cut)"
        )

    def _too_mild(self, ratio: float) -> str:
        mildest = self._first_step(lambda cut: cut.changes, "params")
        if mildest is not None:
            return (
                f"at ratio {ratio:g} no layer would become smaller, so nothing would be "
                f"compressed; the mildest ratio that changes a layer is about "
                f"{self._ratio(mildest):.3f}"
            )
        return (
            f"no layer would become smaller at any ratio (max_ratio={self._max_ratio:g}); "
            f"the layers are too narrow for this method"
        )


def fractions_left(left: Cost, total: Cost, budget: Budget) -> str:
    """What is left of a model in the units of a budget, in words."""
    return ", ".join(
        f"{counted(left, unit) / counted(total, unit):.4f} of the model's {unit}"
        for unit in budget.limits
    )


def threshold_at(units: Float[Tensor, " units"], ratio: float) -> float:
    """The price that the cheapest ``ratio`` of all units do not exceed; below all of them at 0."""
    if ratio <= 0:
        return -math.inf
    return float(units.sort().values[min(int(ratio * len(units)), len(units) - 1)])


def keep_above(
    price: Float[Tensor, " units"], threshold: float, max_ratio: float
) -> Bool[Tensor, " units"]:
    """Which units of one side stay: those above the threshold, and never too few.

    Where more than ``max_ratio`` of them would go, the threshold becomes the price of unit number
    ⌊``max_ratio`` · n⌋ of this side in ascending order: what is above it stays, so up to one unit
    more than that fraction goes, as in the paper's code. At least one unit, the dearest, stays.
    """
    keep = price > threshold
    if float((~keep).double().mean()) > max_ratio:
        own = price.sort().values[min(int(max_ratio * len(price)), len(price) - 1)]
        keep = price > own
    if not bool(keep.any()):
        keep[price.argmax()] = True
    return keep


def kept_above(
    price: Float[Tensor, " units"], threshold: float, max_ratio: float
) -> tuple[int, ...]:
    """The indices of those that `keep_above` says."""
    return tuple(int(at) for at in keep_above(price, threshold, max_ratio).nonzero().flatten())


def kept_counts(
    price: Float[Tensor, " units"], thresholds: Float[Tensor, " thresholds"], max_ratio: float
) -> list[int]:
    """How many `kept_above` keeps of one side at each of several thresholds."""
    count = len(price)
    ordered = price.sort().values
    kept = count - torch.searchsorted(ordered, thresholds.contiguous(), right=True)
    own = ordered[min(int(max_ratio * count), count - 1)]
    fewest = count - int(torch.searchsorted(ordered, own, right=True))
    limited = torch.where((count - kept).double() / count > max_ratio, fewest, kept)
    return limited.clamp_min(1).tolist()
