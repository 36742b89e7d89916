"""What is left of a layer's weight when rows and columns go, repaired as a plan says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.plan._plan import Repair
from eigendamage.plan._views import LayerView
from eigendamage.plan.prices import c_obs, kron_obs
from eigendamage.plan.prices._quadratic import quadratic


def repaired(
    layer: LayerView, rows: Sequence[int], columns: Sequence[int], repair: Repair
) -> Float[Tensor, "rows columns"]:
    """The kept rows and columns of W with what they take over from the others, in float64.

    Args:
        layer: the layer; only a repair needs its curvature.
        rows: kept outputs.
        columns: kept columns of W, the bias among them where there is one.
        repair: see `Repair`.
    """
    W, keep, stay = layer.W, list(rows), list(columns)
    if repair == "none":
        return W[keep][:, stay]
    if repair in ("rows", "columns", "both"):
        every_row, every_column = range(W.shape[0]), range(W.shape[1])
        by_rows = keep if repair != "columns" else list(every_row)
        by_columns = stay if repair != "rows" else list(every_column)
        # The factors of the view are damped already.
        X = kron_obs.joint_update(W, layer.S, layer.A, by_rows, by_columns, 0.0)
        if repair == "columns":
            return X[keep]
        return X[:, stay] if repair == "rows" else X
    gone = sorted(set(range(W.shape[0])) - set(keep))
    if repair == "c-obs":
        return c_obs.update(W, layer.S_inverse, layer.A_inverse, gone)[keep][:, stay]
    return kron_obs.one_at_a_time_update(W, layer.S_inverse, gone)[keep][:, stay]


def rise(layer: LayerView, rows: Sequence[int], columns: Sequence[int], repair: Repair) -> float:
    """½ tr S (W−X) A (W−X)ᵀ of the repaired X, zero in the rows and columns that go."""
    X = torch.zeros_like(layer.W)
    X[torch.tensor(list(rows))[:, None], torch.tensor(list(columns))] = repaired(
        layer, rows, columns, repair
    )
    return quadratic(layer.W, X, layer.S, layer.A)
