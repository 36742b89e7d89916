"""C-OBD: a filter costs what its weights cost under a diagonal Fisher; nothing is repaired.

Baseline of Wang, Grosse, Fidler, Zhang 2019 (EigenDamage), after LeCun, Denker, Solla 1990.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from eigendamage.plan.prices import obd


def row_prices(
    weight: Float[Tensor, "o i K"],
    bias: Float[Tensor, " o"] | None,
    diagonal: Float[Tensor, "o i K"],
    bias_diagonal: Float[Tensor, " o"] | None,
) -> Float[Tensor, " o"]:
    """½ Σ_j w_rj² F_rj,rj for each filter r, its bias included, in float64.

    Args:
        weight: the layer's weight.
        bias: its bias, if it has one.
        diagonal: the Fisher's diagonal over the weight, 1/N Σ_n G_n².
        bias_diagonal: the same over the bias; None where there is none.
    """
    prices = obd.weight_prices(weight, diagonal).sum((1, 2))
    if bias is None or bias_diagonal is None:
        return prices
    return prices + 0.5 * bias.double().square() * bias_diagonal.double()
