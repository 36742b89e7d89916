"""Ways to shrink a layer as arrays, one entry an option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from eigendamage.layers import FORMS, DenseForm, LayerShape

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Kind(IntEnum):
    """What an option does to a layer."""

    KEEP = 0
    LOW_RANK = 1
    BLOCK = 2


@dataclass(frozen=True, eq=False)
class Options:
    """Ways to shrink a layer, one an entry of each array.

    Attributes:
        kind: see `Kind`.
        form: index into `FORMS`.
        rank_out: r_o; the number of outputs if they are not cut.
        rank_in: r_i.
        basis: which input basis, an index into `LayerMenu.bases`; −1 for none.
        prices: expected rise of the loss.
        macs: of one example.
        params: parameters.
    """

    kind: Integers
    form: Integers
    rank_out: Integers
    rank_in: Integers
    basis: Integers
    prices: Floats
    macs: Floats
    params: Floats

    def __len__(self) -> int:
        return len(self.prices)

    def __add__(self, other: Options) -> Options:
        return Options(
            kind=np.concatenate([self.kind, other.kind]),
            form=np.concatenate([self.form, other.form]),
            rank_out=np.concatenate([self.rank_out, other.rank_out]),
            rank_in=np.concatenate([self.rank_in, other.rank_in]),
            basis=np.concatenate([self.basis, other.basis]),
            prices=np.concatenate([self.prices, other.prices]),
            macs=np.concatenate([self.macs, other.macs]),
            params=np.concatenate([self.params, other.params]),
        )

    def take(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> Options:
        """Some of them."""
        return Options(
            kind=self.kind[which],
            form=self.form[which],
            rank_out=self.rank_out[which],
            rank_in=self.rank_in[which],
            basis=self.basis[which],
            prices=self.prices[which],
            macs=self.macs[which],
            params=self.params[which],
        )


Row = tuple[int, int, int, int, int, float, float, float]


def stacked(rows: Sequence[Row]) -> Options:
    whole = np.array([row[:5] for row in rows], np.int64).reshape(-1, 5)
    real = np.array([row[5:] for row in rows], np.float64).reshape(-1, 3)
    return Options(
        kind=whole[:, 0],
        form=whole[:, 1],
        rank_out=whole[:, 2],
        rank_in=whole[:, 3],
        basis=whole[:, 4],
        prices=real[:, 0],
        macs=real[:, 1],
        params=real[:, 2],
    )


def row_of(
    shape: LayerShape, kind: Kind, form: DenseForm, ranks: tuple[int, int], basis: int, price: float
) -> Row:
    cost = shape.factored(ranks[0], ranks[1], form)
    return (kind, FORMS.index(form), *ranks, basis, price, cost.macs, float(cost.parameters))


def low_rank_row(shape: LayerShape, rank_out: int, rank_in: int, basis: int, price: float) -> Row:
    form: DenseForm = "three"
    if basis < 0:
        form, rank_in = "merge_in", shape.inputs
    elif rank_out >= shape.outputs:
        form, rank_out = "merge_out", shape.outputs
    return row_of(shape, Kind.LOW_RANK, form, (rank_out, rank_in), basis, price)


def rank_grid(size: int, most: int, multiple: int, count: int) -> list[int]:
    """Ranks from 1 to ``most``, ``count`` at most: multiples of ``multiple``, and ``size`` itself.

    Where there is no multiple up to ``most``, all ranks.
    """
    step = multiple * max(1, -(-most // (count * multiple)))
    ranks = list(range(step, most + 1, step)) or list(range(1, most + 1))
    if most >= size and size not in ranks:
        ranks.append(size)
    return ranks


def smaller_than(options: Options, keep: Options) -> Options:
    """Those that take fewer MACs and fewer parameters than the layer as it is."""
    smaller = (options.macs < keep.macs[0]) & (options.params < keep.params[0])
    return options.take(smaller)
