"""What the Kronecker-factored quadratic says that a change of a layer's weight costs."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def quadratic(
    W: Float[Tensor, "o m"],
    X: Float[Tensor, "o m"],
    S: Float[Tensor, "o o"],
    A: Float[Tensor, "m m"],
) -> float:
    """½ tr S (W−X) A (W−X)ᵀ: the expected rise of the loss if W becomes X, under F ≈ S ⊗ A.

    In float64. Cost: one (o × m × m) and one (o × o × m) product.
    """
    D = (W - X).double()
    return 0.5 * float(((S.double() @ D) * (D @ A.double())).sum())
