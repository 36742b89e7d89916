"""OBS: single weights under F ≈ S ⊗ A, with the weights that stay repaired.

Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eigendamage.plan.prices._inverse import damped
from eigendamage.plan.prices._quadratic import quadratic


def weight_prices(
    W: Float[Tensor, "o m"], S_inverse: Float[Tensor, "o o"], A_inverse: Float[Tensor, "m m"]
) -> Float[Tensor, "o m"]:
    """½ θ² / ([S⁻¹]_rr [A⁻¹]_jj) for each weight (their eq. 5), in float64.

    The exact rise of the quadratic for one weight that goes alone and optimal repair.
    """
    alone = torch.outer(S_inverse.double().diagonal(), A_inverse.double().diagonal())
    return 0.5 * W.double().square() / alone


def masked_update(
    W: Float[Tensor, "o m"],
    S: Float[Tensor, "o o"],
    A: Float[Tensor, "m m"],
    keep: Bool[Tensor, "o m"],
    damping: float,
    *,
    tolerance: float = 1e-6,
    iterations: int = 500,
) -> Float[Tensor, "o m"]:
    """The X that minimises ½ tr S (W−X) A (W−X)ᵀ and is zero off ``keep``, in float64.

    The repairs of single weights overlap when many go at once, and their sum can cost more than
    no repair. This is their joint optimum for the damped factors, by conjugate gradients over
    the kept entries, preconditioned by the diagonal S_rr A_jj. Cost: an (o × o × m) and an
    (o × m × m) product an iteration, two for the check at the end. Stopped early, the
    result still costs no more than plain masking.

    Args:
        W: the weight.
        S: the gradients' factor.
        A: the inputs' factor.
        keep: which entries stay.
        damping: added to both factors, relative to their scale.
        tolerance: how small the gradient gets, relative to that of plain masking.
        iterations: at most this many.
    """
    wide, S_damped, A_damped = W.double(), damped(S, damping), damped(A, damping)
    masked = wide * keep
    diagonal = torch.outer(S_damped.diagonal(), A_damped.diagonal())
    # A zero on the diagonal makes its row and column zero as well, so nothing is there to solve.
    preconditioner = keep / torch.where(diagonal > 0, diagonal, 1.0)

    found = masked.clone()
    residual = keep * (S_damped @ (wide - found) @ A_damped)
    step = preconditioner * residual
    size = first = float((residual * step).sum())
    for _ in range(iterations):
        if size <= tolerance**2 * first:
            break
        image = keep * (S_damped @ step @ A_damped)
        curvature = float((step * image).sum())
        if curvature <= 0:
            break
        found = found + (size / curvature) * step
        residual = residual - (size / curvature) * image
        scaled = preconditioner * residual
        before, size = size, float((residual * scaled).sum())
        step = scaled + (size / before) * step
    better = quadratic(wide, found, S_damped, A_damped) <= quadratic(
        wide, masked, S_damped, A_damped
    )
    return found if better else masked
