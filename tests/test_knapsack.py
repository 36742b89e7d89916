"""The multiple-choice knapsack equals brute force, proves what it says, and keeps the limits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from eigendamage.errors import EigenDamageError
from eigendamage.plan import _knapsack_pool, _knapsack_search
from eigendamage.plan._knapsack import Allocation, Menu, allocate, least
from eigendamage.plan._knapsack_pool import efficient


def brute_force(menus: Sequence[Menu], limits: Sequence[float]) -> float | None:
    """The least price over all combinations within the limits."""
    prices, costs = np.zeros(1), np.zeros((1, len(limits)))
    for menu in menus:
        prices = (prices[:, None] + menu.prices).ravel()
        costs = (costs[:, None] + menu.costs).reshape(-1, len(limits))
    within = (costs <= np.array(limits) * (1 + 1e-12)).all(axis=1)
    return float(prices[within].min()) if within.any() else None


def check_totals(found: Allocation, menus: Sequence[Menu], limits: Sequence[float]) -> None:
    """What an allocation says of itself is true of its choice, and within the limits."""
    assert len(found.choice) == len(menus)
    pairs = list(zip(menus, found.choice, strict=True))
    assert found.price == pytest.approx(sum(m.prices[o] for m, o in pairs), rel=1e-12)
    cost = sum(m.costs[o] for m, o in pairs)
    np.testing.assert_allclose(found.cost, cost, rtol=1e-12)
    assert (cost <= np.array(limits) * (1 + 1e-12)).all()
    assert found.bound <= found.price


def small_menus(seed: int) -> tuple[list[Menu], list[float]]:
    """Random menus of many kinds, and limits anywhere between hopeless and slack."""
    random = np.random.default_rng(seed)
    units, sites = int(random.integers(1, 4)), int(random.integers(1, 7))
    scale = 10.0 ** random.uniform(-1, 10, units)
    menus: list[Menu] = []
    for _ in range(sites):
        options = int(random.integers(1, 7 if sites < 6 else 5))
        prices = random.uniform(0, 1, options)
        costs = random.uniform(0, 1, (options, units)) * scale
        kind = seed % 5
        if kind == 1:  # ties: few values of each
            prices, costs = np.round(prices * 3), np.round(costs / scale * 4) * scale
        elif kind == 2:  # prices over many orders, many of them 0
            prices = np.where(random.random(options) < 0.4, 0.0, 10.0 ** (15 * prices - 12))
        elif kind == 3 and menus:  # layers of the same shape
            prices, costs = menus[0].prices, menus[0].costs
        elif kind == 4:  # whole numbers, as MACs are; dear where cheap to run
            costs = np.round(costs + 1)
            prices = (1 - costs[:, 0] / (scale[0] + 1)).clip(0) ** 2 * 10.0 ** random.uniform(-6, 2)
        menus.append(Menu(prices, costs))
    low = np.array([least(menus, unit) for unit in range(units)])
    high = np.sum([menu.costs.max(axis=0) for menu in menus], axis=0)
    limits = low + random.uniform(-0.05, 0.9, units) * (high - low)
    if seed % 7 == 0:  # exactly what some choice costs
        limits = np.sum([menu.costs[random.integers(len(menu.prices))] for menu in menus], axis=0)
    return menus, [float(limit) for limit in limits]


def curves(sites: int, options: int, units: int, seed: int) -> tuple[list[Menu], list[float]]:
    """Noisy convex curves, as layers have them, and half of what they cost in full."""
    random = np.random.default_rng(seed)
    menus: list[Menu] = []
    for _ in range(sites):
        full = 10.0 ** random.uniform(4, 8, units)
        kept = np.sort(random.uniform(0.03, 1, options))
        noise = np.exp(0.2 * random.standard_normal(options))
        power = random.uniform(1.5, 4)
        prices = 10.0 ** random.uniform(-4, 0) * (1 - kept) ** power * noise
        spread = np.exp(0.1 * random.standard_normal((options, units)))
        menus.append(Menu(prices, np.round(full * kept[:, None] * spread)))
    limits = 0.5 * np.sum([menu.costs[-1] for menu in menus], axis=0)
    return menus, [float(limit) for limit in limits]


@pytest.mark.parametrize("seed", range(240))
def test_equals_brute_force(seed: int) -> None:
    menus, limits = small_menus(seed)
    best = brute_force(menus, limits)
    found = allocate(menus, limits)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        check_totals(found, menus, limits)
        assert found.price == pytest.approx(best, rel=1e-9, abs=0)
        assert found.bound <= best * (1 + 1e-12)
        assert found.gap <= 1e-8 * best


def test_small_menus_cover_what_they_are_meant_to() -> None:
    results = [brute_force(*small_menus(seed)) for seed in range(0, 240, 3)]
    assert 5 <= sum(result is None for result in results) <= 40
    assert any(result == 0 for result in results)


@pytest.mark.parametrize("units", [1, 2])
def test_large_instance_is_solved_to_a_small_gap(units: int) -> None:
    menus, limits = curves(sites=55, options=400, units=units, seed=0)
    found = allocate(menus, limits)
    assert found is not None
    check_totals(found, menus, limits)
    assert found.gap < 1e-6 * found.price


@pytest.mark.parametrize("units", [1, 2])
def test_larger_limit_never_costs_more(units: int) -> None:
    menus, limits = curves(sites=12, options=60, units=units, seed=1)
    prices: list[float] = []
    for factor in np.linspace(0.3, 2.2, 12):
        found = allocate(menus, [factor * limit for limit in limits])
        prices.append(np.inf if found is None else found.price)
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(prices))
    assert prices[-1] < prices[len(prices) // 2] < np.inf


@pytest.mark.parametrize("units", [1, 2])
def test_same_shapes_have_ties_and_one_answer(units: int) -> None:
    menus, limits = curves(sites=1, options=40, units=units, seed=2)
    many, total = menus * 16, [15.7 * limit for limit in limits]
    found = allocate(many, total)
    assert found is not None
    check_totals(found, many, total)
    assert found.gap < 1e-6 * found.price
    assert allocate(many, total) == found


def test_units_may_be_scaled_and_a_slack_one_changes_nothing() -> None:
    menus, limits = curves(sites=10, options=50, units=1, seed=3)
    found = allocate(menus, limits)
    scaled = [Menu(m.prices, np.hstack([m.costs * 1e-7, m.costs * 1e3])) for m in menus]
    again = allocate(scaled, [limits[0] * 1e-7, limits[0] * 1e5])
    assert found is not None
    assert again is not None
    assert again.price == pytest.approx(found.price, rel=1e-9)


def test_price_of_what_cannot_be_chosen_does_not_blur_the_rest() -> None:
    menus, limits = curves(sites=10, options=50, units=2, seed=4)
    tiny = [Menu(m.prices * 1e-9, m.costs) for m in menus]
    dear = [
        Menu(np.append(m.prices, 1e3), np.append(m.costs, m.costs[:1] * 0.5, axis=0)) for m in tiny
    ]
    found, without = allocate(dear, limits), allocate(tiny, limits)
    assert found is not None
    assert without is not None
    assert found.price == pytest.approx(without.price, rel=1e-9)


def test_limit_of_zero_leaves_only_what_is_free() -> None:
    costs = np.array([[0.0, 5.0], [3.0, 1.0], [0.0, 7.0]])
    menu = Menu(np.array([2.0, 0.0, 1.0]), costs)
    found = allocate([menu, menu], [0.0, 12.0])
    assert found is not None
    assert (found.price, found.cost) == (3.0, (0.0, 12.0))
    assert allocate([menu, menu], [0.0, 9.0]) is None


def test_the_least_excess_over_a_limit_is_not_accepted() -> None:
    step = 1e-10  # of the limit: the pair that costs nothing is over by this
    menu = Menu(np.array([0.0, 1.0]), np.array([[1.0, 1.0], [0.5, 0.5]]))
    limits = [2.0 * (1 - step)] * 2
    found = allocate([menu, menu], limits)
    assert found is not None
    check_totals(found, [menu, menu], limits)
    assert found.price == 1.0


@pytest.mark.parametrize("width", [1, 20])
def test_stopped_early_the_bound_is_still_a_bound(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    menus, limits = curves(sites=30, options=100, units=2, seed=5)
    best = allocate(menus, limits)
    order = _knapsack_search._fewest_options
    monkeypatch.setattr(_knapsack_search, "_ROUNDS", ((width, order),))
    hasty = allocate(menus, limits)
    assert best is not None
    assert hasty is not None
    check_totals(hasty, menus, limits)
    assert hasty.bound <= best.price * (1 + 1e-12)
    assert best.price <= hasty.price * (1 + 1e-12)
    assert hasty.gap > best.gap


@pytest.mark.parametrize("units", [1, 2, 4])
def test_nothing_is_printed(units: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert allocate(*curves(sites=10, options=60, units=units, seed=6)) is not None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("seed", range(10))
def test_limits_that_hardly_anything_meets_are_met(seed: int) -> None:
    random = np.random.default_rng(seed)
    menus = [Menu(random.random(6), random.random((6, 3))) for _ in range(10)]
    planted = random.integers(0, 6, 10)
    limits = np.sum([m.costs[o] for m, o in zip(menus, planted, strict=True)], axis=0)
    found = allocate(menus, limits.tolist())
    assert found is not None
    check_totals(found, menus, limits.tolist())
    assert found.price <= sum(m.prices[o] for m, o in zip(menus, planted, strict=True)) + 1e-12


@pytest.mark.parametrize("units", [1, 2, 4])
def test_efficient_are_those_that_nothing_dominates(
    units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_knapsack_pool, "_BLOCK", 128)  # several blocks, the last one not full
    random = np.random.default_rng(units)
    keys = random.integers(0, 12, (300, units + 1)).astype(np.float64)  # with ties and equal ones
    below = (keys[:, None] <= keys).all(axis=2)  # [a, b]: a equals or is below b
    equal_before = below & below.T & (np.arange(300)[:, None] < np.arange(300))
    dominated = ((below & ~below.T) | equal_before).any(axis=0)
    found = efficient(keys[:, 0], keys[:, 1:])
    assert sorted(found.tolist()) == np.flatnonzero(~dominated).tolist()
    assert (np.diff(keys[found, 0]) >= 0).all()


def test_least_is_the_sum_of_minima() -> None:
    menus = [
        Menu(np.zeros(2), np.array([[3.0, 1.0], [2.0, 4.0]])),
        Menu(np.zeros(1), np.array([[5.0, 6.0]])),
    ]
    assert [least(menus, 0), least(menus, 1)] == [7.0, 7.0]


def test_no_menus_cost_nothing() -> None:
    assert allocate([], [0.0]) == Allocation((), 0.0, (0.0,), 0.0)


def test_what_is_no_menu_is_refused() -> None:
    with pytest.raises(EigenDamageError, match="no options"):
        Menu(np.zeros(0), np.zeros((0, 1)))
    with pytest.raises(EigenDamageError, match="prices of a menu's option 1"):
        Menu(np.array([0.0, -1.0]), np.zeros((2, 1)))
    with pytest.raises(EigenDamageError, match="costs of a menu's option 0"):
        Menu(np.zeros(2), np.array([[np.nan], [1.0]]))
    menu = Menu(np.zeros(1), np.ones((1, 2)))
    with pytest.raises(EigenDamageError, match="2 units, but there are 1 limits"):
        allocate([menu], [1.0])
    with pytest.raises(EigenDamageError, match="expected finite"):
        allocate([menu], [1.0, float("inf")])
