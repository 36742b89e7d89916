"""Inverses of the factors S and A, which are often singular, and the damping that allows them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.errors import EigenDamageError

# What an all-zero factor is damped by, times the damping: two of them can be multiplied and
# inverted without leaving float64, and next to any other price theirs are nothing.
_NOTHING = 1e-70
# Where those before it leave less than this part of a variable's variance unexplained, a Cholesky
# may divide rounding errors by one another.
_SINGULAR = 1e-10


def damped(M: Float[Tensor, "c c"], damping: float, *, least: float = 0.0) -> Float[Tensor, "c c"]:
    """M, made symmetric, plus ``damping`` times the mean of its diagonal on the diagonal.

    Or plus ``least`` where that is more.

    In float64. Relative, unlike the official code's 1e-10, so that prices scale with the loss. An
    all-zero M has no scale: it becomes ``damping`` · 1e-70 · I, in which everything can be solved
    and removing anything is free.
    """
    wide = M.double()
    wide = (wide + wide.T) / 2
    scale = float(wide.diagonal().mean())
    added = max(damping * (scale if scale > 0 else _NOTHING), least)
    return wide + added * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)


def inverse(M: Float[Tensor, "c c"], damping: float) -> Float[Tensor, "c c"]:
    """The inverse of `damped` M by Cholesky, in float64.

    Raises:
        EigenDamageError: if that is not positive definite, so the damping is too small for M.
    """
    L, failed_at = torch.linalg.cholesky_ex(damped(M, damping))
    if int(failed_at):
        raise EigenDamageError(
            f"a {len(M)} × {len(M)} factor with damping {damping:g} is not positive definite; "
            "use a larger damping, such as 1e-3"
        )
    return torch.cholesky_inverse(L)


def solve(M: Float[Tensor, "c c"], B: Float[Tensor, "c n"]) -> Float[Tensor, "c n"]:
    """An X with M X = B for a positive semi-definite M whose range holds B, in float64.

    By Cholesky where M is well-conditioned, else by its pseudo-inverse, which leaves out
    eigenvalues below c · ε times the largest, so that X has no part in M's null space.
    """
    L, failed_at = torch.linalg.cholesky_ex(M)
    unexplained = L.diagonal().square()
    if int(failed_at) or bool((unexplained <= _SINGULAR * M.diagonal()).any()):
        return torch.linalg.pinv(M, hermitian=True) @ B
    return torch.cholesky_solve(B, L)


def official_inverse(M: Float[Tensor, "c c"]) -> Float[Tensor, "c c"]:
    """The official code's Q diag(1/(d + 1e-10)) Qᵀ, where an eigenvalue d ≤ 1e-15 counts as zero.

    Its cut-offs are absolute, so this depends on the scale of M: for comparisons with that code.
    """
    d, Q = torch.linalg.eigh(M.double())
    d = torch.where(d > 1e-15, d, 0.0)
    return (Q / (d + 1e-10)) @ Q.T
