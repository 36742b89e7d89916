"""C-OBS: a filter costs the sum of its weights' OBS prices under F ≈ S ⊗ A.

Baseline of Wang, Grosse, Fidler, Zhang 2019 (EigenDamage). It treats weights that go together as
if each went alone, so its price is not the rise of the quadratic, and neither is its repair the
optimal one; `kron_obs` has those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def row_prices(
    W: Float[Tensor, "o m"], S_inverse: Float[Tensor, "o o"], A_inverse: Float[Tensor, "m m"]
) -> Float[Tensor, " o"]:
    """½ Σ_j w_rj² / ([S⁻¹]_rr [A⁻¹]_jj) for each row r of W, in float64."""
    scaled = W.double().square() @ A_inverse.double().diagonal().reciprocal()
    return 0.5 * scaled / S_inverse.double().diagonal()


def update(
    W: Float[Tensor, "o m"],
    S_inverse: Float[Tensor, "o o"],
    A_inverse: Float[Tensor, "m m"],
    pruned: Sequence[int],
) -> Float[Tensor, "o m"]:
    """W − S⁻¹ C A⁻¹ with C_rj = w_rj / ([S⁻¹]_rr [A⁻¹]_jj) on the pruned rows and 0 elsewhere.

    The sum of what OBS would do for each pruned weight alone (Hassibi & Stork 1993, eq. 5), as in
    the official code. Of full size: the pruned rows are not zero and the caller drops them.
    """
    rows = list(pruned)
    S_columns, A_inverse = S_inverse.double()[:, rows], A_inverse.double()
    alone = torch.outer(S_inverse.double().diagonal()[rows], A_inverse.diagonal())
    return W.double() - S_columns @ (W.double()[rows] / alone) @ A_inverse
