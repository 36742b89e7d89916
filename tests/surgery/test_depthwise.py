"""Depthwise separable EigenDamage: the decomposition, its price, and the layers that it becomes."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.layers import find_layers
from eigendamage.plan import DepthwiseBlock
from eigendamage.plan.prices.eigendamage import rotated_weight, unit_prices
from eigendamage.plan.prices.eigendamage_dw import CP, block_price, cp_core, default_rank, layer_cp
from eigendamage.surgery._factor import block_stages, depthwise_stages, factored_module
from tests.cases import CONVOLUTIONS, convolution

KERNELS = [name for name in CONVOLUTIONS if not name.startswith("pointwise")]
every_kernel = pytest.mark.parametrize("name", KERNELS)


def normal(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, dtype=torch.float64, generator=generator)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


def planted(rank: int, outputs: int, inputs: int, offsets: int, seed: int = 0) -> CP:
    """A sum of known terms."""
    a, b, c = (
        normal(n, rank, seed=3 * seed + at) for at, n in enumerate((outputs, inputs, offsets))
    )
    return CP(U=a, S=c.T.contiguous(), V=b)


def network(name: str, rank: int | None = None) -> nn.Sequential:
    """A convolution of the table, of a weight of the given CP rank, before a classifier."""
    torch.manual_seed(0)
    conv = convolution(name, 3, 4)
    if rank is not None:
        weight = planted(rank, 4, 3, conv.weight[0, 0].numel()).tensor()
        conv.weight.data = weight.reshape(conv.weight.shape)
    head = nn.Linear(16, 4)
    layers = (conv, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), head)
    return nn.Sequential(*layers).double().eval()


def images(examples: int = 8, seed: int = 1) -> Tensor:
    return normal(examples, 3, 7, 6, seed=seed)


def curvature_of(model: nn.Module) -> ed.Curvature:
    return ed.estimate_curvature(model, [images()], progress=False)


def separated(model: nn.Module, rank: int, rows: list[int], columns: list[int]) -> nn.Module:
    """The first layer of a model, depthwise separable."""
    c, layer = curvature_of(model)["0"], find_layers(model).compressible["0"]
    cp = layer_cp(layer.weight(), c, rows, columns, rank)
    return factored_module(layer, depthwise_stages(cp, c.Q_S, c.Q_A, rows, columns))


# The decomposition.


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_sum_is_recovered(seed: int) -> None:
    core = planted(3, 8, 7, 9, seed).tensor()
    found = cp_core(core, 3)
    assert relative(found.tensor(), core) < 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_its_terms_are_recovered_up_to_order_and_size(seed: int) -> None:
    hidden = planted(2, 8, 7, 9, seed)
    found = cp_core(hidden.tensor(), 2)
    a, b = (nn.functional.normalize(m.U, dim=0) for m in (hidden, found))
    cosines = (a.T @ b).abs()
    torch.testing.assert_close(cosines.max(0).values, torch.ones(2, dtype=torch.float64))
    assert set(cosines.argmax(0).tolist()) == {0, 1}


def test_as_many_terms_as_a_pair_of_sizes_has_entries_are_enough() -> None:
    core = normal(4, 3, 9)
    found = cp_core(core, 12)
    assert relative(found.tensor(), core) < 2e-3


def test_more_terms_than_needed_do_no_harm() -> None:
    core = planted(1, 6, 5, 9).tensor()
    found = cp_core(core, 5)
    assert relative(found.tensor(), core) < 2e-3


@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        # The unfolding by rows has fewer columns than terms.
        ((16, 1, 9), 16),
        ((10, 1, 9), 10),
        ((20, 2, 9), 20),
        ((64, 3, 9), 64),
        ((7, 2, 3), 7),
        # The one by columns has.
        ((2, 7, 2), 7),
        ((1, 16, 9), 16),
        # One-dimensional kernels, and thin cores of more terms than any size.
        ((12, 3, 3), 12),
        ((5, 1, 3), 30),
        ((1, 1, 9), 20),
        ((1, 1, 2), 1),
        ((4, 3, 9), 40),
        ((6, 2, 3), 50),
    ],
)
def test_there_may_be_more_terms_than_singular_vectors(
    shape: tuple[int, int, int], rank: int
) -> None:
    core = normal(*shape)
    found = cp_core(core, rank)
    assert found.rank == rank
    assert torch.equal(found.tensor(), cp_core(core, rank).tensor())
    assert relative(found.tensor(), core) < 2e-3  # so many are always enough


def test_scales_do_as_well_where_there_are_more_terms_than_singular_vectors() -> None:
    core, rows = normal(16, 1, 9), normal(16, seed=1).abs()
    found = cp_core(core, 16, row_scale=rows, column_scale=torch.ones(1))
    weights = rows[:, None, None]
    assert relative(weights * found.tensor(), weights * core) < 2e-3


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 6))
@settings(max_examples=8, deadline=None)
def test_in_its_own_metric_the_scaled_fit_is_no_worse(seed: int, rank: int) -> None:
    core = normal(6, 5, 9, seed=seed)
    rows, columns = (10 ** normal(n, seed=seed + n) for n in (6, 5))
    weights = rows[:, None, None] * columns[:, None]

    def error(cp: CP) -> float:
        return relative(weights * cp.tensor(), weights * core)

    scaled = cp_core(core, rank, row_scale=rows, column_scale=columns)
    # Both are local minima, so the better metric is a little worse now and then.
    assert error(scaled) <= 1.05 * error(cp_core(core, rank)) + 1e-3


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_scaling_alone_changes_nothing_but_a_common_factor_does_not_count(rank: int) -> None:
    core, rows, columns = normal(6, 5, 9), normal(6).abs() + 0.1, normal(5).abs() + 0.1
    once = cp_core(core, rank, row_scale=rows, column_scale=columns).tensor()
    again = cp_core(core, rank, row_scale=100 * rows, column_scale=0.01 * columns).tensor()
    torch.testing.assert_close(once, again)
    ones = cp_core(core, rank, row_scale=torch.ones(6), column_scale=torch.ones(5)).tensor()
    torch.testing.assert_close(ones, cp_core(core, rank).tensor())


def test_zero_eigenvalues_are_no_problem() -> None:
    core = planted(2, 6, 5, 9).tensor()
    rows = torch.tensor([0.0, 0, 0, 1, 1, 1])
    found = cp_core(core, 2, row_scale=rows, column_scale=torch.zeros(5))
    assert relative(found.tensor(), core) < 2e-3


def test_a_core_of_zeros_becomes_zeros() -> None:
    found = cp_core(torch.zeros(4, 3, 9), 2)
    assert found.rank == 2
    assert torch.equal(found.tensor(), torch.zeros(4, 3, 9, dtype=torch.float64))


def test_a_core_with_rows_of_zeros_is_fitted_like_one_without() -> None:
    core = planted(2, 6, 5, 9).tensor()
    core[:4] = 0
    assert relative(cp_core(core, 4).tensor(), core) < 2e-3


def test_the_terms_are_balanced() -> None:
    found = cp_core(1e3 * normal(6, 5, 9), 4, row_scale=normal(6).abs())
    norms = torch.stack([found.U.norm(dim=0), found.S.norm(dim=1), found.V.norm(dim=0)])
    torch.testing.assert_close(norms, norms.mean(0).expand(3, 4))


def test_balancing_leaves_the_sum_and_zero_terms_alone() -> None:
    cp = planted(3, 4, 3, 9)
    cp.U[:, 1] = 0
    even = cp.balanced()
    torch.testing.assert_close(even.tensor(), cp.tensor())
    assert torch.equal(even.V[:, 1], cp.V[:, 1])


@pytest.mark.parametrize("shape", [(6, 5, 9), (11, 1, 9)])
def test_it_is_deterministic_and_leaves_random_states_backend_and_warnings_alone(
    shape: tuple[int, int, int],
) -> None:
    core = normal(*shape)
    filters = list(warnings.filters)
    with tensorly.backend_context("pytorch"):
        first = cp_core(core, 11)
        assert tensorly.get_backend() == "pytorch"
    assert warnings.filters == filters
    np.random.seed(3)
    torch.manual_seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    second = cp_core(core, 11)
    assert torch.equal(first.tensor(), second.tensor())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ed.EigenDamageError, match="at least 1, but 0"):
        cp_core(normal(4, 3, 9), 0)
    core = normal(4, 3, 9)
    core[0, 0, 0] = float("nan")
    with pytest.raises(ed.EigenDamageError, match="not finite"):
        cp_core(core, 2)


def test_terms_do_not_grow_to_cancel_each_other() -> None:
    """Such a limit of rank-2 sums has rank 3: without a ridge the two terms grow without bound."""
    a, b, c = normal(2, 6), normal(2, 5, seed=1), normal(2, 9, seed=2)
    core = sum(
        torch.einsum("o,i,k->oik", a[x], b[y], c[z])
        for x, y, z in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    )
    found = cp_core(core, 2)
    sizes = found.U.norm(dim=0) * found.S.norm(dim=1) * found.V.norm(dim=0)
    assert float(sizes.max()) < 1.8 * float(core.norm())
    assert relative(found.tensor(), core) < 0.02


# The price.


def test_the_price_is_a_sum_over_all_entries() -> None:
    rotated, eigenvalues = normal(5, 4, 9), normal(5, 4, 9, seed=1).square()
    rows, columns = [1, 3, 4], [0, 2]
    cp = planted(2, 3, 2, 9)
    left = torch.zeros(5, 4, 9, dtype=torch.float64)
    for p, row in enumerate(rows):
        for q, column in enumerate(columns):
            for k in range(9):
                for r in range(2):
                    left[row, column, k] += cp.U[p, r] * cp.V[q, r] * cp.S[r, k]
    expected = 0.5 * float((eigenvalues * (rotated - left) ** 2).sum())
    assert block_price(rotated, eigenvalues, rows, columns, cp) == pytest.approx(expected)


def test_without_an_error_in_the_block_it_is_the_price_of_the_block() -> None:
    rotated, eigenvalues = normal(5, 4, 9), normal(5, 4, 9, seed=1).square()
    rows, columns = [1, 3, 4], [0, 2]
    cp = planted(2, 3, 2, 9)
    rotated[torch.tensor(rows)[:, None], torch.tensor(columns)] = cp.tensor()
    block = unit_prices(rotated, torch.eye(5), torch.eye(4), eigenvalues)
    expected = block.of_block(torch.tensor(rows), torch.tensor(columns))
    assert block_price(rotated, eigenvalues, rows, columns, cp) == pytest.approx(expected)


def test_on_a_quadratic_loss_the_measured_rise_is_the_price() -> None:
    """A convolution whose kernel covers the image, under squared error: K-FAC's λ is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, (1, 2), bias=False), nn.Flatten()).double()
    x = normal(3000, 3, 1, 2)
    target = model(x).detach()
    curvature = ed.estimate_curvature(model, [x], loss="mse", fisher="exact", progress=False)
    layer, c = find_layers(model).compressible["0"], curvature["0"]
    rows, columns = [0, 2, 3, 5], [0, 2]
    cp = layer_cp(layer.weight(), c, rows, columns, 2)
    rotated = rotated_weight(layer.weight(), c.Q_S, c.Q_A)
    price = block_price(rotated, c.eigenvalues, rows, columns, cp)
    model[0] = factored_module(layer, depthwise_stages(cp, c.Q_S, c.Q_A, rows, columns))
    measured = ed.evaluate(model, [(x, target)], loss="mse", progress=False).loss
    assert measured == pytest.approx(price, rel=0.1)


def test_the_rank_is_the_larger_side() -> None:
    assert default_rank(5, 7, 9) == default_rank(7, 5, 9) == 7


@given(rows=st.integers(1, 70), columns=st.integers(1, 70), offsets=st.integers(2, 49))
def test_the_rank_is_never_more_than_a_core_can_need(rows: int, columns: int, offsets: int) -> None:
    enough = min(rows * columns, rows * offsets, columns * offsets)
    assert default_rank(rows, columns, offsets) == min(max(rows, columns), enough)


# The layer.


@every_kernel
def test_with_as_many_terms_as_the_weight_has_it_is_the_dense_layer(name: str) -> None:
    model = network(name, rank=2)
    small = separated(model, 2, list(range(4)), list(range(3)))
    before = model[0](images())
    assert relative(small(images()), before) < 1e-3


@every_kernel
def test_it_equals_a_dense_convolution_of_its_weight(name: str) -> None:
    model = network(name)
    small = separated(model, 2, [0, 2, 3], [1, 2])
    assert small.layout == ("depthwise", 2, 2)
    dense = convolution(name, 3, 4).double()
    dense.weight.data = small.weight.detach()
    if dense.bias is not None:
        dense.bias.data = model[0].bias.detach()
    torch.testing.assert_close(small(images()), dense(images()))


@pytest.mark.parametrize("macs", [0.5, 0.2])
def test_a_plan_of_thin_layers_is_met_and_applied(macs: float) -> None:
    """One input channel and a 1x3 kernel; the larger side is more than the second layer needs."""
    torch.manual_seed(0)
    gray = nn.Conv2d(1, 16, 3, padding=1)
    gray.bias.data.fill_(1.0)  # few directions hold the second layer's input, so few columns stay
    row = nn.Conv2d(16, 64, (1, 3), padding=(0, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    model = nn.Sequential(gray, nn.Tanh(), row, nn.Tanh(), head).double().eval()
    x = normal(12, 1, 6, 6)
    curvature = ed.estimate_curvature(model, [x], progress=False)
    plan = ed.make_plan(model, curvature, ed.Budget(macs=macs), method="eigendamage-dw")
    action = plan.layers["2"].action
    assert isinstance(action, DepthwiseBlock)
    assert action.rank == 3 * len(action.columns) < len(action.rows)
    small = ed.apply_plan(model, plan, curvature)
    assert ed.count(small, x).macs == plan.macs[1] <= macs * ed.count(model, x).macs
    assert bool(small(x).isfinite().all())
    assert torch.equal(small(x), ed.apply_plan(model, plan, curvature)(x))


def test_its_weight_is_the_decomposition_rotated_back() -> None:
    model, rows, columns = network("padded"), [0, 2, 3], [1, 2]
    c, layer = curvature_of(model)["0"], find_layers(model).compressible["0"]
    cp = layer_cp(layer.weight(), c, rows, columns, 2)
    first, core, last = depthwise_stages(cp, c.Q_S, c.Q_A, rows, columns)
    assert [tuple(s.shape) for s in (first, core, last)] == [(2, 3), (2, 1, 9), (4, 2)]
    product = torch.einsum("or,rik,rc->ock", last, core, first)
    U, V = c.Q_S[:, rows], c.Q_A[:, columns]
    torch.testing.assert_close(product, torch.einsum("op,pqk,iq->oik", U, cp.tensor(), V))


@every_kernel
def test_it_costs_what_its_form_costs(name: str) -> None:
    model = network(name)
    shape = curvature_of(model)["0"].shape
    small = separated(model, 2, [0, 2, 3], [1, 2])
    layer = find_layers(nn.Sequential(small)).compressible["0"]
    assert layer.cost(shape) == shape.factored(2, 2, "depthwise")
    assert layer.cost(shape).parameters == sum(p.numel() for p in small.parameters())


def test_stages_have_equal_norms() -> None:
    small = separated(network("padded"), 3, [0, 2, 3], [0, 1, 2])
    norms = torch.stack([s.weight.norm() for s in small])
    torch.testing.assert_close(norms, norms.mean().expand(3))


@every_kernel
def test_it_trains(name: str) -> None:
    model = network(name)
    model[0] = separated(model, 2, [0, 2, 3], [1, 2])
    labels = torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images()), labels)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every_kernel
def test_it_is_one_layer_and_can_be_compressed_again(name: str) -> None:
    model = network(name)
    whole = list(range(4)), list(range(3))
    model[0] = separated(model, 2, *whole)
    again = curvature_of(model)
    assert list(again) == ["0", "4"]
    assert again["0"].eigenvalues.shape == (4, 3, again["0"].shape.offsets)
    before = model[0](images())
    twice = separated(model, 2, *whole)
    assert twice.layout == ("depthwise", 2, 2)
    assert relative(twice(images()), before) < 2e-2
    smaller = separated(model, 1, [2, 3], [1, 2])
    assert smaller(images()).shape == before.shape


def test_a_depthwise_layer_can_become_a_block_again() -> None:
    model = network("strided")
    model[0] = separated(model, 2, [0, 2, 3], [1, 2])
    c, layer = curvature_of(model)["0"], find_layers(model).compressible["0"]
    action = ed.EigenBlock(rows=tuple(range(4)), columns=tuple(range(3)), form="three")
    block = factored_module(layer, block_stages(layer.weight(), c, action))
    assert block.layout == ("three", 4, 3)
    torch.testing.assert_close(block(images()), model[0](images()))


def test_bias_dtype_mode_and_frozen_parameters_are_kept() -> None:
    model = network("strided").float()
    conv = model[0].to(memory_format=torch.channels_last).train()
    conv.weight.requires_grad_(False)
    layer = find_layers(model).compressible["0"]
    stages = depthwise_stages(planted(2, 4, 3, 9), torch.eye(4), torch.eye(3), range(4), range(3))
    small = factored_module(layer, stages)
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert torch.equal(small.bias, conv.bias)
    assert [s.bias is None for s in small] == [True, True, False]
    assert [p.requires_grad for p in small.parameters()] == [False, False, False, True]
    assert small.training
    assert all(m.training for m in small)
    assert all(
        s.weight.is_contiguous(memory_format=torch.channels_last) and s.weight.ndim == 4
        for s in small
    )


@pytest.mark.parametrize(
    "old", [nn.Linear(3, 4), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1, padding=1)]
)
def test_a_layer_without_a_kernel_is_refused(old: nn.Module) -> None:
    layer = find_layers(nn.Sequential(old)).compressible["0"]
    stages = depthwise_stages(planted(2, 4, 3, 1), torch.eye(4), torch.eye(3), range(4), range(3))
    with pytest.raises(ed.LayerError, match="layer '0': it has no kernel"):
        factored_module(layer, stages)


def test_it_saves_and_loads() -> None:
    model = network("padded")
    first, second = (separated(model, 2, [0, 2, 3], [1, 2]) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    with torch.no_grad():
        for p in first.parameters():
            p.add_(1)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(images()), first(images()))
