"""The regression is the exact optimum: against lstsq, against optimisers, against unfold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eigendamage.curvature import patches_at
from eigendamage.errors import DataError, ShapeError
from eigendamage.layers import ConvGeometry
from eigendamage.plan.prices._inverse import damped
from eigendamage.surgery import _regression
from eigendamage.surgery._regression import Fit, Moments, error, layer_moments, regress
from tests.cases import CONVOLUTIONS, convolution
from tests.reference import patches_by_unfold

INPUTS, OUTPUTS = 5, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(count: int = 60) -> tuple[Tensor, Tensor]:
    """Correlated inputs with a mean, and outputs that they only partly explain, (c, count)."""
    z = draw(INPUTS, INPUTS) @ draw(INPUTS, count, seed=1) + 0.7 * draw(INPUTS, 1, seed=2)
    y = draw(OUTPUTS, INPUTS, seed=3) @ z + draw(OUTPUTS, count, seed=4) + 2
    return z, y


def moments_of(z: Tensor, y: Tensor) -> Moments:
    return Moments.of(z.unsqueeze(0), y.unsqueeze(0))


def metric(rank: int = OUTPUTS) -> Tensor:
    root = draw(OUTPUTS, rank, seed=5)
    return root @ root.T


def minimum(objective: Callable[[list[Tensor]], Tensor], shapes: list[tuple[int, ...]]) -> float:
    """The lowest of an objective that L-BFGS finds from three starts."""
    lowest = float("inf")
    for seed in range(3):
        free = [draw(*s, seed=10 * seed + k).requires_grad_() for k, s in enumerate(shapes)]
        search = torch.optim.LBFGS(
            free, max_iter=150, tolerance_grad=1e-11, tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(search: torch.optim.LBFGS = search, free: list[Tensor] = free) -> Tensor:
            search.zero_grad()
            loss = objective(free)
            loss.backward()
            return loss

        search.step(closure)
        lowest = min(lowest, float(objective(free).detach()))
    return lowest


def ridge_loss(
    z: Tensor, y: Tensor, V: Tensor, b: Tensor | None, V0: Tensor, S: Tensor, ridge: float
) -> Tensor:
    """What `regress` says that it minimises, written out."""
    centred = z if b is None else z - z.mean(1, keepdim=True)
    rho = ridge * centred.square().mean()
    left = y - V @ z - (0 if b is None else b.unsqueeze(1))
    misfit = (left * (S @ left)).sum() / z.shape[1]
    return misfit + rho * ((V - V0) * (S @ (V - V0))).sum()


@pytest.mark.parametrize("bias", [True, False])
def test_without_rank_and_ridge_it_is_least_squares(bias: bool) -> None:
    z, y = pairs()
    design = torch.cat([z, torch.ones(1, z.shape[1])]) if bias else z
    solution = torch.linalg.lstsq(design.T, y.T).solution.T
    fit = regress(moments_of(z, y), torch.zeros(OUTPUTS, INPUTS), metric(), None, 0.0, bias)
    torch.testing.assert_close(fit.V, solution[:, :INPUTS])
    assert (fit.bias is not None) == bias
    if fit.bias is not None:
        torch.testing.assert_close(fit.bias, solution[:, INPUTS])
    assert fit.U is None
    assert fit.core is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, None])
def test_no_optimiser_finds_a_lower_loss(rank: int | None, bias: bool) -> None:
    z, y = pairs()
    V0, S, ridge = draw(OUTPUTS, INPUTS, seed=6), metric(), 0.05
    weight = damped(S, 1e-3)
    fit = regress(moments_of(z, y), V0, S, rank, ridge, bias)

    def objective(free: list[Tensor]) -> Tensor:
        *factors, b = free
        V = factors[0] @ factors[1] if rank else factors[0]
        return ridge_loss(z, y, V, b if bias else None, V0, weight, ridge)

    if rank:
        shapes: list[tuple[int, ...]] = [(OUTPUTS, rank), (rank, INPUTS), (OUTPUTS,)]
    else:
        shapes = [(OUTPUTS, INPUTS), (OUTPUTS,)]
    found = float(ridge_loss(z, y, fit.V, fit.bias, V0, weight, ridge))
    assert found == pytest.approx(minimum(objective, shapes), rel=1e-7)


def test_the_metric_decides_what_is_cut() -> None:
    """With rank one only the direction that S sees is fitted, however small it is in y."""
    z, y = pairs()
    S = torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    y = y * torch.tensor([0.2, 1.0, 1.0, 1.0]).unsqueeze(1)
    best = regress(moments_of(z, y), torch.zeros(OUTPUTS, INPUTS), None, None, 0.0, True)
    cut = regress(moments_of(z, y), torch.zeros(OUTPUTS, INPUTS), S, 1, 0.0, True)
    plain = regress(moments_of(z, y), torch.zeros(OUTPUTS, INPUTS), None, 1, 0.0, True)
    away = [float((f.V[0] - best.V[0]).norm() / best.V[0].norm()) for f in (cut, plain)]
    assert away[0] < 0.3 < away[1]


@pytest.mark.parametrize("S", [metric(2), torch.zeros(OUTPUTS, OUTPUTS).double(), None])
def test_any_metric_gives_a_finite_fit_of_the_rank(S: Tensor | None) -> None:
    z, y = pairs()
    fit = regress(moments_of(z, y), draw(OUTPUTS, INPUTS), S, 2, 1e-3, True)
    assert bool(torch.isfinite(fit.V).all())
    assert int(torch.linalg.matrix_rank(fit.V)) == 2


def test_a_zero_metric_is_the_identity() -> None:
    z, y = pairs()
    zero = torch.zeros(OUTPUTS, OUTPUTS, dtype=torch.float64)
    fits = [
        regress(moments_of(z, y), draw(OUTPUTS, INPUTS), S, 2, 1e-3, True) for S in (zero, None)
    ]
    torch.testing.assert_close(fits[0].V, fits[1].V)


def check_factors(fit: Fit, rank: int) -> None:
    assert fit.U is not None
    assert fit.core is not None
    assert fit.U.shape == (OUTPUTS, rank)
    assert fit.core.shape == (rank, INPUTS)
    torch.testing.assert_close(fit.U @ fit.core, fit.V)
    torch.testing.assert_close(fit.U.norm(), fit.core.norm())


@pytest.mark.parametrize("rank", [1, 3, OUTPUTS, 7])
def test_the_factors_are_balanced_and_of_the_width_asked_for(rank: int) -> None:
    z, y = pairs()
    fit = regress(moments_of(z, y), draw(OUTPUTS, INPUTS), metric(), rank, 1e-3, True)
    check_factors(fit, rank)
    if rank >= OUTPUTS:
        whole = regress(moments_of(z, y), draw(OUTPUTS, INPUTS), metric(), None, 1e-3, True)
        torch.testing.assert_close(fit.V, whole.V)


@pytest.mark.parametrize("rank", [None, OUTPUTS])
def test_inputs_that_say_nothing_leave_the_weight(rank: int | None) -> None:
    V0 = draw(OUTPUTS, INPUTS)
    _, y = pairs()
    for z in (torch.zeros(INPUTS, y.shape[1]), draw(INPUTS, 1).expand(-1, y.shape[1])):
        fit = regress(moments_of(z.double(), y), V0, metric(), rank, 1e-3, True)
        torch.testing.assert_close(fit.V, V0, atol=1e-3, rtol=1e-3)
        assert fit.bias is not None
        torch.testing.assert_close(fit.V @ z[:, 0].double() + fit.bias, y.mean(1))


def test_rounding_of_single_precision_is_survived() -> None:
    """A Gram matrix in float32 of fewer examples than inputs has eigenvalues below zero."""
    z, y = draw(80, 20).float() + 5, draw(OUTPUTS, 20).float()
    moments = moments_of(z, y)
    assert float(torch.linalg.eigvalsh(moments.zz)[0]) < 0
    fit = regress(moments, torch.zeros(OUTPUTS, 80), None, None, 1e-12, False)
    assert bool(torch.isfinite(fit.V).all())
    left = y.double() - fit.V @ z.double()
    assert float(left.norm()) < 0.5 * float(y.norm())


@pytest.mark.parametrize("S", [metric(), metric(2), None])
@pytest.mark.parametrize("bias", [True, False])
def test_the_error_is_the_mean_over_examples(S: Tensor | None, bias: bool) -> None:
    z, y = pairs()
    V, b = draw(OUTPUTS, INPUTS, seed=7), draw(OUTPUTS, seed=8) if bias else None
    left = y - V @ z - (0 if b is None else b.unsqueeze(1))
    weighted = left if S is None else S @ left
    expected = float((left * weighted).sum() / z.shape[1])
    assert error(moments_of(z, y), V, b, S) == pytest.approx(expected, rel=1e-10)


def test_moments_add_up() -> None:
    z, y = pairs()
    parts = moments_of(z[:, :17], y[:, :17]) + moments_of(z[:, 17:], y[:, 17:])
    whole = moments_of(z, y)
    assert parts.count == whole.count
    for name in ("zz", "yz", "yy", "z", "y"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_moments_of_nothing_are_refused() -> None:
    empty = moments_of(torch.zeros(INPUTS, 0), torch.zeros(OUTPUTS, 0))
    V0 = torch.zeros(OUTPUTS, INPUTS)
    with pytest.raises(DataError, match="at least one example"):
        regress(empty, V0, None, None, 1e-3, True)
    with pytest.raises(DataError, match="at least one example"):
        error(empty, V0, None, None)


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
@pytest.mark.parametrize("sampled", [True, False])
def test_moments_of_a_layer_are_those_of_its_unfolded_patches(
    name: str, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = convolution(name)
    x = draw(6, 3, 7, 6)
    patches = patches_by_unfold(x, conv)
    y = draw(6, 4, patches.shape[3], seed=1)
    at = torch.randint(patches.shape[3], (6, 5)) if sampled else None
    z, picked = patches.flatten(1, 2), y
    if at is not None:
        z = z.gather(2, at.unsqueeze(1).expand(-1, z.shape[1], -1))
        picked = y.gather(2, at.unsqueeze(1).expand(-1, 4, -1))
        found = patches_at(x, ConvGeometry.of(conv), at).flatten(1, 2)
        torch.testing.assert_close(found, z, atol=0, rtol=0)
    expected = Moments.of(z, picked)
    for buffer in (2**26, 1):  # all examples at once, and one by one
        monkeypatch.setattr(_regression, "_BUFFER_BYTES", buffer)
        got = layer_moments(x, y, ConvGeometry.of(conv), at, name="conv")
        assert got.count == expected.count
        for part in ("zz", "yz", "yy", "z", "y"):
            torch.testing.assert_close(getattr(got, part), getattr(expected, part))


def test_moments_of_other_positions_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"'conv'.*6 examples of 20 positions"):
        layer_moments(
            draw(6, 3, 7, 6),
            draw(6, 4, 21),
            ConvGeometry.of(convolution("plain")),
            None,
            name="conv",
        )
