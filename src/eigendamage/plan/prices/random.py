"""Random: channels by a draw. No data; the baseline that every other method has to beat."""

from __future__ import annotations

import torch

from eigendamage.plan._views import GroupPrices, GroupView


def group_prices(group: GroupView, generator: torch.Generator) -> GroupPrices:
    """A uniform number in [0, 1) a unit; no rise of loss."""
    return {group.name: torch.rand(group.size, generator=generator, dtype=torch.float64)}
