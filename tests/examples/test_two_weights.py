"""The example of two weights: its closed forms, and what its page claims."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "two_weights.py"
PAGE = ROOT / "docs" / "why_the_basis.md"

_spec = importlib.util.spec_from_file_location("two_weights", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
two_weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(two_weights)

CORRELATIONS = (-0.95, -0.5, 0.0, 0.3, 0.8)


def dense(size: int, seed: int = 0) -> Tensor:
    """A positive definite matrix without structure."""
    root = torch.randn(
        size, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return root @ root.T / size


def vector(size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


CURVATURES = {
    **{f"r={r}": two_weights.fisher(r) for r in CORRELATIONS},
    "four": dense(4),
    "seven": dense(7, seed=2),
}


@pytest.fixture(params=list(CURVATURES))
def F(request: pytest.FixtureRequest) -> Tensor:
    return CURVATURES[request.param]


def minimiser(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where L-BFGS ends up."""
    at = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [at],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(at)
        value.backward()
        return value

    optimiser.step(closure)
    return at.detach()


def quadratic(change: Tensor, F: Tensor) -> Tensor:
    """½ Σ_pq δ_p F_pq δ_q."""
    return 0.5 * (change[:, None] * F * change).sum()


def every_removal(size: int) -> list[Tensor]:
    """All masks that remove something."""
    return [
        torch.tensor(mask) for mask in itertools.product([False, True], repeat=size) if any(mask)
    ]


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_the_posterior_has_the_correlation_asked_for(correlation: float):
    F = two_weights.fisher(correlation)
    covariance = torch.linalg.inv(F)
    found = covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()
    assert found.item() == pytest.approx(correlation, abs=1e-12)
    assert F.diagonal().tolist() == list(two_weights.CURVATURES)


def test_divergences_are_those_of_gaussians(F: Tensor):
    mean, variances = vector(len(F)), vector(len(F), seed=3).exp()
    p = MultivariateNormal(mean, precision_matrix=F)
    q = MultivariateNormal(mean, covariance_matrix=variances.diag())
    torch.testing.assert_close(two_weights.reverse_kl(variances, F), kl_divergence(q, p))
    torch.testing.assert_close(two_weights.forward_kl(variances, F), kl_divergence(p, q))


@pytest.mark.parametrize(
    ("divergence", "closed_form"),
    [
        (two_weights.reverse_kl, two_weights.obd_variances),
        (two_weights.forward_kl, two_weights.obs_variances),
    ],
    ids=["reverse is OBD", "forward is OBS"],
)
def test_closed_forms_minimise_their_divergence(
    divergence: Callable[[Tensor, Tensor], Tensor],
    closed_form: Callable[[Tensor], Tensor],
    F: Tensor,
):
    logs = minimiser(lambda logs: divergence(logs.exp(), F), torch.zeros(len(F), dtype=F.dtype))
    torch.testing.assert_close(logs.exp(), closed_form(F), rtol=1e-6, atol=0)


def test_each_price_is_exact_for_one_weight_under_its_own_rule(F: Tensor):
    weights = vector(len(F))
    obd = two_weights.prices(weights, two_weights.obd_variances(F))
    obs = two_weights.prices(weights, two_weights.obs_variances(F))
    for q in range(len(F)):
        mask = torch.arange(len(F)) == q
        torch.testing.assert_close(obd[q], quadratic(two_weights.remove(weights, mask), F))

        def after(moved: Tensor, mask: Tensor = mask) -> Tensor:
            return torch.where(mask, -weights, moved)

        best = after(minimiser(lambda moved: quadratic(after(moved), F), torch.zeros_like(weights)))
        torch.testing.assert_close(obs[q], quadratic(best, F))
        found = two_weights.remove_and_repair(weights, F, mask)
        torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-6)


def test_repair_of_any_removal_leaves_nothing_to_gain(F: Tensor):
    weights = vector(len(F))
    for mask in every_removal(len(F)):
        change = two_weights.remove_and_repair(weights, F, mask)
        torch.testing.assert_close(change[mask], -weights[mask])
        gradient = F @ change
        torch.testing.assert_close(
            gradient[~mask], torch.zeros_like(gradient[~mask]), rtol=0, atol=1e-10
        )


def test_sums_miss_the_truth_by_what_the_page_says(F: Tensor):
    weights = vector(len(F))
    truth = two_weights.rise(-weights, F)
    obd = two_weights.prices(weights, two_weights.obd_variances(F)).sum()
    cross = (weights[:, None] * F * weights).triu(diagonal=1).sum()
    torch.testing.assert_close(truth - obd, cross)


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_for_two_weights_obs_misses_more_and_both_within_bounds(correlation: float):
    F, r = two_weights.fisher(correlation), abs(correlation)
    ratios = []
    for angle in torch.linspace(0, math.pi, 181, dtype=torch.float64):
        weights = torch.stack([angle.cos(), angle.sin()]) / F.diagonal().sqrt()
        truth = two_weights.rise(-weights, F)
        obd = two_weights.prices(weights, two_weights.obd_variances(F)).sum()
        obs = two_weights.prices(weights, two_weights.obs_variances(F)).sum()
        torch.testing.assert_close(obs, (1 - r**2) * obd)
        missed = F[0, 1] * weights[0] * weights[1] + r**2 * obd
        torch.testing.assert_close(truth - obs, missed, rtol=1e-9, atol=1e-12)
        ratios.append(torch.stack([truth / obd, truth / obs]))
    ratio = torch.stack(ratios)
    bounds = torch.tensor([[1 - r, 1 / (1 + r)], [1 + r, 1 / (1 - r)]], dtype=torch.float64)
    # Not only kept but reached: 45° and 135° are among the angles.
    torch.testing.assert_close(torch.stack([ratio.amin(0), ratio.amax(0)]), bounds)


def test_on_average_over_signs_the_truth_lies_between_obs_and_obd(F: Tensor):
    weights = vector(len(F))
    obd = two_weights.prices(weights, two_weights.obd_variances(F))
    obs = two_weights.prices(weights, two_weights.obs_variances(F))
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(F))), dtype=F.dtype)
    rounding = 1e-12
    for mask in every_removal(len(F)):
        truths = [
            two_weights.rise(two_weights.remove_and_repair(weights * sign, F, mask), F)
            for sign in signs
        ]
        truth = torch.stack(truths).mean()
        assert obs[mask].sum() - rounding <= truth <= obd[mask].sum() + rounding


def test_in_the_eigenbasis_both_prices_agree_and_add_up_for_every_removal(F: Tensor):
    weights = vector(len(F))
    rotated, curvature = two_weights.rotate(weights, F)
    obd = two_weights.prices(rotated, two_weights.obd_variances(curvature))
    obs = two_weights.prices(rotated, two_weights.obs_variances(curvature))
    torch.testing.assert_close(obd, obs)
    torch.testing.assert_close(obd.sum(), two_weights.rise(-weights, F))
    for mask in every_removal(len(F)):
        held = two_weights.remove(rotated, mask)
        repaired = two_weights.remove_and_repair(rotated, curvature, mask)
        torch.testing.assert_close(repaired, held)
        torch.testing.assert_close(obd[mask].sum(), two_weights.rise(held, curvature))


def test_rotated_curvature_prices_a_direction_as_the_original_does(F: Tensor):
    weights = vector(len(F))
    rotated, curvature = two_weights.rotate(weights, F)
    eigenvectors = torch.linalg.eigh(F).eigenvectors
    for q in range(len(F)):
        mask = torch.arange(len(F)) == q
        along = eigenvectors[:, q] * (eigenvectors[:, q] @ weights)
        expected = two_weights.rise(-along, F)
        found = two_weights.rise(two_weights.remove(rotated, mask), curvature)
        torch.testing.assert_close(found, expected)


def test_obs_comes_close_in_the_table_by_accident():
    F = two_weights.fisher(-two_weights.CORRELATION)
    obs = two_weights.prices(two_weights.WEIGHTS, two_weights.obs_variances(F)).sum()
    assert two_weights.rise(-two_weights.WEIGHTS, F) > 4 * obs


def test_the_page_shows_the_table_that_the_script_prints():
    assert two_weights.table() in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_script_draws_the_same_picture_every_time(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    drawn = []
    for name in ("first", "second"):
        out = tmp_path / f"{name}{suffix}"
        monkeypatch.setattr(sys, "argv", ["two_weights.py", "--out", str(out)])
        two_weights.main()
        drawn.append(out.read_bytes())
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) > 10_000
    printed = capsys.readouterr().out
    assert two_weights.table() in printed
    assert str(out) in printed
