"""Prices corrected by what layers were measured to cost alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from eigendamage.files import Frozen


class Point(Frozen):
    """What one change of a layer was priced at and what it was measured to cost alone.

    Attributes:
        price: expected rise of the loss.
        measured: divergence of the model with this layer alone changed and repaired.
    """

    price: float
    measured: float

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

        Beyond the prices seen the nearest factor holds; a layer that was not measured has the
        geometric mean of all factors. Without any point prices are as they were.
        """
        if not self.points:
            return prices
        mine = sorted(self.points.get(name, ()), key=lambda p: p.price)
        if not mine:
            return prices * self.typical
        at = [math.log(p.price) for p in mine]
        factors = [math.log(p.factor) for p in mine]
        found = prices.copy()
        some = prices > 0
        found[some] *= np.exp(np.interp(np.log(prices[some]), at, factors))
        # Steeper falls than the prices' own rises would make a dearer option the better one.
        return found

    @property
    def typical(self) -> float:
        """The geometric mean of all factors, 1 if there is none."""
        factors = [p.factor for points in self.points.values() for p in points]
        return math.exp(sum(map(math.log, factors)) / len(factors)) if factors else 1.0

    def extended(self, found: Mapping[str, Sequence[Point]]) -> Calibration:
        """With more points; those without a price or a divergence to compare are left out."""
        points = {name: list(old) for name, old in self.points.items()}
        for name, new in found.items():
            usable = [p for p in new if p.price > 0 and p.measured > 0]
            if usable:
                points.setdefault(name, []).extend(usable)
        return Calibration(points={name: tuple(p) for name, p in points.items()})
