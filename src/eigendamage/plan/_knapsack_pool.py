"""The options of all sites of a multiple-choice knapsack as one table, and choices from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SLACK = 1e-12  # relative: what the rounding of a sum may add to a limit, and to a price
_BLOCK = 4096  # columns of bits that `efficient` holds at once


@dataclass(frozen=True, eq=False)
class Pool:
    """The options of all menus, those of a site together, in order of price, then of cost.

    So the first of options with one price is also among the cheapest to run, and the other way
    round: ties are broken in one way. A choice is an index into the pool for every site.

    Attributes:
        prices: of each option.
        costs: of each option, in each unit.
        sites: the site of each option, from 0 without holes, rising.
        options: index of each option in its site's menu.
        limits: the most that may be spent in each unit.
    """

    prices: Float64[Floats, " all"]
    costs: Float64[Floats, "all units"]
    sites: Int64[Ints, " all"]
    options: Int64[Ints, " all"]
    limits: Float64[Floats, " units"]

    def only(self, which: Bool[Bools, " all"] | Int64[Ints, " some"]) -> Pool:
        """Some of the options, by mask or index; the order must stay."""
        kept = (self.prices[which], self.costs[which], self.sites[which], self.options[which])
        return Pool(*kept, self.limits)

    def starts(self) -> Int64[Ints, " sites"]:
        """Where each site's options begin."""
        return np.flatnonzero(np.diff(self.sites, prepend=-1))

    def lowest(self, values: Float64[Floats, " all"]) -> Int64[Ints, " sites"]:
        """The choice of the least value at every site, the first where several are equal."""
        least_values = np.minimum.reduceat(values, self.starts())
        hits = np.flatnonzero(values == least_values[self.sites])
        return hits[np.flatnonzero(np.diff(self.sites[hits], prepend=-1))]

    def price(self, choice: Int64[Ints, " sites"]) -> float:
        """Total price."""
        return float(self.prices[choice].sum())

    def cost(self, choice: Int64[Ints, " sites"]) -> Float64[Floats, " units"]:
        """Total cost in each unit."""
        return self.costs[choice].sum(axis=0)

    def within(self, totals: Float64[Floats, "totals units"]) -> Bool[Bools, " totals"]:
        """Which totals are within the limit in every unit."""
        return np.all(totals <= self.limits * (1 + SLACK), axis=1)

    def fits(self, choice: Int64[Ints, " sites"]) -> bool:
        """Whether the choice is within the limit in every unit."""
        return bool(self.within(self.cost(choice)[None])[0])

    def dual(self, multipliers: Float64[Floats, " units"]) -> tuple[float, Float64[Floats, " all"]]:
        """The Lagrangian bound of multipliers, and each option's excess over its site's best.

        price − bound of a choice is the sum of its options' excess and of multipliers · what it
        leaves of the limits: within the limits, all of these are at least 0.
        """
        values = self.prices + self.costs @ multipliers
        base = self.lowest(values)
        # as one difference of costs: the bound is a small one of large numbers otherwise
        bound = self.price(base) + float((self.cost(base) - self.limits) @ multipliers)
        return bound, values - values[base][self.sites]


def or_one(values: Float64[Floats, "*any"]) -> Float64[Floats, "*any"]:
    """With 1 in the place of 0, to divide by."""
    return np.where(values > 0, values, 1.0)


def efficient(
    prices: Float64[Floats, " n"], costs: Float64[Floats, "n units"]
) -> Int64[Ints, " kept"]:
    """Those that no other equals or is below in price and every unit, in order of price, then cost.

    Of equal ones the first stays. One unit takes a running minimum. More take n² · (units + 1)
    bits: for each column, those at or before an element, whose intersection is what dominates it.
    """
    keys = np.column_stack([prices, costs])
    order = np.lexsort(keys.T[::-1])
    keys = keys[order]
    if keys.shape[1] == 2:
        before = np.minimum.accumulate(np.append(np.inf, keys[:-1, 1]))
        return order[keys[:, 1] < before]
    new = np.append([True], (keys[1:] != keys[:-1]).any(axis=1))[: len(keys)]
    order, keys = order[new], keys[new]
    numbers = np.arange(len(keys))
    sorts = np.argsort(keys, axis=0, kind="stable")
    places = np.argsort(sorts, axis=0)  # of each element in each column's order
    ends = np.stack(
        [np.searchsorted(c[s], c, "right") - 1 for c, s in zip(keys.T, sorts.T, strict=True)]
    )
    dominated = np.zeros(len(keys), dtype=np.bool_)
    for start in range(0, len(keys), _BLOCK):
        block = numbers[start : start + _BLOCK]
        words, flags = (block - start) // 64, np.uint64(1) << ((block - start) % 64).astype("u8")
        shared = np.full((len(keys), words[-1] + 1), ~np.uint64(0))
        for place, end in zip(places.T, ends, strict=True):
            bits = np.zeros_like(shared)
            bits[place[block], words] = flags
            shared &= np.bitwise_or.accumulate(bits, axis=0)[end]
        shared[block, words] &= ~flags  # not by itself
        dominated |= shared.any(axis=1)
    return order[~dominated]
