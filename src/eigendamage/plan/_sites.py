"""Sites of the allocation: layers that are decided alone, or together with their channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eigendamage.plan._knapsack import Menu
from eigendamage.plan._knapsack_pool import efficient

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
# Options of a layer that are paired with those of the others of its site, by number of units.
_PAIRED = {1: 384, 2: 128, 3: 64, 4: 40}


@dataclass(frozen=True, eq=False)
class Listing:
    """Options of one layer, or of one group of channels, in the units of a budget.

    Attributes:
        prices: by option, calibrated.
        costs: by option and unit.
        index: of each option in its menu.
    """

    prices: Floats
    costs: Floats
    index: Integers

    def front(self) -> Listing:
        """Those that no other beats or equals in price and all costs, cheapest first."""
        return self._take(efficient(self.prices, self.costs))

    def thinned(self, count: int) -> Listing:
        """About ``count`` of them, evenly by price, with the cheapest in every unit."""
        if len(self.prices) <= count:
            return self
        even = np.linspace(0, len(self.prices) - 1, count).round().astype(np.int64)
        return self._take(np.unique(np.concatenate([even, self.costs.argmin(0)])))

    def _take(self, which: Integers) -> Listing:
        return Listing(self.prices[which], self.costs[which], self.index[which])


@dataclass(frozen=True, eq=False)
class Site:
    """Layers that are decided together: one alone, or those that share a group of channels.

    Attributes:
        layers: their dotted paths.
        group: the group whose channels may go instead; None for a layer alone.
        menu: prices and costs.
        picks: for each option and layer the option of the layer's menu; −1 where channels go.
        channels: for each option that of the group's menu; −1 where none go.
    """

    layers: tuple[str, ...]
    group: str | None
    menu: Menu
    picks: NDArray[np.int64]
    channels: Integers


def layer_site(name: str, listing: Listing) -> Site:
    """A layer that is decided alone."""
    best = listing.front()
    return Site(
        layers=(name,),
        group=None,
        menu=Menu(best.prices, best.costs),
        picks=best.index[:, None],
        channels=np.full(len(best.index), -1),
    )


def group_site(
    group: str,
    channels: Listing,
    layers: Mapping[str, Listing],
    carriers: Floats,
) -> Site:
    """Layers that make and read a group of channels: each by its own menu, or channels go.

    Args:
        group: its name.
        channels: the group's options; their costs are those of all layers and carriers.
        layers: the options of each layer.
        carriers: cost of the carriers as they are, by unit.
    """
    units = len(carriers)
    prices, costs = np.zeros(1), carriers[None].astype(np.float64)
    picks = np.zeros((1, 0), np.int64)
    for listing in layers.values():
        best = listing.front().thinned(_PAIRED[units])
        summed = (prices[:, None] + best.prices).ravel()
        spent = (costs[:, None] + best.costs).reshape(-1, units)
        both = efficient(summed, spent)
        old, new = np.divmod(both, len(best.prices))
        picks = np.concatenate([picks[old], best.index[new][:, None]], 1)
        prices, costs = summed[both], spent[both]
    none = np.full((len(channels.index), len(layers)), -1)
    prices = np.concatenate([prices, channels.prices])
    costs = np.concatenate([costs, channels.costs])
    picks = np.concatenate([picks, none])
    gone = np.concatenate([np.full(len(picks) - len(none), -1), channels.index])
    best = efficient(prices, costs)
    return Site(
        layers=tuple(layers),
        group=group,
        menu=Menu(prices[best], costs[best]),
        picks=picks[best],
        channels=gone[best],
    )
