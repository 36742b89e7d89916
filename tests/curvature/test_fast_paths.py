"""Every fast path against its slow reference, in float64."""

from __future__ import annotations

import pytest
import torch

from eigendamage.curvature import eigenbasis, eigenvalue_sum, gram, input_moments
from eigendamage.layers import ConvGeometry
from tests.cases import CONVOLUTIONS, convolution
from tests.reference import patches_by_unfold


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_coverage_moment_is_the_unfolded_one(name: str) -> None:
    conv = convolution(name).double()
    x = torch.randn(3, 3, 7, 6, dtype=torch.float64)
    patches = patches_by_unfold(x, conv)
    moment, total = input_moments(x, ConvGeometry.of(conv))
    torch.testing.assert_close(moment, torch.einsum("nikt,njkt->ij", patches, patches))
    torch.testing.assert_close(total, patches.sum((0, 2, 3)))


@pytest.mark.parametrize("shape", [(4, 3, 1), (4, 3, 7), (4, 7, 3)])
def test_gram_is_the_sum_of_outer_products(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(gram(x), torch.einsum("nct,ndt->cd", x, x))


def _rotated_squares(
    a: torch.Tensor, g: torch.Tensor, q_s: torch.Tensor, q_a: torch.Tensor
) -> torch.Tensor:
    gradients = torch.einsum("not,nikt->noik", g, a)
    return torch.einsum("op,noik,iq->npqk", q_s, gradients, q_a).square().sum(0)


@pytest.mark.parametrize("strategy", [None, "rotate_inputs", "rotate_gradients"])
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_lambda_by_every_strategy(name: str, strategy: str | None) -> None:
    conv = convolution(name).double()
    x = torch.randn(3, 3, 7, 6, dtype=torch.float64)
    g = torch.randn_like(conv(x)).flatten(2)
    q_s = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    q_a = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    found = eigenvalue_sum([(x, g)], q_s, q_a, ConvGeometry.of(conv), strategy)
    torch.testing.assert_close(found, _rotated_squares(patches_by_unfold(x, conv), g, q_s, q_a))


@pytest.mark.parametrize("strategy", ["outer", "rotate_inputs", "rotate_gradients"])
def test_lambda_of_one_position_by_every_strategy(strategy: str) -> None:
    a = torch.randn(6, 5, 1, dtype=torch.float64)
    g = torch.randn(6, 4, 1, dtype=torch.float64)
    q_s = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    q_a = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    found = eigenvalue_sum([(a, g)], q_s, q_a, None, strategy)
    torch.testing.assert_close(found, _rotated_squares(a.unsqueeze(2), g, q_s, q_a))


def test_calls_of_one_layer_add_up_before_squaring() -> None:
    a = [torch.randn(6, 5, t, dtype=torch.float64) for t in (3, 2)]
    g = [torch.randn(6, 4, t, dtype=torch.float64) for t in (3, 2)]
    q_s, q_a = torch.eye(4, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    joined = _rotated_squares(torch.cat(a, 2).unsqueeze(2), torch.cat(g, 2), q_s, q_a)
    for strategy in ("rotate_inputs", "rotate_gradients"):
        found = eigenvalue_sum(list(zip(a, g, strict=True)), q_s, q_a, None, strategy)
        torch.testing.assert_close(found, joined)


def test_slices_of_the_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = convolution("strided").double()
    x = torch.randn(9, 3, 7, 6, dtype=torch.float64)
    g = torch.randn_like(conv(x)).flatten(2)
    q_s, q_a = torch.eye(4, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    whole = eigenvalue_sum([(x, g)], q_s, q_a, ConvGeometry.of(conv))
    monkeypatch.setattr("eigendamage.curvature._ekfac._BUFFER_BYTES", 8 * 1000)
    sliced = eigenvalue_sum([(x, g)], q_s, q_a, ConvGeometry.of(conv))
    torch.testing.assert_close(whole, sliced)


def test_eigenbasis_is_sorted_orthonormal_and_repeatable() -> None:
    half = torch.randn(6, 4, dtype=torch.float32)
    moment = half @ half.T
    values, vectors = eigenbasis(moment)
    assert bool((values.diff() >= 0).all())
    assert bool((values >= 0).all())
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, eye)
    torch.testing.assert_close((vectors * values) @ vectors.T, moment.double(), rtol=0, atol=1e-5)
    assert torch.equal(vectors, eigenbasis(moment.clone()).vectors)
