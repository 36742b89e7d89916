"""Kron-OBD: a filter under F ≈ S ⊗ A, the others left as they are.

Baseline of Wang, Grosse, Fidler, Zhang 2019 (EigenDamage).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def row_prices(
    W: Float[Tensor, "o m"], S: Float[Tensor, "o o"], A: Float[Tensor, "m m"]
) -> Float[Tensor, " o"]:
    """½ S_rr w_rᵀ A w_r for each row r of W, in float64."""
    wide = W.double()
    return 0.5 * S.double().diagonal() * ((wide @ A.double()) * wide).sum(1)


def official_row_prices(
    W: Float[Tensor, "o m"], S: Float[Tensor, "o o"], A: Float[Tensor, "m m"]
) -> Float[Tensor, " o"]:
    """½ S_rr Σ_j (w²A)_rj, which the official code computes where the paper says wᵀAw."""
    return 0.5 * S.double().diagonal() * (W.double().square() @ A.double().sum(1))
