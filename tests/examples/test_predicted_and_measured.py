"""The example of predicted and measured rises: exact where theory is, and what its page claims."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.plan._views import LayerView

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "predicted_and_measured.py"
PAGE = ROOT / "docs" / "why_the_basis.md"
PICTURE = ROOT / "docs" / "assets" / "predicted_and_measured.svg"
NUMBERS = PICTURE.with_suffix(".json")

_spec = importlib.util.spec_from_file_location("predicted_and_measured", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = example  # where its dataclasses look their annotations up
_spec.loader.exec_module(example)

EIGENBASIS = ("EigenDamage, K-FAC", "EigenDamage, λ")
FILTERS = ("C-OBD", "C-OBS", "Kron-OBD", "Kron-OBS")
FRACTIONS = (0.25, 0.5, 0.75)


def network(scale: float) -> tuple[nn.Sequential, Tensor]:
    """A linear softmax whose outputs hardly differ, so that F = S ⊗ A, and correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False, dtype=torch.float64)).eval()
    with torch.no_grad():
        weight = torch.randn(8, 6, dtype=torch.float64, generator=generator)
        model[0].weight.copy_(scale * weight)
    mixing = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    return model, torch.randn(400, 6, dtype=torch.float64, generator=generator) @ mixing


@pytest.fixture(scope="module")
def quadratic_problem() -> tuple[nn.Sequential, LayerView, Tensor]:
    model, images = network(1e-4)
    curvature = ed.estimate_curvature(
        model, [images], fisher="exact", also=("patches", "gradients"), progress=False
    )
    weight = model[0].weight.detach().unsqueeze(2)
    return model, LayerView("0", weight, None, curvature["0"], 1e-9), images


@pytest.fixture(scope="module")
def exact(quadratic_problem: tuple[nn.Sequential, LayerView, Tensor]) -> dict[str, list]:
    points = list(example.measure(*quadratic_problem, FRACTIONS))
    return {name: [p for p in points if p.method == name] for name in example.METHODS}


@pytest.fixture(scope="module")
def points() -> list:
    return example.load(NUMBERS)


def by_method(points: list, name: str) -> dict[float, object]:
    return {p.fraction: p for p in example.drawn(points)[name]}


def ratios(points: list, name: str) -> list[float]:
    return [p.measured / p.predicted for p in example.drawn(points)[name]]


@pytest.mark.parametrize("method", list(example.METHODS))
def test_where_the_fisher_is_s_times_a_the_joint_prediction_is_what_is_measured(
    method: str, exact: dict[str, list]
):
    for point in exact[method]:
        assert point.measured == pytest.approx(point.jointly, rel=1e-2)
        assert point.measured == pytest.approx(point.small, rel=1e-2)


@pytest.mark.parametrize("method", EIGENBASIS)
def test_there_entries_of_the_rotated_weight_add_up(
    method: str, quadratic_problem: tuple[nn.Sequential, LayerView, Tensor]
):
    model, layer, images = quadratic_problem
    reference = example.log_probabilities(model, {}, images)
    c = layer.curvature
    lam = c.kfac_eigenvalues() if method.endswith("K-FAC") else c.eigenvalues
    Q_S, Q_A = c.Q_S, c.Q_A
    rotated = Q_S.T @ layer.W @ Q_A
    for fraction in FRACTIONS:
        change = example.METHODS[method](layer, fraction)
        left = Q_S.T @ change.X @ Q_A
        rows, columns = left.abs().amax(1) < 1e-12, left.abs().amax(0) < 1e-12
        assert int(rows.sum() + columns.sum()) == round(fraction * 14)
        worth = 0.5 * rotated.square() * lam[:, :, 0]
        crossings = worth[rows][:, columns].sum().item()
        changed = example.log_probabilities(model, {"0.weight": change.X}, images)
        measured = example.divergences(reference, changed).mean().item()
        assert measured == pytest.approx(change.predicted - crossings, rel=1e-2)


def test_there_sums_over_correlated_units_do_not_add_up(exact: dict[str, list]):
    for method in ("OBD", "OBS", "C-OBD", "C-OBS", "Kron-OBS"):
        worst = max(abs(math.log(p.measured / p.predicted)) for p in exact[method])
        assert worst > 0.1, method


@pytest.mark.parametrize("method", list(example.METHODS))
def test_the_units_that_go_are_zero_and_as_many_as_asked_for(
    method: str, quadratic_problem: tuple[nn.Sequential, LayerView, Tensor]
):
    _, layer, _ = quadratic_problem
    X = example.METHODS[method](layer, 0.5).X
    if method in ("OBD", "OBS"):
        assert int((X == 0).sum()) == 24
    elif method not in EIGENBASIS:
        assert int((X == 0).all(1).sum()) == 4
    nothing = example.METHODS[method](layer, 0.0)
    torch.testing.assert_close(nothing.X, layer.W)
    assert nothing.predicted == 0


def test_cheapest_are_the_cheapest():
    prices = torch.tensor([[3.0, 1.0, 2.0], [6.0, 5.0, 4.0]])
    found = example.cheapest(prices, 0.5)
    assert found.tolist() == [[True, True, True], [False, False, False]]
    assert example.cheapest(prices, 0.3).tolist() == [[False, True, True], [False] * 3]


def test_divergence_is_that_of_categoricals():
    p, q = (torch.randn(5, 4, dtype=torch.float64).log_softmax(1) for _ in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(example.divergences(p, q), expected)


def test_measuring_leaves_the_model_as_it_was():
    model, images = network(0.3)
    before = model[0].weight.detach().clone()
    example.log_probabilities(model, {"0.weight": torch.zeros_like(before)}, images)
    assert torch.equal(model[0].weight, before)


def test_the_page_shows_the_tables_that_the_script_prints(points: list):
    page = PAGE.read_text(encoding="utf-8")
    assert example.factors(points) in page
    for fraction in (0.4, 0.9):
        assert example.stages(points, fraction) in page
    page = " ".join(page.split())  # lines may break anywhere in what follows
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8"))
    assert f"`{numbers['command']}`, seed {numbers['seed']}:" in page
    assert f"{numbers['images']['curvature']:,} training images" in page
    assert f"{numbers['images']['measured']:,} others" in page
    assert f"`{numbers['layer']}`" in page


def test_the_picture_was_drawn_from_the_numbers(points: list):
    text = PICTURE.read_text(encoding="utf-8")
    assert example.fingerprint(points) in text
    assert len(text) < 200_000


def test_what_the_page_says_of_all_methods(points: list):
    assert min(min(ratios(points, name)) for name in example.LOOKS) > 0.96
    assert min(min(ratios(points, name)[3:]) for name in example.LOOKS) > 1.45
    last = {name: ratios(points, name)[-1] for name in example.METHODS}
    assert min(last, key=last.__getitem__) == "EigenDamage, λ"
    assert max(last, key=last.__getitem__) == "C-OBS"
    assert f"by {example.short(last['EigenDamage, λ'])} times for EigenDamage" in PAGE.read_text()
    assert f"by {example.short(last['C-OBS'])} times for C-OBS" in PAGE.read_text()
    assert 0.11 < max(p.error / p.measured for p in points) < 0.12


def test_what_the_page_says_of_sums(points: list):
    at = {name: by_method(points, name) for name in example.METHODS}
    assert at["C-OBS"][0.4].jointly > 25 * at["C-OBS"][0.4].predicted
    assert at["OBS"][0.9].jointly > 7 * at["OBS"][0.9].predicted
    for name in ("Kron-OBD", "Kron-OBS"):
        assert max(p.jointly / p.predicted for p in at[name].values()) < 1.8
    apart = [p.jointly / p.predicted for p in at["EigenDamage, K-FAC"].values()]
    assert 1.4 < max(apart) < 1.5


def test_what_the_page_says_of_the_factors_and_of_large_steps(points: list):
    at = {name: by_method(points, name) for name in example.METHODS}
    for name in ("Kron-OBD", "Kron-OBS"):
        assert at[name][0.4].small > 4 * at[name][0.4].jointly
    assert at["EigenDamage, λ"][0.4].small > 2 * at["EigenDamage, λ"][0.4].predicted
    for fraction in (0.05, 0.1, 0.2, 0.4):
        point = at["OBS"][fraction]
        assert point.small == pytest.approx(point.jointly, rel=0.15)
    for name in FILTERS:
        assert 1.95 < at[name][0.9].measured / at[name][0.9].small < 3.1
        assert 0.45 < at[name][0.05].measured / at[name][0.05].small < 0.55
    for name in EIGENBASIS:
        assert 1 < at[name][0.9].measured / at[name][0.9].small < 2
    assert at["OBD"][0.9].measured > 10 * at["OBD"][0.9].small


def test_what_the_page_says_of_ranks(points: list):
    at = {name: by_method(points, name) for name in example.METHODS}
    measured = {f: {name: at[name][f].measured for name in FILTERS} for f in example.FRACTIONS}
    for fraction in (0.05, 0.1, 0.2):
        assert min(measured[fraction].values()) == measured[fraction]["Kron-OBS"]
    assert measured[0.4]["C-OBD"] == pytest.approx(measured[0.4]["Kron-OBS"], rel=0.05)
    assert min(measured[0.65].values()) == measured[0.65]["C-OBS"]
    assert max(measured[0.9].values()) < 1.2 * min(measured[0.9].values())
    for fraction in example.FRACTIONS:
        assert 2 * at["EigenDamage, λ"][fraction].measured < min(measured[fraction].values())
        assert 5 * at["OBS"][fraction].measured < at["OBD"][fraction].measured
    both = zip(ratios(points, EIGENBASIS[0]), ratios(points, EIGENBASIS[1]), strict=True)
    assert all(ours < kfac for kfac, ours in both)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_saving_gives_the_same_picture_every_time_and_numbers_that_load(
    suffix: str, points: list, tmp_path: Path
):
    drawn = []
    for name in ("first", "second"):
        out = tmp_path / f"{name}{suffix}"
        example.save(points, example.LAYER, out)
        drawn.append(out.read_bytes())
        assert example.load(out.with_suffix(".json")) == points
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) > 10_000
