"""Taylor: channels by the first-order change of the loss when they go; a baseline.

Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance estimation for neural network pruning",
CVPR 2019, with single examples in place of batches.
"""

from __future__ import annotations

from eigendamage.plan._views import GroupPrices, GroupView, estimated


def group_prices(group: GroupView) -> GroupPrices:
    """1/N Σ_n (Σ_j w_rj G[n]_rj)² for each layer that makes a unit (their eq. 8). No rise of loss.

    Raises:
        EigenDamageError: if the gradients were not estimated.
    """
    return {
        end.layer.name: end.summed(estimated(end.layer, end.layer.curvature.gates))
        for end in group.producers
    }
