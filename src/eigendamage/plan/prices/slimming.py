"""Network slimming: channels by the scale of their batch norm. No data; a baseline.

Liu, Li, Shen, Huang, Yan, Zhang, "Learning efficient convolutional networks through network
slimming", ICCV 2017, without the sparsity penalty of its training.
"""

from __future__ import annotations

import torch

from eigendamage.plan._views import GroupPrices, GroupView


def group_prices(group: GroupView) -> GroupPrices | None:
    """Mean |γ| over the batch norms of a unit; None where there is none. No rise of loss."""
    if not group.scales:
        return None
    return {group.name: torch.stack(list(group.scales.values())).mean(0)}
