"""Reduced-rank regression from second moments, as pure functions of tensors in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from eigendamage.curvature import patches_at
from eigendamage.errors import DataError, ShapeError
from eigendamage.layers import ConvGeometry, balance
from eigendamage.plan.prices._inverse import damped

# Of S, relative to its mean diagonal: keeps directions that S does not see from costing nothing.
_METRIC_DAMPING = 1e-3
# Of the raw second moment: what rounding may leave of a constant input once it is centred.
_ROUNDING = 1e-10
# A moment that is zero has no scale; any damping lets everything be solved and changes nothing.
_NOTHING = 1e-70
_BUFFER_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over examples and positions of what a regression of y on z depends on, in float64.

    Attributes:
        zz: Σ z zᵀ, (m, m).
        yz: Σ y zᵀ, (o, m).
        yy: Σ y yᵀ, (o, o).
        z: Σ z, (m,).
        y: Σ y, (o,).
        count: how many pairs of z and y were summed.
    """

    zz: Float[Tensor, "m m"]
    yz: Float[Tensor, "o m"]
    yy: Float[Tensor, "o o"]
    z: Float[Tensor, " m"]
    y: Float[Tensor, " o"]
    count: int

    @classmethod
    def of(cls, z: Float[Tensor, "n m t"], y: Float[Tensor, "n o t"]) -> Moments:
        """The moments of n examples with t positions each.

        The products are taken in the precision given, on the tensors' device; sums of them are in
        float64. Autocast, which would halve that precision, is off.
        """
        flat_z, flat_y = (v.transpose(0, 1).flatten(1) for v in (z, y))
        with torch.autocast(z.device.type, enabled=False):
            zz, yz, yy = flat_z @ flat_z.T, flat_y @ flat_z.T, flat_y @ flat_y.T
        return cls(
            zz=zz.double(),
            yz=yz.double(),
            yy=yy.double(),
            z=flat_z.sum(1).double(),
            y=flat_y.sum(1).double(),
            count=flat_z.shape[1],
        )

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.zz + other.zz,
            self.yz + other.yz,
            self.yy + other.yy,
            self.z + other.z,
            self.y + other.y,
            self.count + other.count,
        )

    def is_finite(self) -> bool:
        """Whether no sum holds a NaN or an infinity."""
        return all(
            bool(torch.isfinite(v).all()) for v in (self.zz, self.yz, self.yy, self.z, self.y)
        )


@dataclass(frozen=True, eq=False)
class Fit:
    """A linear map from z to y.

    Attributes:
        V: the map, (o, m).
        bias: what is added, (o,); None for nothing.
        U: the left factor of V = U core, (o, r); None where no rank was given.
        core: the right factor, (r, m), of the same Frobenius norm.
    """

    V: Float[Tensor, "o m"]
    bias: Float[Tensor, " o"] | None
    U: Float[Tensor, "o r"] | None
    core: Float[Tensor, "r m"] | None


def regress(
    moments: Moments,
    V0: Float[Tensor, "o m"],
    S: Float[Tensor, "o o"] | None,
    rank: int | None,
    ridge: float,
    bias: bool,
) -> Fit:
    """The V of at most the given rank, and the b, that return y from z best.

    The exact minimum of E (y − Vz − b)ᵀ S (y − Vz − b) + ρ tr S (V − V₀)(V − V₀)ᵀ. With C and
    C_yz the second moments, centred where there is a bias, that is V = (C_yz + ρV₀)(C + ρI)⁻¹ and
    b = E y − V E z; of S^½ V (C + ρI)^½ the largest r singular values are kept, which is optimal
    by Eckart & Young (1936), and U = S^{-½} P, core = Pᵀ S^½ V with P the left singular vectors.
    Cost: a Cholesky factorisation of (m × m) and, with a rank, an SVD of (o × m).

    Args:
        moments: of z and y.
        V0: what V is drawn to, as strongly as ρ says. Where z is all zero V is V₀.
        S: the metric; the identity if None. It may be singular: it is damped by a thousandth of its
            mean diagonal first. Without a rank it makes no difference.
        rank: r; None for any. Columns of U and rows of the core beyond min(o, m) are zero.
        ridge: ρ, relative to the mean diagonal of C.
        bias: whether there is a bias. It is not damped.

    Raises:
        DataError: if the moments are of no examples.
    """
    C, C_yz, _ = _second_moments(moments, bias)
    floor = _ROUNDING * float(moments.zz.diagonal().mean()) / moments.count
    rho = max(ridge * float(C.diagonal().mean()), floor, _NOTHING)
    L = _root(C, rho)
    prior = V0.to(C)
    # The same as the formula above, and exactly V₀ where z says nothing.
    best = prior + torch.cholesky_solve((C_yz - prior @ C).T, L).T
    if rank is None:
        return Fit(best, _offset(moments, best) if bias else None, None, None)
    U, core = _truncated(best, L, S, rank)
    return Fit(U @ core, _offset(moments, U @ core) if bias else None, U, core)


def _offset(moments: Moments, V: Float[Tensor, "o m"]) -> Float[Tensor, " o"]:
    """The mean of y − Vz."""
    return (moments.y - V @ moments.z) / moments.count


def _truncated(
    V: Float[Tensor, "o m"], L: Float[Tensor, "m m"], S: Float[Tensor, "o o"] | None, rank: int
) -> tuple[Float[Tensor, "o r"], Float[Tensor, "r m"]]:
    """The factors of the map of that rank next to V in the metric S ⊗ L Lᵀ, of equal norms."""
    metric = torch.eye(len(V)).to(V) if S is None else damped(S.to(V), _METRIC_DAMPING)
    L_S = torch.linalg.cholesky(metric)
    # Any roots will do: the singular values, and so the optimum, are those of the symmetric ones.
    P = torch.linalg.svd(L_S.T @ V @ L, full_matrices=False).U[:, :rank]
    U = torch.linalg.solve_triangular(L_S.T, P, upper=True)
    core, U_even = balance([P.T @ L_S.T @ V, U])
    missing = rank - P.shape[1]
    return F.pad(U_even, (0, missing)), F.pad(core, (0, 0, 0, missing))


def error(
    moments: Moments,
    V: Float[Tensor, "o m"],
    bias: Float[Tensor, " o"] | None,
    S: Float[Tensor, "o o"] | None,
) -> float:
    """The mean over examples and positions of (y − Vz − b)ᵀ S (y − Vz − b), from moments alone.

    Args:
        moments: of z and y.
        V: the map.
        bias: b; nothing is added if None.
        S: the metric, taken as it is; the identity if None.

    Raises:
        DataError: if the moments are of no examples.
    """
    C, C_yz, C_yy = _second_moments(moments, centred=True)
    W = V.to(C)
    cross = W @ C_yz.T
    mean = _offset(moments, W) - (0 if bias is None else bias.to(C))
    residual = C_yy - cross - cross.T + W @ C @ W.T + torch.outer(mean, mean)
    weighted = residual.trace() if S is None else (S.to(residual) * residual).sum()
    return max(0.0, float(weighted))


def layer_moments(
    x: Float[Tensor, "n i *size"],
    y: Float[Tensor, "n o t"],
    geometry: ConvGeometry | None,
    positions: Int[Tensor, "n p"] | None,
    *,
    name: str,
) -> Moments:
    """The moments of what a layer reads at each position, its patch, and what it should return.

    Cost: one (iK × n·p) product; a slice of the patches at a time is in memory.

    Args:
        x: the input, (n, i, h, w) for a convolution and (n, i, t) for Linear.
        y: what is to be returned.
        geometry: the convolution's; None for Linear.
        positions: of each example the output positions to look at; None for all.
        name: the layer's dotted path, for errors.

    Raises:
        ShapeError: if the layer would return another number of positions for x.
    """
    t = x.shape[2] if geometry is None else math.prod(geometry.output_size(*x.shape[2:]))
    if (len(x), t) != (len(y), y.shape[2]):
        raise ShapeError(
            name,
            f"{len(x)} examples of {t} positions go in and {len(y)} of {y.shape[2]} should come "
            f"out; both networks must be the same but for their weights and channels",
        )
    offsets = 1 if geometry is None else geometry.offsets
    seen = t if positions is None else positions.shape[1]
    step = max(1, _BUFFER_BYTES // (x.shape[1] * offsets * seen * x.element_size()))
    total: Moments | None = None
    for start in range(0, len(x), step):
        few = slice(start, start + step)
        at = None if positions is None else positions[few].to(x.device)
        part = Moments.of(_patches(x[few], geometry, at), _picked(y[few], at))
        total = part if total is None else total + part
    assert total is not None
    return total


def _patches(
    x: Float[Tensor, "n i *size"], geometry: ConvGeometry | None, at: Int[Tensor, "n p"] | None
) -> Float[Tensor, "n m p"]:
    if geometry is None:
        return _picked(x, at)
    patches = geometry.patches(x) if at is None else patches_at(x, geometry, at)
    return patches.flatten(1, 2)


def _picked(x: Float[Tensor, "n c t"], at: Int[Tensor, "n p"] | None) -> Float[Tensor, "n c p"]:
    return x if at is None else x.gather(2, at.unsqueeze(1).expand(-1, x.shape[1], -1))


def _second_moments(
    moments: Moments, centred: bool
) -> tuple[Float[Tensor, "m m"], Float[Tensor, "o m"], Float[Tensor, "o o"]]:
    """Means of z zᵀ, y zᵀ and y yᵀ, about the means of z and y if they are to be centred."""
    if moments.count < 1:
        raise DataError("a regression needs at least one example, the moments are of none")
    n = moments.count
    products = (moments.zz / n, moments.yz / n, moments.yy / n)
    if not centred:
        return products
    z, y = moments.z / n, moments.y / n
    means = (torch.outer(z, z), torch.outer(y, z), torch.outer(y, y))
    zz, yz, yy = (p - m for p, m in zip(products, means, strict=True))
    return zz, yz, yy


def _root(C: Float[Tensor, "m m"], rho: float) -> Float[Tensor, "m m"]:
    """The Cholesky factor L of C + ρI, with a larger ρ where rounding shows in C.

    Products in single precision leave eigenvalues below zero; a ρ that is smaller still would
    divide rounding errors by one another.
    """
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    L, failed_at = torch.linalg.cholesky_ex(C + rho * eye)
    if not int(failed_at):
        return L
    rounding = float(torch.linalg.eigvalsh(C)[0].abs())
    return torch.linalg.cholesky(C + (rho + 4 * rounding) * eye)
