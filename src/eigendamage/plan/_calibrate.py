"""Prices corrected by what layers were measured to cost alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eigendamage.documents import Frozen

WEIGHT = 0.5
"""Of a layer's own factor beside that which is typical of its kind, where prices are compared."""
OF_CHANNELS = "channels of "
"""Before the name of a group, what it is calibrated under; a layer is under its own name."""


class Point(Frozen):
    """What one change of a layer was priced at and what it was measured to cost alone.

    Attributes:
        price: expected rise of the loss.
        measured: divergence of the model with this layer alone changed and repaired.
    """

    price: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    measured: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @property
    def factor(self) -> float:
        """By how much the price is too low."""
        return self.measured / self.price


class Calibration(Frozen):
    """Each layer's factor between price and measured divergence, at the prices seen.

    Attributes:
        points: by layer, or ``channels of GROUP``.
    """

    points: Mapping[str, tuple[Point, ...]] = {}

    def corrected(self, name: str, prices: NDArray[np.float64]) -> NDArray[np.float64]:
        """Prices times the layer's factor, interpolated between the logarithms of what was seen.

        Beyond the prices seen the nearest factor holds. A divergence below that of a lower price
        is taken for as much as that, so what is dearer stays dearer. A layer that was not measured
        has the geometric mean of the factors of its kind (layers or channels), or of all. Without
        any point prices are as they were.
        """
        if not self.points:
            return prices
        mine = sorted(self.points.get(name, ()), key=lambda p: p.price)
        if not mine:
            return prices * self._typical(name)
        at = np.log([p.price for p in mine])
        factors = np.log(np.maximum.accumulate([p.measured for p in mine])) - at
        found = prices.copy()
        some = prices > 0
        found[some] *= np.exp(np.interp(np.log(prices[some]), at, factors))
        return found

    def weighed(self, name: str, prices: NDArray[np.float64]) -> NDArray[np.float64]:
        """Prices to choose by: those of a layer corrected half-way from the typical factor.

        A factor is measured on few inputs and at other prices than it is used for. Taken in full,
        its errors move ranks between layers to where they do less. Factors of channels differ so
        much that they are taken in full.
        """
        found = self.corrected(name, prices)
        if not self.points or name.startswith(OF_CHANNELS):
            return found
        return (prices * self._typical(name)) ** (1 - WEIGHT) * found**WEIGHT

    def _typical(self, name: str) -> float:
        of_channels = name.startswith(OF_CHANNELS)
        kin = [n for n in self.points if n.startswith(OF_CHANNELS) == of_channels]
        factors = [p.factor for n in kin or self.points for p in self.points[n]]
        return math.exp(sum(map(math.log, factors)) / len(factors)) if factors else 1.0

    def extended(self, found: Mapping[str, Sequence[tuple[float, float]]]) -> Calibration:
        """With more (price, divergence); those of which one is 0 tell nothing and are left out."""
        points = {name: list(old) for name, old in self.points.items()}
        for name, new in found.items():
            usable = [Point(price=p, measured=m) for p, m in new if p > 0 and m > 0]
            if usable:
                points.setdefault(name, []).extend(usable)
        return Calibration(points={name: tuple(p) for name, p in points.items()})
