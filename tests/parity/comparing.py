"""What every comparison with the official code's numbers runs over, and how close is close."""

from __future__ import annotations

import pytest
from torch import Tensor

from tests.parity.networks import NETWORKS

KINDS = ("emp", "true")
RATIOS = ("0.3", "0.5", "0.7", "0.9")

every_network = pytest.mark.parametrize("network", NETWORKS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_ratio = pytest.mark.parametrize("ratio", RATIOS)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Every entry within ``tolerance`` of the largest one."""
    assert ours.shape == theirs.shape
    gap = float((ours - theirs).abs().max() / theirs.abs().max())
    assert gap <= tolerance, f"relative to the largest entry they differ by {gap:.2e}"


def falls_back(price: Tensor, threshold: float, max_ratio: float) -> bool:
    """Whether the official code, having left at most one unit of a side, keeps index 0 instead."""
    if float((price <= threshold).double().mean()) <= max_ratio:
        return False
    own = price.sort().values[int(max_ratio * len(price))]
    return int((price > own).sum()) <= 1
