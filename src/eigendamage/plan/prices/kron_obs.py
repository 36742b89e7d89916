"""Kron-OBS: filters and inputs under F ≈ S ⊗ A, with what stays repaired.

Baseline of Wang, Grosse, Fidler, Zhang 2019 (EigenDamage), where it removes filters one at a time.
Here also the inputs' side, and the joint optimum for any rows and columns that go together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eigendamage.plan.prices._inverse import damped, solve


def row_prices(
    W: Float[Tensor, "o m"], S_inverse: Float[Tensor, "o o"], A: Float[Tensor, "m m"]
) -> Float[Tensor, " o"]:
    """½ w_rᵀ A w_r / [S⁻¹]_rr: removing row r of W with the others repaired, in float64."""
    wide = W.double()
    return 0.5 * ((wide @ A.double()) * wide).sum(1) / S_inverse.double().diagonal()


def official_row_prices(
    W: Float[Tensor, "o m"], S_inverse: Float[Tensor, "o o"], A: Float[Tensor, "m m"]
) -> Float[Tensor, " o"]:
    """½ Σ_j (w²A)_rj / [S⁻¹]_rr, which the official code computes where the paper says wᵀAw."""
    return 0.5 * (W.double().square() @ A.double().sum(1)) / S_inverse.double().diagonal()


def column_prices(
    W: Float[Tensor, "o m"],
    S: Float[Tensor, "o o"],
    A_inverse: Float[Tensor, "m m"],
    groups: Sequence[Sequence[int]],
) -> Float[Tensor, " groups"]:
    """½ tr S W_g (P_gg)⁻¹ W_gᵀ with P = A⁻¹: removing the columns g with the others repaired.

    For one column it is ½ (WᵀSW)_cc / [A⁻¹]_cc. In float64.

    Args:
        W: the weight.
        S: the gradients' factor.
        A_inverse: the inverse of the inputs' factor, positive definite.
        groups: columns that go together: all kernel offsets of a channel, say. None is empty.
    """
    wide, P = W.double(), A_inverse.double()
    moved = S.double() @ wide
    prices = wide.new_zeros(len(groups))
    of_size: defaultdict[int, list[int]] = defaultdict(list)
    for at, group in enumerate(groups):
        of_size[len(group)].append(at)
    for members in of_size.values():
        columns = torch.tensor([list(groups[at]) for at in members], device=wide.device)
        prices[members] = _after_repair(wide, moved, P, columns)
    return prices


def plain_column_prices(
    W: Float[Tensor, "o m"],
    S: Float[Tensor, "o o"],
    A: Float[Tensor, "m m"],
    groups: Sequence[Sequence[int]],
) -> Float[Tensor, " groups"]:
    """½ tr S W_g A_gg W_gᵀ: removing the columns g with nothing repaired, in float64."""
    wide, moments = W.double(), A.double()
    moved = S.double() @ wide
    return torch.stack(
        [0.5 * (wide[:, g].T @ moved[:, g] * moments[g][:, g]).sum() for g in map(list, groups)]
    )


def _after_repair(
    V: Float[Tensor, "o m"],
    moved: Float[Tensor, "o m"],
    P: Float[Tensor, "m m"],
    columns: Int[Tensor, "n g"],
) -> Float[Tensor, " n"]:
    """½ tr S V_g (P_gg)⁻¹ V_gᵀ for groups of columns of equal size; ``moved`` is S V."""
    blocks = torch.linalg.cholesky(P[columns[:, :, None], columns[:, None, :]])
    worth = torch.einsum("ogk,ogl->gkl", V[:, columns], moved[:, columns])
    return 0.5 * torch.cholesky_solve(worth, blocks).diagonal(dim1=1, dim2=2).sum(1)


_COMPACT = 0.8  # of its columns an elimination goes on with those that are left


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads channels which go together in several layers.

    Attributes:
        W: its weight, (o, m).
        S: its gradients' factor.
        A_inverse: the inverse of its inputs' factor, positive definite.
        groups: for each channel the columns that read it, equally many each.
    """

    W: Float[Tensor, "o m"]
    S: Float[Tensor, "o o"]
    A_inverse: Float[Tensor, "m m"]
    groups: Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Elimination:
    """In which order channels go, and what each costs in its turn.

    Attributes:
        order: channels, the first to go first.
        rises: for each place in the order the rise of ½ tr S (W−X) A (W−X)ᵀ, readers repaired.
    """

    order: tuple[int, ...]
    rises: Float[Tensor, " channels"]


def eliminate(readers: Sequence[Reader]) -> Elimination:
    """Backward elimination of channels from the layers that read them.

    Channels go one at a time, each time the one whose removal raises ½ tr S (W−X) A (W−X)ᵀ least,
    summed over the readers under their optimal X: with P = A_LL⁻¹ of what is left and V = X it is
    ½ tr S V_g (P_gg)⁻¹ V_gᵀ; then V ← V − V_g P_gg⁻¹ P_g: and P its Schur complement. So a rise
    knows of the channels that went before, unlike `column_prices`, and rises add up to what the
    first ones cost together. In float64. Cost: an (o × m) and an (m × m) update of rank |g| a
    channel and reader.

    Args:
        readers: the layers that read the channels; every one has all channels.
    """
    states = [_Elimination(reader) for reader in readers]
    left = list(range(len(readers[0].groups)))
    order: list[int] = []
    rises: list[float] = []
    while left:
        costs = torch.stack([state.prices(left) for state in states]).sum(0)
        at = int(costs.argmin())
        rises.append(max(0.0, float(costs[at])))
        gone = left.pop(at)
        order.append(gone)
        for state in states:
            state.remove(gone)
    return Elimination(tuple(order), torch.tensor(rises, dtype=torch.float64))


def elimination_prices(readers: Sequence[Reader]) -> Float[Tensor, " channels"]:
    """What each channel costs when its turn comes in `eliminate`.

    Where one is below an earlier one the price is that of the earlier one, so that prices are in
    the order of removal; their sum is then above the joint rise.
    """
    found = eliminate(readers)
    prices = torch.zeros_like(found.rises)
    prices[list(found.order)] = found.rises.cummax(0).values
    return prices


class _Elimination:
    """One reader from which channels are eliminated."""

    def __init__(self, reader: Reader) -> None:
        self._weight = reader.W.double().clone()
        self._moved = reader.S.double() @ self._weight
        self._inverse = reader.A_inverse.double().clone()
        # Where each channel's columns are in these, and which of theirs have not gone.
        self._places = torch.tensor([list(g) for g in reader.groups], device=reader.W.device)
        self._stays = torch.ones(reader.W.shape[1], dtype=torch.bool, device=reader.W.device)

    def prices(self, channels: Sequence[int]) -> Float[Tensor, " channels"]:
        """½ tr S V_g (P_gg)⁻¹ V_gᵀ for each of these channels."""
        columns = self._places[list(channels)]
        return _after_repair(self._weight, self._moved, self._inverse, columns)

    def remove(self, channel: int) -> None:
        """Take a channel out and repair the rest."""
        g = self._places[channel]
        taken = torch.linalg.solve(self._inverse[g][:, g], self._inverse[g])
        for matrix in (self._weight, self._moved, self._inverse):
            matrix.addmm_(matrix[:, g], taken, alpha=-1)
        self._stays[g] = False
        if int(self._stays.sum()) < _COMPACT * len(self._stays):
            self._drop()

    def _drop(self) -> None:
        """Hold no longer what has gone: it is zero, and updates take time for it."""
        left = self._stays.nonzero().squeeze(1)
        self._weight, self._moved = self._weight[:, left], self._moved[:, left]
        self._inverse = self._inverse[left][:, left]
        self._places = (self._stays.cumsum(0) - 1)[self._places]
        self._stays = self._stays[left]


def one_at_a_time_update(
    W: Float[Tensor, "o m"], S_inverse: Float[Tensor, "o o"], pruned: Sequence[int]
) -> Float[Tensor, "o m"]:
    """W − Σ_p S⁻¹e_p w_pᵀ / [S⁻¹]_pp over the pruned rows p, as in the official code.

    The repairs overlap: with several rows the pruned ones are not zero, the caller drops them, and
    what is left can cost more than no repair. `joint_update` is the optimum.
    """
    rows = list(pruned)
    S_inverse = S_inverse.double()
    return W.double() - (S_inverse / S_inverse.diagonal())[:, rows] @ W.double()[rows]


def joint_update(
    W: Float[Tensor, "o m"],
    S: Float[Tensor, "o o"],
    A: Float[Tensor, "m m"],
    rows: Sequence[int],
    columns: Sequence[int],
    damping: float,
) -> Float[Tensor, "rows columns"]:
    """The X on the kept rows K and columns L that minimises ½ tr S (W−X) A (W−X)ᵀ, in float64.

    X = S_KK⁻¹ S_K: W A_:L A_LL⁻¹ of the damped factors, written as what is kept plus what it takes
    over: S_KK⁻¹ S_K: W = W_K + S_KK⁻¹ S_KR W_R for the rows R that go, and likewise for columns. So
    with singular factors and no damping, where the minimiser is not unique, it is near W.

    Args:
        W: the weight.
        S: the gradients' factor.
        A: the inputs' factor.
        rows: those that stay, in the order of the result.
        columns: those that stay, likewise.
        damping: added to both factors, relative to their scale; may be 0.
    """
    repaired = _take_over(W.double(), damped(S, damping), rows)
    return _take_over(repaired.T, damped(A, damping), columns).T


def _take_over(
    W: Float[Tensor, "c n"], M: Float[Tensor, "c c"], kept: Sequence[int]
) -> Float[Tensor, "k n"]:
    """W_K + M_KK⁻¹ M_KR W_R: the kept rows of W with what is linearly predictable from them."""
    K = list(kept)
    staying = set(K)
    R = [at for at in range(len(M)) if at not in staying]
    if not R:
        return W[K]
    return W[K] + solve(M[K][:, K], M[K][:, R] @ W[R])
