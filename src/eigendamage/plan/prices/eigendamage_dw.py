"""Depthwise separable EigenDamage: what is kept in the eigenbasis, as a sum of R products.

Wang, Grosse, Fidler, Zhang, "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis",
ICML 2019, in its depthwise separable variant: the kept block of W' becomes Σ_r u_r ⊗ v_r ⊗ s_r (CP,
by alternating least squares). The kernel then acts on each of R channels by itself, and u and v are
multiplied into the rotations.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import tensorly
import torch
from jaxtyping import Float
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor

from eigendamage.curvature import LayerCurvature
from eigendamage.errors import EigenDamageError
from eigendamage.plan.prices.eigendamage import rotated_weight

_SWEEPS = 300
_TOLERANCE = 1e-8  # smallest fall, in a sweep, of the error relative to the core
# Relative to the core. Without it large terms grow that cancel each other, which cannot be trained;
# it also keeps a sweep solvable where terms are zero or alike.
_RIDGE = 1e-4
_SMALLEST_SCALE = 1e-3  # relative to the largest: what a zero eigenvalue counts as


@dataclass(frozen=True, eq=False)
class CP:
    """A tensor of shape (o, i, K) as a sum of R products, Σ_r U[o, r] V[i, r] S[r, k].

    Attributes:
        U: factors of the rows, (o, R).
        S: factors of the kernel offsets, (R, K).
        V: factors of the columns, (i, R).
    """

    U: Float[Tensor, "o R"]
    S: Float[Tensor, "R K"]
    V: Float[Tensor, "i R"]

    @property
    def rank(self) -> int:
        """R, the number of terms."""
        return self.S.shape[0]

    def tensor(self) -> Float[Tensor, "o i K"]:
        """The sum."""
        return torch.einsum("or,rk,ir->oik", self.U, self.S, self.V)

    def balanced(self) -> CP:
        """The same sum, the three factors of each term of equal norm; a zero term is left as is.

        Rotations keep the norms, so the three stages made of it have equal Frobenius norms too.
        """
        norms = torch.stack([self.U.norm(dim=0), self.S.norm(dim=1), self.V.norm(dim=0)])
        common = norms.prod(0).pow(1 / 3)
        scale = torch.where(common > 0, common / norms, 1.0)
        return CP(self.U * scale[0], self.S * scale[1].unsqueeze(1), self.V * scale[2])


def default_rank(rows: int, columns: int, offsets: int) -> int:
    """R = min(max(r_o, r_i), K min(r_o, r_i)).

    The larger side, where the paper's code takes the smaller one, but no more terms than a core of
    shape (r_o, r_i, K) can need, min(r_o r_i, r_o K, r_i K); r_o r_i is at least the larger side.
    """
    return min(max(rows, columns), offsets * min(rows, columns))


def cp_core(
    core: Float[Tensor, "o i K"],
    rank: int,
    *,
    row_scale: Float[Tensor, " o"] | None = None,
    column_scale: Float[Tensor, " i"] | None = None,
) -> CP:
    """A rank-R CP of a core, by alternating least squares from its singular vectors, in float64.

    With scales it is fitted to the core whose rows and columns are multiplied by them, and they are
    divided out of the factors: the square roots of Λ_S and Λ_A make the sum of squares that falls
    the price, as K-FAC sees it. A slight ridge keeps terms from growing while they cancel each
    other, so a core that is such a sum is met within a thousandth or so. The result depends on the
    arguments alone.

    Args:
        core: the kept block of W'.
        rank: R, the number of terms, of any size.
        row_scale: weight of a row's error, not negative. Below a thousandth of the largest it
            counts as that, so that zero is no problem. None weighs all alike.
        column_scale: likewise for columns.

    Raises:
        EigenDamageError: if the rank is below 1, or the core or a scale is not finite.
    """
    if rank < 1:
        raise EigenDamageError(f"a CP needs a rank of at least 1, but {rank} was given")
    core = core.detach().double().cpu()
    by_row = _scale(row_scale, core.shape[0])
    by_column = _scale(column_scale, core.shape[1])
    scaled = by_row[:, None, None] * core * by_column[:, None]
    size = float(scaled.norm())
    if not np.isfinite(size):
        raise EigenDamageError(
            "a CP cannot be fitted: the core or its scales are not finite; check the weight and "
            "the curvature for NaN and infinities"
        )
    if size == 0:
        none = [torch.zeros(n, rank, dtype=torch.float64) for n in core.shape]
        return CP(U=none[0], S=none[2].T, V=none[1])
    unit = (scaled / size).numpy()
    with _tensorly_on_numpy():
        fitted = parafac(
            unit,
            rank,
            n_iter_max=_SWEEPS,
            init=_start(unit, rank),  # pyright: ignore[reportArgumentType]
            tol=_TOLERANCE,
            l2_reg=_RIDGE,  # pyright: ignore[reportArgumentType]
            linesearch=True,
        )
    out, into, kernel = (torch.from_numpy(np.ascontiguousarray(f)) for f in fitted.factors)
    found = CP(U=size * out / by_row[:, None], S=kernel.T, V=into / by_column[:, None])
    return found.balanced()


def layer_cp(
    weight: Float[Tensor, "o i K"],
    curvature: LayerCurvature,
    rows: Sequence[int],
    columns: Sequence[int],
    rank: int,
) -> CP:
    """The CP of the rows and columns of W' that are kept, in K-FAC's metric, on the CPU.

    A function of its arguments alone, so a plan need not hold the factors.
    """
    c, kept_rows, kept_columns = curvature, list(rows), list(columns)
    rotated = rotated_weight(weight.cpu(), c.Q_S.cpu(), c.Q_A.cpu())
    return cp_core(
        rotated[kept_rows][:, kept_columns],
        rank,
        row_scale=c.S_eigenvalues.cpu()[kept_rows].clamp(min=0).sqrt(),
        column_scale=c.A_eigenvalues.cpu()[kept_columns].clamp(min=0).sqrt(),
    )


def block_price(
    rotated: Float[Tensor, "o i K"],
    eigenvalues: Float[Tensor, "o i K"],
    rows: Sequence[int],
    columns: Sequence[int],
    cp: CP,
) -> float:
    """½ Σ λ (W' − Ŵ')², where Ŵ' is the CP in the kept block and zero elsewhere."""
    error = rotated.double().clone()
    error[torch.tensor(rows)[:, None], torch.tensor(columns)] -= cp.tensor().to(error)
    return float(0.5 * (eigenvalues.to(error) * error.square()).sum())


def _start(core: Float[np.ndarray, "o i K"], rank: int) -> CPTensor:
    """Terms to start from: the left singular vectors of each unfolding, the leading R of them.

    An unfolding of m rows and n columns has min(m, n); more terms start from random columns of a
    seed of their own. Tensorly's own start has too few columns wherever n is below both m and R.
    """
    random = np.random.RandomState(0)
    factors: list[np.ndarray] = []
    for mode, size in enumerate(core.shape):
        unfolding = np.moveaxis(core, mode, 0).reshape(size, -1)
        vectors, _, _ = np.linalg.svd(unfolding, full_matrices=False)
        more = random.random_sample((size, max(0, rank - vectors.shape[1])))
        factors.append(np.concatenate([vectors[:, :rank], more], axis=1))
    return CPTensor((None, factors))


def _scale(scale: Tensor | None, size: int) -> Float[Tensor, " size"]:
    """The scale with its floor, the largest 1; all ones where there is none."""
    if scale is None or not bool(scale.any()):
        return torch.ones(size, dtype=torch.float64)
    relative = scale.detach().double().cpu() / scale.max().double().cpu()
    return relative.clamp(min=_SMALLEST_SCALE)


@contextmanager
def _tensorly_on_numpy() -> Generator[None, None, None]:
    """Tensorly on arrays, for this thread alone, whatever its backend is."""
    before = tensorly.get_backend()
    tensorly.set_backend("numpy", local_threadsafe=True)
    try:
        yield
    finally:
        tensorly.set_backend(before, local_threadsafe=True)
