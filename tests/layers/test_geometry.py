"""Geometry against torch's own unfold and fold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from eigendamage.layers import ConvGeometry
from tests.cases import CONVOLUTIONS, convolution
from tests.reference import patches_by_unfold


@pytest.fixture(params=list(CONVOLUTIONS), ids=list(CONVOLUTIONS))
def conv(request: pytest.FixtureRequest) -> torch.nn.Conv2d:
    return convolution(request.param).double()


def test_patches_are_those_of_unfold(conv: torch.nn.Conv2d) -> None:
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(ConvGeometry.of(conv).patches(x), patches_by_unfold(x, conv))


def test_patches_times_weight_is_the_convolution(conv: torch.nn.Conv2d) -> None:
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    weight = conv.weight.flatten(2)
    product = torch.einsum("oik,nikt->not", weight, ConvGeometry.of(conv).patches(x))
    if conv.bias is not None:
        product = product + conv.bias[:, None]
    torch.testing.assert_close(product, conv(x).flatten(2))


def test_output_size_is_that_of_the_convolution(conv: torch.nn.Conv2d) -> None:
    out = conv(torch.zeros(1, 3, 7, 6, dtype=torch.float64))
    assert ConvGeometry.of(conv).output_size(7, 6) == tuple(out.shape[2:])


def test_coverage_is_the_fold_of_ones() -> None:
    for geometry in (
        ConvGeometry((3, 3), padding=((1, 1), (1, 1))),
        ConvGeometry((3, 2), (2, 1), ((1, 1), (0, 0))),
        ConvGeometry((3, 3), dilation=(2, 2), padding=((2, 2), (2, 2))),
        ConvGeometry((2, 2), stride=(3, 3)),
    ):
        out = geometry.output_size(7, 6)
        ones = torch.ones(1, geometry.offsets, out[0] * out[1], dtype=torch.float64)
        padding = (geometry.padding[0][0], geometry.padding[1][0])
        folded = F.fold(ones, (7, 6), geometry.kernel, geometry.dilation, padding, geometry.stride)
        torch.testing.assert_close(geometry.coverage(7, 6), folded[0, 0])
