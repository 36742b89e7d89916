"""Multipliers of the relaxed multiple-choice knapsack, and a first allocation by rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int64
from scipy.optimize import linprog
from scipy.sparse import csr_array

from eigendamage.errors import EigenDamageError
from eigendamage.plan._knapsack_pool import SLACK, Floats, Ints, Pool, or_one


@dataclass(frozen=True, eq=False)
class Relaxed:
    """Lagrange multipliers (price for a unit of cost) and a choice near the relaxed optimum."""

    multipliers: Float64[Floats, " units"]
    choice: Int64[Ints, " sites"]


def relax(pool: Pool) -> Relaxed | None:
    """The best multipliers and a choice near the relaxed optimum; None if nothing is in the limits.

    For one unit the choice is within the limit; for more it is the linear program's solution,
    rounded to the option of least cost of which it takes a part, and may be over.

    Raises:
        EigenDamageError: if the linear program fails.
    """
    return _relax_one(pool) if len(pool.limits) == 1 else _relax_many(pool)


def _relax_one(pool: Pool) -> Relaxed | None:
    """The best multiplier where there is one unit, exactly, and a choice within the limit.

    The dual is concave and piecewise linear. Between a choice over the limit and one within it,
    the next multiplier is where their lines meet, until no choice lies below both. Finite.
    """
    costs = pool.costs[:, 0]
    over, inside = pool.lowest(pool.prices), pool.lowest(costs)
    if not pool.fits(inside):
        return None
    if pool.fits(over):
        return Relaxed(np.zeros(1), over)
    while True:
        saved = float(costs[over].sum() - costs[inside].sum())
        multiplier = (pool.price(inside) - pool.price(over)) / saved
        middle = pool.lowest(pool.prices + multiplier * costs)
        spent = costs[middle].sum()
        if not costs[inside].sum() < spent < costs[over].sum():
            return Relaxed(np.array([multiplier]), inside)
        if pool.fits(middle):
            inside = middle
        else:
            over = middle


def _relax_many(pool: Pool) -> Relaxed | None:
    """Multipliers by the linear relaxation, and its solution rounded; None if it has none."""
    scale = 0.0
    for unit in range(len(pool.limits)):
        alone = replace(pool, costs=pool.costs[:, [unit]], limits=pool.limits[[unit]])
        relaxed = _relax_one(alone)
        if relaxed is None:
            return None
        scale = max(scale, alone.dual(relaxed.multipliers)[0])
    # The optimum, not the dearest option, is what the solver's tolerances have to be small beside.
    scale = max(scale, SLACK * float(pool.prices.max())) or 1.0
    limits = or_one(pool.limits)
    columns = np.arange(len(pool.sites))
    solved = linprog(
        pool.prices / scale,
        A_ub=(pool.costs / limits).T,
        b_ub=pool.limits / limits,
        A_eq=csr_array((np.ones(len(columns)), (pool.sites, columns))),
        b_eq=np.ones(len(pool.starts())),
        method="highs",
    )
    if solved.status == 2:
        return None
    if solved.status != 0:
        raise EigenDamageError(f"linear relaxation of the allocation failed: {solved.message}")
    multipliers = np.maximum(-solved.ineqlin.marginals, 0) * scale / limits
    shares = (pool.costs / limits).sum(axis=1)
    return Relaxed(multipliers, pool.lowest(np.where(solved.x > 1e-9, shares, np.inf)))


def repaired(pool: Pool, choice: Int64[Ints, " sites"]) -> Int64[Ints, " sites"] | None:
    """Switch options until the choice is within the limits; None where this gets stuck."""
    while not pool.fits(choice):
        switched = _switched(pool, choice)
        rise = pool.prices - pool.prices[choice][pool.sites]
        fits = pool.within(switched)
        gain = _overrun(pool, pool.cost(choice)[None]) - _overrun(pool, switched)
        if fits.any():
            option = int(np.where(fits, rise, np.inf).argmin())
        elif (gain > SLACK).any():
            helps = np.flatnonzero(gain > SLACK)
            option = int(helps[(np.maximum(rise[helps], 0) / gain[helps]).argmin()])
        else:
            return None
        choice = _with_option(pool, choice, option)
    return choice


def spent(pool: Pool, choice: Int64[Ints, " sites"]) -> Int64[Ints, " sites"]:
    """Spend what is left over: again and again the largest drop of the price that still fits."""
    while True:
        drop = pool.prices[choice][pool.sites] - pool.prices
        drop[~pool.within(_switched(pool, choice))] = 0
        if drop.max() <= 0:
            return choice
        choice = _with_option(pool, choice, int(drop.argmax()))


def _switched(pool: Pool, choice: Int64[Ints, " sites"]) -> Float64[Floats, "all units"]:
    """Total cost after each option has taken the place of its site's choice."""
    return pool.cost(choice) - pool.costs[choice][pool.sites] + pool.costs


def _with_option(pool: Pool, choice: Int64[Ints, " sites"], option: int) -> Int64[Ints, " sites"]:
    """The choice with an option in the place of its site's."""
    changed = choice.copy()
    changed[pool.sites[option]] = option
    return changed


def _overrun(pool: Pool, totals: Float64[Floats, "totals units"]) -> Float64[Floats, " totals"]:
    """By what fraction of the limits totals are over them, summed over units."""
    return np.maximum((totals - pool.limits) / or_one(pool.limits), 0).sum(axis=1)
