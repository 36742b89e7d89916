"""One option for every site at the least total price within limits: multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from eigendamage.errors import EigenDamageError
from eigendamage.plan._knapsack_bound import relax, repaired, spent
from eigendamage.plan._knapsack_pool import SLACK, Floats, Pool, efficient
from eigendamage.plan._knapsack_search import any_within, improved


@dataclass(frozen=True, eq=False)
class Menu:
    """The options of one site: a layer, or layers that are decided together.

    Attributes:
        prices: rise of the loss by each option; finite, at least 0.
        costs: what each option costs in each of d units, in that unit; finite, at least 0.

    Raises:
        EigenDamageError: if there is no option, or a number is negative or not finite.
    """

    prices: Float64[Floats, " options"]
    costs: Float64[Floats, "options units"]

    def __post_init__(self) -> None:
        if not self.prices.size:
            raise EigenDamageError("a menu has no options; give it at least one, such as to keep")
        for name, values in (("prices", self.prices), ("costs", self.costs)):
            bad = ~np.isfinite(values) | (values < 0)
            if bad.any():
                option = int(np.argwhere(bad)[0, 0])
                raise EigenDamageError(
                    f"{name} of a menu's option {option}: found {values[option]}, expected finite "
                    f"numbers of at least 0; leave such options out"
                )


@dataclass(frozen=True)
class Allocation:
    """An option for every site.

    Attributes:
        choice: index of each site's option in its menu.
        price: total.
        cost: total in each unit.
        bound: no allocation within the limits has a lower price than this.
    """

    choice: tuple[int, ...]
    price: float
    cost: tuple[float, ...]
    bound: float

    @property
    def gap(self) -> float:
        """The most that a better allocation could save; 0 (up to rounding) if this is optimal."""
        return max(0.0, self.price - self.bound)


def least(menus: Sequence[Menu], unit: int) -> float:
    """Smallest total cost that can be reached in one unit, whatever the others are."""
    return sum(float(menu.costs[:, unit].min()) for menu in menus)


def allocate(menus: Sequence[Menu], limits: Sequence[float]) -> Allocation | None:
    """The cheapest choice of one option a menu whose total cost is within the limit in every unit.

    The Lagrangian relaxation gives a lower bound and, rounded, a first allocation. An option whose
    reduced price exceeds that of its site's best by more than the gap between the two can be in no
    better allocation (Sinha & Zoltners 1979); dynamic programming over the few others closes the
    gap (Pisinger 1995). Where it would hold more than 20 000 partial sums, 5 000 in four or more
    units, it lets the least promising go: the allocation may then not be the best, and `bound` says
    by how much at most. The same input gives the same result.

    Args:
        menus: one a site.
        limits: the most that may be spent in each of the menus' units; finite. Totals may exceed
            them by a relative 1e-12, the rounding of a sum.

    Returns:
        The allocation. None if no allocation is within the limits, which is certain for one unit,
        where the linear relaxation has no solution either, and where no partial sums had to go;
        else, with several limits that can hardly be met together, none was found.

    Raises:
        EigenDamageError: if a limit is not finite, a menu has another number of units, or the
            linear program of the relaxation fails.
    """
    if not all(math.isfinite(limit) for limit in limits):
        raise EigenDamageError(f"limits are {tuple(limits)}; expected finite numbers")
    for site, menu in enumerate(menus):
        if menu.costs.shape[1] != len(limits):
            raise EigenDamageError(
                f"menu {site} has costs in {menu.costs.shape[1]} units, but there are "
                f"{len(limits)} limits; give one limit a unit"
            )
    if not menus:
        return (
            None if min(limits, default=0.0) < 0 else Allocation((), 0.0, (0.0,) * len(limits), 0.0)
        )
    pool = _pool(menus, np.array(limits, dtype=np.float64))
    relaxed = None if pool is None else relax(pool)
    if pool is None or relaxed is None:
        return None
    first = repaired(pool, relaxed.choice)
    if first is None:
        first = any_within(pool)
    if first is None:
        return None
    best, bound = improved(pool, relaxed.multipliers, spent(pool, first))
    price = pool.price(best)
    return Allocation(
        choice=tuple(pool.options[best].tolist()),
        price=price,
        cost=tuple(pool.cost(best).tolist()),
        bound=min(bound, price),
    )


def _pool(menus: Sequence[Menu], limits: Float64[Floats, " units"]) -> Pool | None:
    """The options that no other dominates and that fit beside the least of all other sites.

    None if a site has none.
    """
    floors = np.stack([menu.costs.min(axis=0) for menu in menus])
    total = floors.sum(axis=0)
    pools: list[Pool] = []
    for site, menu in enumerate(menus):
        others = menu.costs + (total - floors[site])
        # twice the slack: what is doubtful stays, and is judged as a whole
        options = np.flatnonzero((others <= limits * (1 + 2 * SLACK)).all(axis=1))
        if not options.size:
            return None
        options = options[efficient(menu.prices[options], menu.costs[options])]
        sites = np.full_like(options, site)
        pools.append(Pool(menu.prices[options], menu.costs[options], sites, options, limits))
    return Pool(
        np.concatenate([pool.prices for pool in pools]),
        np.concatenate([pool.costs for pool in pools]),
        np.concatenate([pool.sites for pool in pools]),
        np.concatenate([pool.options for pool in pools]),
        limits,
    )
