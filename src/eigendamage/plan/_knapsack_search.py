"""Exact search of a multiple-choice knapsack: dynamic programming with Lagrangian bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int64

from eigendamage.plan._knapsack_pool import SLACK, Floats, Ints, Pool, efficient, or_one

_BITS = 50  # of a total: multiples of its 2^-50 add up without rounding, in any order
_STEPS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # relative, from the best multipliers to others


def improved(
    pool: Pool, multipliers: Float64[Floats, " units"], incumbent: Int64[Ints, " sites"]
) -> tuple[Int64[Ints, " sites"], float]:
    """The best choice that was found, and a lower bound of the price of any.

    Narrow searches come first: what they find leaves fewer options and sums to the wider ones.

    Args:
        pool: the options.
        multipliers: the best, or nearly.
        incumbent: a choice within the limits.

    Returns:
        A choice that is not worse than the incumbent; the bound, its price where that is proven.
    """
    best, price, bound = incumbent, pool.price(incumbent), pool.dual(multipliers)[0]
    rows = _around(multipliers)
    for width, order in _rounds(pool):
        if price - bound <= SLACK * price:
            break
        found, missed = _search(pool, rows, price * (1 + SLACK), width, order)
        if found is not None and pool.price(found) < price:
            best, price = found, pool.price(found)
        bound = max(bound, min(price, missed))
    return best, bound


def any_within(pool: Pool) -> Int64[Ints, " sites"] | None:
    """Some choice within the limits; None if there is none, or none was found.

    With prices of 0, a bound above 0 says that a weighted sum of the limits cannot be kept.
    """
    free = replace(pool, prices=np.zeros_like(pool.prices))
    rows = _around(1 / or_one(pool.limits))
    ceiling = 4 * SLACK * len(pool.limits)  # the multipliers are at most twice 1 / limits
    for width, order in _rounds(pool):
        found, missed = _search(free, rows, ceiling, width, order)
        if found is not None or missed == np.inf:
            return found
    return None


def _around(multipliers: Float64[Floats, " units"]) -> Float64[Floats, "rows units"]:
    """The multipliers, none, and others near and far in the direction of each unit, and of all."""
    units = len(multipliers)
    directions = [sign * axis for axis in (*np.eye(units), np.ones(units)) for sign in (1.0, -1.0)]
    others = [multipliers * (1 + step) ** axis for step in _STEPS for axis in directions]
    rows = np.stack([multipliers, 0 * multipliers, *others])
    return rows[np.sort(np.unique(rows, axis=0, return_index=True)[1])]


@dataclass(frozen=True, eq=False)
class _Core:
    """The options that a choice may have whose price is at most a ceiling.

    Attributes:
        pool: they. Prices, costs and limits are whole numbers of a grid's units and counted from a
            base choice: sums are exact, equal ones are seen to be equal, and bounds keep digits.
        members: their index in the whole pool.
        rows: multipliers, in units of the grid.
        unit: of prices.
        base: price of the base choice, in that unit.
        ceiling: the most that the price may be, in that unit and from the base.
    """

    pool: Pool
    members: Int64[Ints, " all"]
    rows: Float64[Floats, "rows units"]
    unit: float
    base: float
    ceiling: float


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over the sites so far, one option of each; on the core's grid.

    Attributes:
        prices: so far.
        costs: so far.
        lower: bounds of the price of what the sums may become.
        parents: index of the sum before the last site.
        options: index in the core of the last site's option.
    """

    prices: Float64[Floats, " sums"]
    costs: Float64[Floats, "sums units"]
    lower: Float64[Floats, " sums"]
    parents: Int64[Ints, " sums"]
    options: Int64[Ints, " sums"]

    def only(self, which: Int64[Ints, " some"]) -> _Sums:
        """Some of them."""
        return _Sums(
            self.prices[which],
            self.costs[which],
            self.lower[which],
            self.parents[which],
            self.options[which],
        )


def _search(
    pool: Pool,
    rows: Float64[Floats, "rows units"],
    ceiling: float,
    width: int,
    order: Callable[[Pool], Int64[Ints, " sites"]],
) -> tuple[Int64[Ints, " sites"] | None, float]:
    """The best choice within the limits whose price is at most a ceiling.

    Site by site, all sums of one option each are kept that are within the limits beside the least
    of the other sites, whose bound is at most the ceiling, and that no other sum equals or is below
    in price and every unit: minimal-core dynamic programming (Pisinger 1995). The bound is the best
    under several multipliers, as those of the whole are not the best for what a sum leaves over.

    Args:
        pool: the options.
        rows: multipliers, the best of the whole first.
        ceiling: the most that the price may be.
        width: how many sums to keep; those of least bound where there are more.
        order: of the sites.

    Returns:
        The choice, None if there is none among the sums that were kept; the least bound of the
        sums that were let go, inf if there are none and the answer is therefore exact.
    """
    core = _core(pool, rows, ceiling)
    if core is None:
        return None, np.inf
    root = np.zeros(1, dtype=np.int64)
    sums = _Sums(np.zeros(1), np.zeros((1, len(pool.limits))), np.zeros(1), root, root)
    steps: list[_Sums] = []
    missed = np.inf
    starts = core.pool.starts()
    floors = np.minimum.reduceat(core.pool.costs, starts, axis=0)
    values = core.pool.prices[:, None] + core.pool.costs @ core.rows.T
    duals = np.minimum.reduceat(values, starts, axis=0)
    left, rest = floors.sum(axis=0), duals.sum(axis=0) - core.rows @ core.pool.limits
    for site in order(core.pool):
        left, rest = left - floors[site], rest - duals[site]
        sums = _extended(core, sums, np.flatnonzero(core.pool.sites == site), left, rest)
        sums, lost = _narrowed(sums, width)
        missed = min(missed, (core.base + lost) * core.unit * (1 - SLACK))
        steps.append(sums)
    for last in np.argsort(sums.prices, kind="stable"):
        choice = core.members[_traced(steps, int(last))]
        if pool.fits(choice):
            return choice, missed
    return None, missed


def _core(pool: Pool, rows: Float64[Floats, "rows units"], ceiling: float) -> _Core | None:
    """The core under multipliers; None if a site has no option in it, so no choice has."""
    members = np.arange(len(pool.prices))
    for multipliers in (rows[:1], rows):  # one first, as it leaves few to the others
        near = pool.only(members)
        inside = np.ones(len(members), dtype=np.bool_)
        for row in multipliers:
            bound, excess = near.dual(row)
            inside &= bound + excess <= ceiling
        members = members[inside]
        if len(np.unique(pool.sites[members])) < len(pool.starts()):
            return None
    near = pool.only(members)
    unit, units = float(_grid(np.array([ceiling]))[0]), _grid(pool.limits)
    prices, costs = np.round(near.prices / unit), np.round(near.costs / units)
    limits = np.floor(near.limits * (1 + 2 * SLACK) / units)  # with room for the rounding
    base = near.lowest(near.prices + near.costs @ rows[0])
    core = replace(
        near,
        prices=prices - prices[base][near.sites],
        costs=costs - costs[base][near.sites],
        limits=limits - costs[base].sum(axis=0),
    )
    above = float(prices[base].sum())
    return _Core(core, members, rows * units / unit, unit, above, ceiling / unit - above)


def _grid(totals: Float64[Floats, " totals"]) -> Float64[Floats, " totals"]:
    """A power of two near 2^-50 of each total."""
    return 2.0 ** (np.ceil(np.log2(or_one(totals))) - _BITS)


def _extended(
    core: _Core,
    sums: _Sums,
    site: Int64[Ints, " some"],
    left: Float64[Floats, " units"],
    rest: Float64[Floats, " rows"],
) -> _Sums:
    """Each sum with each option of a site, where limits and ceiling leave that open.

    Args:
        core: the options.
        sums: over the sites before.
        site: its options.
        left: the least cost of the sites after.
        rest: under each multiplier, the least value of the sites after, less that of the limits.
    """
    prices = sums.prices[:, None] + core.pool.prices[site]
    costs = sums.costs[:, None] + core.pool.costs[site]
    first = prices + costs @ core.rows[0] + rest[0]  # cheap, and leaves few to the other bounds
    open_ = (first <= core.ceiling) & (costs + left <= core.pool.limits).all(axis=2)
    parents, columns = np.nonzero(open_)
    prices, costs = prices[open_], costs[open_]
    lower = prices + (costs @ core.rows.T + rest).max(axis=1)
    extended = _Sums(prices, costs, lower, parents, site[columns])
    return extended.only(np.flatnonzero(lower <= core.ceiling))


def _narrowed(sums: _Sums, width: int) -> tuple[_Sums, float]:
    """The sums of least bound that no other dominates; the least bound of those beyond the width.

    They are few before dominance is looked for, which takes a time quadratic in them.
    """
    ranks = np.argsort(sums.lower, kind="stable")
    lost = float(sums.lower[ranks[width]]) if len(ranks) > width else np.inf
    sums = sums.only(ranks[:width])
    return sums.only(efficient(sums.prices, sums.costs)), lost


def _traced(steps: list[_Sums], last: int) -> Int64[Ints, " sites"]:
    """The options, in the order of the sites, that the last step's sum is made of."""
    options: list[int] = []
    for sums in reversed(steps):
        options.append(int(sums.options[last]))
        last = int(sums.parents[last])
    return np.sort(np.array(options))


def _fewest_options(pool: Pool) -> Int64[Ints, " sites"]:
    """Sites in order of their number of options: what is left to decide late is much."""
    return np.argsort(np.bincount(pool.sites), kind="stable")


def _widest_costs(pool: Pool) -> Int64[Ints, " sites"]:
    """Sites in order of how much their options differ in cost, most first, so the last fill up."""
    spread = np.maximum.reduceat(pool.costs, pool.starts(), axis=0)
    spread -= np.minimum.reduceat(pool.costs, pool.starts(), axis=0)
    return np.argsort(-(spread / or_one(pool.limits)).sum(axis=1), kind="stable")


def _rounds(pool: Pool) -> list[tuple[int, Callable[[Pool], Int64[Ints, " sites"]]]]:
    """Widths of the searches, and their orders of the sites; the widest one for up to three units.

    Bounds get worse and dominance rarer with the number of units, so wide searches there are slow.
    """
    return [(width, order) for width, order in _ROUNDS if width * len(pool.limits) <= _WIDEST]


# Which order is the better one differs from case to case.
_ROUNDS: tuple[tuple[int, Callable[[Pool], Int64[Ints, " sites"]]], ...] = (
    (200, _fewest_options),
    (200, _widest_costs),
    (1_000, _fewest_options),
    (1_000, _widest_costs),
    (5_000, _fewest_options),
    (20_000, _widest_costs),
)
_WIDEST = 60_000  # sums times units
