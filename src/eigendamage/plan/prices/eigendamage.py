"""EigenDamage: rows and columns of the weight in the Kronecker-factored eigenbasis.

Wang, Grosse, Fidler, Zhang, "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis",
ICML 2019. In that basis the Fisher is (nearly) diagonal, so what is removed needs no repair, and
one global threshold over the prices of all rows and columns decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.curvature import LayerCurvature


@dataclass(frozen=True, eq=False)
class UnitPrices:
    """The price of each row and column of a layer's rotated weight, and of any block of them.

    Attributes:
        loss: ½ w'² λ summed over kernel offsets, (o, i): what each entry of W' is worth.
        rows: the price of removing a row alone, (o,).
        columns: the price of removing a column alone, (i,).
    """

    loss: Float[Tensor, "o i"]

    @cached_property
    def rows(self) -> Float[Tensor, " o"]:
        """½ Σ w'² λ over each row."""
        return self.loss.sum(1)

    @cached_property
    def columns(self) -> Float[Tensor, " i"]:
        """½ Σ w'² λ over each column."""
        return self.loss.sum(0)

    def of_block(self, rows: Tensor, columns: Tensor) -> float:
        """The price of keeping only these rows and columns: all that lies outside the block."""
        kept = self.loss[rows][:, columns].sum()
        return max(0.0, float(self.loss.sum() - kept))


def rotated_weight(
    weight: Float[Tensor, "o i K"], Q_S: Float[Tensor, "o o"], Q_A: Float[Tensor, "i i"]
) -> Float[Tensor, "o i K"]:
    """W' = Q_Sᵀ W Q_A for every kernel offset, in float64."""
    return torch.einsum("op,oik,iq->pqk", Q_S.double(), weight.double(), Q_A.double())


def unit_prices(
    weight: Float[Tensor, "o i K"],
    Q_S: Float[Tensor, "o o"],
    Q_A: Float[Tensor, "i i"],
    eigenvalues: Float[Tensor, "o i K"],
) -> UnitPrices:
    """½ w'² λ for every entry of the rotated weight (paper, eq. 10, with the factor ½ kept)."""
    rotated = rotated_weight(weight, Q_S, Q_A)
    return UnitPrices((0.5 * rotated.square() * eigenvalues.double()).sum(2))


def layer_prices(weight: Float[Tensor, "o i K"], curvature: LayerCurvature) -> UnitPrices:
    """`unit_prices` of a layer, on the CPU."""
    c = curvature
    return unit_prices(weight.cpu(), c.Q_S.cpu(), c.Q_A.cpu(), c.eigenvalues.cpu())


def threshold_at(prices: Mapping[str, UnitPrices], ratio: float) -> float:
    """The price that the cheapest ``ratio`` of all units do not exceed; below all of them at 0."""
    every = torch.cat([torch.cat([p.rows, p.columns]) for p in prices.values()]).sort().values
    if ratio <= 0:
        return -1.0
    return float(every[min(int(ratio * len(every)), len(every) - 1)])


def kept_above(
    price: Float[Tensor, " units"], threshold: float, max_ratio: float
) -> tuple[int, ...]:
    """Indices of the units of one side that stay: those above the threshold, and never too few.

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
    return tuple(int(k) for k in keep.nonzero().flatten())
