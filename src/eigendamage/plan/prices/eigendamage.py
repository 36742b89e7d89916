"""EigenDamage: rows and columns of the weight in the Kronecker-factored eigenbasis.

Wang, Grosse, Fidler, Zhang, "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis",
ICML 2019. In that basis the Fisher is (nearly) diagonal, so what is removed needs no repair, and
one global threshold over the prices of all rows and columns decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.curvature import LayerCurvature
from eigendamage.plan._threshold import kept_above


@dataclass(frozen=True, eq=False)
class UnitPrices:
    """The price of each row and column of a layer's rotated weight, and of any block of them.

    Attributes:
        loss: ½ w'² λ summed over kernel offsets, (o, i): what each entry of W' is worth.
        ranks: (r_o, r_i), the last rows and columns that are there to be removed; W' is zero in
            the others. (o, i) but for a factored layer.
        rows: the price of removing a row alone, (o,).
        columns: the price of removing a column alone, (i,).
    """

    loss: Float[Tensor, "o i"]
    ranks: tuple[int, int]

    @cached_property
    def rows(self) -> Float[Tensor, " o"]:
        """½ Σ w'² λ over each row."""
        return self.loss.sum(1)

    @cached_property
    def columns(self) -> Float[Tensor, " i"]:
        """½ Σ w'² λ over each column."""
        return self.loss.sum(0)

    @property
    def units(self) -> Float[Tensor, " units"]:
        """The prices of all rows and columns that are there to be removed."""
        return torch.cat([self.rows[-self.ranks[0] :], self.columns[-self.ranks[1] :]])

    def kept(self, threshold: float, max_ratio: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The rows and columns that a threshold leaves; see `kept_above`."""
        sides: list[tuple[int, ...]] = []
        for prices, rank in zip((self.rows, self.columns), self.ranks, strict=True):
            before = len(prices) - rank
            stay = kept_above(prices[before:], threshold, max_ratio)
            sides.append(tuple(before + at for at in stay))
        return sides[0], sides[1]

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
    loss = (0.5 * rotated.square() * eigenvalues.double()).sum(2)
    return UnitPrices(loss, (loss.shape[0], loss.shape[1]))


def layer_prices(weight: Float[Tensor, "o i K"], curvature: LayerCurvature) -> UnitPrices:
    """`unit_prices` of a layer, on the CPU."""
    c = curvature
    prices = unit_prices(weight.cpu(), c.Q_S.cpu(), c.Q_A.cpu(), c.eigenvalues.cpu())
    return replace(prices, ranks=c.ranks)
