"""The baselines' prices and updates against least squares and a dense Fisher, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eigendamage.errors import EigenDamageError
from eigendamage.plan.prices import c_obd, c_obs, kron_obd, kron_obs, obd, obs
from eigendamage.plan.prices._inverse import damped, inverse, official_inverse, solve
from eigendamage.plan.prices._quadratic import quadratic

ROWS, COLUMNS = 4, 6
RANKS = [(4, 6), (2, 6), (4, 3), (2, 3), (1, 1)]
every_rank = pytest.mark.parametrize("ranks", RANKS)
INVERTIBLE = RANKS[0]  # both factors


def moment(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """A second moment of this rank, with correlated variables of unlike size."""
    x = torch.randn(rank, size, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-1, 1, size, dtype=torch.float64)
    return x.T @ x / rank


def layer(ranks: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W, S and A with S and A of these ranks."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    return W, moment(ROWS, ranks[0], generator), moment(COLUMNS, ranks[1], generator)


def root(M: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(M)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def cheapest(W: Tensor, S: Tensor, A: Tensor, free: Tensor) -> Tensor:
    """The X of least quadratic that is zero off ``free``, by dense least squares."""
    metric = torch.kron(root(S), root(A))
    columns = metric[:, free.flatten()]
    found = torch.linalg.lstsq(
        columns, (metric @ W.flatten()), rcond=1e-12, driver="gelsd"
    ).solution
    X = torch.zeros_like(W)
    X[free] = found
    return X


def block(rows: list[int], columns: list[int]) -> Tensor:
    free = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    free[torch.tensor(rows)[:, None], torch.tensor(columns)] = True
    return free


def full_size(X: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    full = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    full[torch.tensor(rows)[:, None], torch.tensor(columns)] = X
    return full


def assert_same_cost(ours: Tensor, best: Tensor, W: Tensor, S: Tensor, A: Tensor) -> None:
    """As good as the best, next to what removing all of W would cost."""
    scale = quadratic(W, torch.zeros_like(W), S, A)
    assert abs(quadratic(W, ours, S, A) - quadratic(W, best, S, A)) <= 1e-9 * scale


# What a change costs.


def test_quadratic_is_that_of_the_dense_fisher():
    W, S, A = layer((4, 6))
    X = torch.roll(W, 1, 1)
    change = (W - X).flatten()
    expected = 0.5 * change @ torch.kron(S, A) @ change
    assert quadratic(W, X, S, A) == pytest.approx(float(expected), rel=1e-12)


# Inverses.


def test_damping_is_relative_to_the_scale():
    _, S, _ = layer((2, 3))
    torch.testing.assert_close(damped(1e-8 * S, 0.1), 1e-8 * damped(S, 0.1), rtol=1e-12, atol=0.0)
    added = damped(S, 0.1) - S
    expected = 0.1 * S.diagonal().mean() * torch.eye(ROWS, dtype=torch.float64)
    torch.testing.assert_close(added, expected, rtol=1e-9, atol=1e-12)


def test_inverse_of_a_damped_singular_factor():
    _, S, _ = layer((2, 3))
    product = inverse(S, 1e-3) @ damped(S, 1e-3)
    torch.testing.assert_close(product, torch.eye(ROWS, dtype=torch.float64), rtol=0.0, atol=1e-9)


def test_a_singular_factor_without_damping_is_an_error_that_says_what_to_do():
    zero = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(EigenDamageError, match=r"3 × 3 factor with damping 0 .* larger damping"):
        inverse(zero, 0.0)


def test_removing_anything_under_an_all_zero_factor_is_free_and_finite():
    W, S, A = layer((4, 6))
    zero_S, zero_A = torch.zeros_like(S), torch.zeros_like(A)
    for left, right in ((zero_S, A), (S, zero_A), (zero_S, zero_A)):
        D_S, D_A = damped(left, 1e-3), damped(right, 1e-3)
        S_inverse, A_inverse = inverse(left, 1e-3), inverse(right, 1e-3)
        for price in (
            obs.weight_prices(W, inverse(left, 1e-3), inverse(right, 1e-3)),
            c_obs.row_prices(W, S_inverse, A_inverse),
            kron_obd.row_prices(W, D_S, D_A),
            kron_obs.row_prices(W, S_inverse, D_A),
            kron_obs.column_prices(W, D_S, A_inverse, [[0, 1], [2]]),
        ):
            assert price.min() >= 0
            assert price.max() < 1e-50
        for X in (
            c_obs.update(W, S_inverse, A_inverse, [1]),
            kron_obs.one_at_a_time_update(W, S_inverse, [1]),
            kron_obs.joint_update(W, left, right, [0, 2], [1, 2], 1e-3),
            obs.masked_update(W, left, right, W > 0, 1e-3),
        ):
            assert X.isfinite().all()


def test_official_inverse_inverts_what_it_does_not_cut_off():
    Q = torch.linalg.qr(layer((4, 6))[1]).Q
    d = torch.tensor([-1e-5, 1e-16, 1e-4, 2.0], dtype=torch.float64)
    expected = (
        Q @ torch.diag(torch.tensor([1e10, 1e10, 1 / 1.000001e-4, 0.5], dtype=torch.float64)) @ Q.T
    )
    torch.testing.assert_close(official_inverse((Q * d) @ Q.T), expected, rtol=1e-5, atol=0.0)


def test_variables_that_are_equal_but_for_rounding_share_what_they_take_over():
    """A Cholesky of this M succeeds, and would answer 5 and −4."""
    epsilon = torch.finfo(torch.float64).eps
    M = torch.tensor([[1.0, 1.0], [1.0, 1.0 + epsilon]], dtype=torch.float64)
    B = torch.tensor([[1.0], [1.0 - 4 * epsilon]], dtype=torch.float64)
    torch.testing.assert_close(solve(M, B), torch.full_like(B, 0.5))


# OBD and C-OBD.


def test_obd_and_c_obd_are_the_quadratic_of_a_diagonal_fisher():
    generator = torch.Generator().manual_seed(0)
    weight, diagonal = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64)
    diagonal = diagonal.square()
    bias, bias_diagonal = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    bias_diagonal = bias_diagonal.square()

    def rise(change: Tensor, fisher: Tensor) -> Tensor:
        return 0.5 * change.flatten() @ torch.diag(fisher.flatten()) @ change.flatten()

    single = obd.weight_prices(weight, diagonal)
    for at in torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist():
        change = torch.zeros_like(weight)
        change[tuple(at)] = weight[tuple(at)]
        torch.testing.assert_close(single[tuple(at)], rise(change, diagonal))
    bare = c_obd.row_prices(weight, None, diagonal, None)
    whole = c_obd.row_prices(weight, bias, diagonal, bias_diagonal)
    for row in range(3):
        torch.testing.assert_close(bare[row], rise(weight[row], diagonal[row]))
        with_bias = torch.cat([weight[row].flatten(), bias[row : row + 1]])
        fisher = torch.cat([diagonal[row].flatten(), bias_diagonal[row : row + 1]])
        torch.testing.assert_close(whole[row], rise(with_bias, fisher))


# Rows.


@every_rank
def test_kron_obd_is_what_zeroing_a_row_costs(ranks):
    W, S, A = layer(ranks)
    price = kron_obd.row_prices(W, S, A)
    for row in range(ROWS):
        X = W.clone()
        X[row] = 0
        assert float(price[row]) == pytest.approx(quadratic(W, X, S, A), rel=1e-10)


@every_rank
def test_kron_obs_is_what_removing_a_row_costs_after_the_best_repair(ranks):
    W, S, A = layer(ranks)
    S, A = damped(S, 1e-3), damped(A, 1e-3)
    price = kron_obs.row_prices(W, inverse(S, 0.0), A)
    for row in range(ROWS):
        rows = [r for r in range(ROWS) if r != row]
        best = cheapest(W, S, A, block(rows, list(range(COLUMNS))))
        assert float(price[row]) == pytest.approx(quadratic(W, best, S, A), rel=1e-8)
        alone = kron_obs.one_at_a_time_update(W, inverse(S, 0.0), [row])
        torch.testing.assert_close(alone, best, rtol=1e-6, atol=1e-8)


@every_rank
def test_official_formulas_agree_with_the_papers_where_inputs_are_uncorrelated(ranks):
    W, S, A = layer(ranks)
    S_inverse = inverse(S, 1e-3)
    for price, official in (
        (
            kron_obd.row_prices(W, S, A.diag().diag()),
            kron_obd.official_row_prices(W, S, A.diag().diag()),
        ),
        (
            kron_obs.row_prices(W, S_inverse, A.diag().diag()),
            kron_obs.official_row_prices(W, S_inverse, A.diag().diag()),
        ),
    ):
        torch.testing.assert_close(price, official)
    written_out = torch.stack(
        [(W[r].square()[:, None] * A).sum() * S[r, r] / 2 for r in range(ROWS)]
    )
    torch.testing.assert_close(kron_obd.official_row_prices(W, S, A), written_out)


@every_rank
def test_c_obs_is_the_sum_over_single_weights_and_so_is_its_update(ranks):
    W, S, A = layer(ranks)
    S_inverse, A_inverse = inverse(S, 1e-3), inverse(A, 1e-3)
    single = obs.weight_prices(W, inverse(S, 1e-3), inverse(A, 1e-3))
    torch.testing.assert_close(c_obs.row_prices(W, S_inverse, A_inverse), single.sum(1))

    pruned, F_inverse = [0, 2], torch.kron(S_inverse, A_inverse)
    expected = W.flatten().clone()
    for q in block(pruned, list(range(COLUMNS))).flatten().nonzero().flatten().tolist():
        expected -= F_inverse[:, q] * W.flatten()[q] / F_inverse[q, q]
    found = c_obs.update(W, S_inverse, A_inverse, pruned)
    torch.testing.assert_close(found, expected.reshape(W.shape), rtol=1e-9, atol=1e-9)


# Columns.


@every_rank
@pytest.mark.parametrize(
    "groups", [[[0], [3], [5]], [[0, 1], [2, 3], [4, 5]], [[4, 1, 0], [2], [5, 3]]]
)
def test_column_prices_are_what_removing_them_costs_after_the_best_repair(ranks, groups):
    W, S, A = layer(ranks)
    S, A = damped(S, 1e-3), damped(A, 1e-3)
    price = kron_obs.column_prices(W, S, inverse(A, 0.0), groups)
    for at, group in enumerate(groups):
        columns = [c for c in range(COLUMNS) if c not in group]
        best = cheapest(W, S, A, block(list(range(ROWS)), columns))
        assert float(price[at]) == pytest.approx(quadratic(W, best, S, A), rel=1e-7)


def test_a_single_column_has_the_closed_form_price():
    W, S, A = layer((4, 6))
    A_inverse = inverse(A, 1e-3)
    expected = 0.5 * (W.T @ S @ W).diagonal() / A_inverse.diagonal()
    groups = [[c] for c in range(COLUMNS)]
    torch.testing.assert_close(kron_obs.column_prices(W, S, A_inverse, groups), expected)


# Single weights.


@every_rank
def test_obs_is_what_removing_a_weight_costs_after_the_best_repair(ranks):
    W, S, A = layer(ranks)
    price = obs.weight_prices(W, inverse(S, 1e-3), inverse(A, 1e-3))
    S, A = damped(S, 1e-3), damped(A, 1e-3)
    for at in ((0, 0), (1, 4), (3, 5)):
        free = torch.ones_like(W, dtype=torch.bool)
        free[at] = False
        assert float(price[at]) == pytest.approx(
            quadratic(W, cheapest(W, S, A, free), S, A), rel=1e-6
        )


@every_rank
@pytest.mark.parametrize("damping", [0.0, 1e-3])
@settings(deadline=None, max_examples=15, derandomize=True)
@given(data=st.data())
def test_masked_update_is_the_least_squares_solution(ranks, damping, data):
    W, S, A = layer(ranks, seed=data.draw(st.integers(0, 999)))
    size = ROWS * COLUMNS
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    keep = keep.reshape(W.shape)
    found = obs.masked_update(W, S, A, keep, damping, tolerance=1e-12, iterations=5000)
    assert (found[~keep] == 0).all()
    S, A = damped(S, damping), damped(A, damping)
    assert_same_cost(found, cheapest(W, S, A, keep), W, S, A)


@every_rank
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_masked_update_stopped_early_costs_no_more_than_masking(ranks, iterations):
    W, S, A = layer(ranks)
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    found = obs.masked_update(W, S, A, keep, 1e-3, iterations=iterations)
    D_S, D_A = damped(S, 1e-3), damped(A, 1e-3)
    assert quadratic(W, found, D_S, D_A) <= quadratic(W, W * keep, D_S, D_A)
    assert (found[~keep] == 0).all()


def test_single_weight_updates_added_up_can_cost_more_than_no_repair():
    """Why `masked_update` is there."""
    W = torch.ones(1, 3, dtype=torch.float64)
    S, A = torch.ones(1, 1, dtype=torch.float64), torch.full((3, 3), 0.95, dtype=torch.float64)
    A.fill_diagonal_(1.0)
    keep = torch.tensor([[True, False, False]])
    A_inverse = inverse(A, 0.0)
    summed = W - (W * ~keep / A_inverse.diagonal()) @ A_inverse
    costs = [quadratic(W, X, S, A) for X in (summed * keep, W * keep)]
    assert quadratic(W, obs.masked_update(W, S, A, keep, 0.0), S, A) < min(costs)


# Rows and columns that go together.


def subsets(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size - 1), min_size=1, unique=True)


@every_rank
@pytest.mark.parametrize("damping", [0.0, 1e-3])
@settings(deadline=None, max_examples=25, derandomize=True)
@given(rows=subsets(ROWS), columns=subsets(COLUMNS), seed=st.integers(0, 999))
def test_joint_update_is_the_least_squares_solution(ranks, damping, rows, columns, seed):
    W, S, A = layer(ranks, seed)
    X = kron_obs.joint_update(W, S, A, rows, columns, damping)
    found = full_size(X, rows, columns)
    S, A = damped(S, damping), damped(A, damping)
    best = cheapest(W, S, A, block(rows, columns))
    assert_same_cost(found, best, W, S, A)
    if damping or ranks == INVERTIBLE:
        torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-5)


@every_rank
@settings(deadline=None, max_examples=25, derandomize=True)
@given(rows=subsets(ROWS), columns=subsets(COLUMNS), seed=st.integers(0, 999))
def test_no_other_update_costs_less_than_the_joint_one(ranks, rows, columns, seed):
    """Singular factors too: the others' inverses are damped, the cost is of the factors given."""
    W, S, A = layer(ranks, seed)
    S_inverse, A_inverse = inverse(S, 1e-3), inverse(A, 1e-3)
    joint = full_size(kron_obs.joint_update(W, S, A, rows, columns, 0.0), rows, columns)
    pruned = [r for r in range(ROWS) if r not in rows]
    kept = block(rows, columns)
    slack = 1e-9 * quadratic(W, torch.zeros_like(W), S, A)
    for other in (
        W,
        kron_obs.one_at_a_time_update(W, S_inverse, pruned),
        c_obs.update(W, S_inverse, A_inverse, pruned),
    ):
        assert quadratic(W, joint, S, A) <= quadratic(W, other * kept, S, A) + slack


@every_rank
def test_removing_nothing_changes_nothing(ranks):
    W, S, A = layer(ranks)
    X = kron_obs.joint_update(W, S, A, range(ROWS), range(COLUMNS), 0.0)
    assert torch.equal(X, W)


def test_a_dead_unit_is_removed_for_free_and_leaves_the_others_alone():
    """A row of zeros in S, as dead ReLUs give it, without damping."""
    W, S, A = layer((4, 6))
    S[1], S[:, 1] = 0, 0
    rows, columns = [0, 2, 3], list(range(COLUMNS))
    X = kron_obs.joint_update(W, S, A, rows, columns, 0.0)
    torch.testing.assert_close(X, W[rows])
    assert float(kron_obd.row_prices(W, S, A)[1]) == 0


def test_duplicated_inputs_are_merged_without_loss():
    """Two columns of A that are one variable twice: the one that stays takes over the other."""
    W, S, A = layer((4, 6))
    twice = [0, 1, 2, 3, 4, 4]
    A = A[twice][:, twice]
    X = kron_obs.joint_update(W, S, A, range(ROWS), range(5), 0.0)
    assert quadratic(W, full_size(X, list(range(ROWS)), list(range(5))), S, A) <= 1e-12
    torch.testing.assert_close(X[:, 4], W[:, 4] + W[:, 5], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(X[:, :4], W[:, :4], rtol=1e-6, atol=1e-6)


def wide_layer(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return W, moment(rows, 2 * rows, generator), moment(columns, 2 * columns, generator)


@pytest.mark.parametrize("readers", [1, 2])
def test_elimination_takes_the_cheapest_next_and_its_rises_add_up(readers):
    """Against the joint update of every prefix, and against trying all channels at every step."""
    groups = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    cases = [wide_layer(6, 11, seed) for seed in range(readers)]

    def joint(gone):
        total = 0.0
        for W, S, A in cases:
            kept = [c for c in range(11) if c not in {c for g in gone for c in groups[g]}]
            X = torch.zeros_like(W)
            X[:, kept] = kron_obs.joint_update(W, S, A, range(6), kept, 0.0)
            total += quadratic(W, X, S, A)
        return total

    prices = kron_obs.elimination_prices(
        [kron_obs.Reader(W, S, inverse(A, 0.0), groups) for W, S, A in cases]
    )
    gone, spent, highest = [], 0.0, 0.0
    while len(gone) < len(groups):
        left = [g for g in range(len(groups)) if g not in gone]
        rises = {g: joint([*gone, g]) - spent for g in left}
        cheapest = min(rises, key=rises.get)
        highest = max(highest, rises[cheapest])
        assert float(prices[cheapest]) == pytest.approx(highest, rel=1e-9)
        gone.append(cheapest)
        spent = joint(gone)
    alone = sum(kron_obs.column_prices(W, S, inverse(A, 0.0), groups) for W, S, A in cases)
    assert float(prices.min()) == pytest.approx(float(alone.min()))


def test_plain_column_prices_are_what_removing_them_costs_without_repair():
    W, S, A = wide_layer(5, 7, 0)
    groups = [[0, 1, 2], [3], [5, 6]]
    for group, price in zip(groups, kron_obs.plain_column_prices(W, S, A, groups), strict=True):
        X = W.clone()
        X[:, group] = 0
        assert float(price) == pytest.approx(quadratic(W, X, S, A), rel=1e-12)
