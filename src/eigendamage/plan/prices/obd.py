"""OBD: single weights under a diagonal Fisher; nothing is repaired.

LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1990.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def weight_prices(
    weight: Float[Tensor, "o i K"], diagonal: Float[Tensor, "o i K"]
) -> Float[Tensor, "o i K"]:
    """½ θ² F_qq for each weight (paper, eq. 5), in float64; F_qq is 1/N Σ_n G_n² there."""
    return 0.5 * weight.double().square() * diagonal.double()
