"""Several processes of one group compute what one does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed
from eigendamage import distributed
from tests.ranks import together

PER_LAYER = (
    "S", "A", "mean", "S_eigenvalues", "A_eigenvalues", "patches", "patch_mean", "diagonal",
    "bias_diagonal", "gates",
)  # fmt: skip


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 9, 10),
        nn.Tanh(),
        nn.Linear(10, 4),
    ).to(dtype)


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Five batches, the last of which is short: the second of two processes gets two."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(67, 3, 8, 8, generator=random, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 4, (67,), generator=random)
    return list(zip(x.split(15), y.split(15), strict=True))


def curvature(dtype: torch.dtype = torch.float64, **options: Any) -> ed.Curvature:
    settings: dict[str, Any] = {
        "also": ("patches", "gradients"), "patch_positions": 8, "progress": False, **options
    }  # fmt: skip
    return ed.estimate_curvature(network(dtype), batches(dtype), **settings)


def curvatures() -> dict[str, ed.Curvature]:
    """Of each type; of the data's labels, on batches of which one process gets none."""
    return {
        "float64": curvature(),
        "float32": curvature(torch.float32),
        "one batch": curvature(fisher="empirical", max_examples=10),
        "streamed": curvature(layers_per_pass=2, fisher="exact", max_examples=20),
    }


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, ed.Curvature]]:
    return together(curvatures, tmp_path_factory.mktemp("ranks") / "curvatures")


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


@pytest.mark.parametrize(
    ("which", "tolerance"),
    [("float64", 1e-10), ("float32", 1e-6), ("one batch", 1e-10), ("streamed", 1e-10)],
)
def test_curvature_of_two_processes_is_that_of_one(
    of_two: list[dict[str, ed.Curvature]], which: str, tolerance: float
) -> None:
    alone = {
        "float64": lambda: curvature(),
        "float32": lambda: curvature(torch.float32),
        "one batch": lambda: curvature(fisher="empirical", max_examples=10),
        "streamed": lambda: curvature(layers_per_pass=2, fisher="exact", max_examples=20),
    }[which]()
    for name, expected in alone.items():
        found = of_two[0][which][name]
        assert (found.examples, found.positions) == (expected.examples, expected.positions)
        for what in PER_LAYER:
            a, b = getattr(found, what), getattr(expected, what)
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                print(which, name, what, difference(a, b))
                assert difference(a, b) < tolerance, (name, what)
        print(
            which,
            name,
            difference(found.eigenvalues, expected.eigenvalues),
            difference(found.Q_S, expected.Q_S),
        )


def test_two_processes_have_the_same_bits(of_two: list[dict[str, ed.Curvature]]) -> None:
    for which, mine in of_two[0].items():
        for name, layer in mine.items():
            for what in (*PER_LAYER, "Q_S", "Q_A", "eigenvalues"):
                a, b = getattr(layer, what), getattr(of_two[1][which][name], what)
                assert (a is None and b is None) or torch.equal(a, b), (which, name, what)
