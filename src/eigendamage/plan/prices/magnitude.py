"""Magnitude: channels by the size of the filters that make them. No data; a baseline.

Li, Kadav, Durdanovic, Samet, Graf, "Pruning filters for efficient ConvNets", ICLR 2017, over
coupled layers and all groups at once, so relative to each group's mean; by the squared Euclidean
norm, which adds up over layers, where they take the sum of absolute values.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.plan._views import GroupPrices, GroupView


def group_prices(group: GroupView) -> GroupPrices:
    """Σ_j w_rj² over all layers that make a unit, relative to the group's mean; no rise of loss."""
    parts = [end.summed(filter_norms(end.layer.weight)) for end in group.producers]
    total = torch.stack(parts).sum(0)
    mean = total.mean()
    return {group.name: total / mean if float(mean) > 0 else total}


def filter_norms(weight: Float[Tensor, "o i K"]) -> Float[Tensor, " o"]:
    """The squared Frobenius norm of each filter, in float64."""
    return weight.double().cpu().square().sum((1, 2))
