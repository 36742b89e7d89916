"""The scaling contract: what S, A and λ are, whatever the network, the batches and the labels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from eigendamage import Curvature, estimate_curvature, find_layers
from eigendamage.curvature import homogeneous
from tests.cases import CASES, CONVOLUTIONS, Case, convolution
from tests.reference import example_gradients, fisher_block, fisher_trace

# Every kind of layer; sums over batches do not know a convolution's geometry.
KINDS = ("fc", "tokens", "residual", "mixed", "shared", "conv reflect")


def weight_of(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def assert_same_curvature(a: Curvature, b: Curvature, rtol: float = 1e-9) -> None:
    for name in a:
        for what in ("S", "A", "mean"):
            torch.testing.assert_close(
                getattr(a[name], what), getattr(b[name], what), rtol=rtol, atol=1e-12
            )
        # λ belongs to a basis that is only defined up to rotations within equal eigenvalues.
        torch.testing.assert_close(
            a[name].eigenvalues.sum(), b[name].eigenvalues.sum(), rtol=rtol, atol=1e-12
        )


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_one_example_one_position_kron_is_the_fisher_block(fisher: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(1, 3, dtype=torch.float64), torch.tensor([1])
    curvature = estimate_curvature(model, [(x, y)], fisher=fisher, progress=False)
    labels = y if fisher == "empirical" else None
    for name in ("0", "2"):
        c = curvature[name]
        block = fisher_block(model, weight_of(model, name), x, labels)
        torch.testing.assert_close(torch.kron(c.S, c.A), block)


def test_one_example_with_the_bias_coordinate() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(1, 3, dtype=torch.float64), torch.tensor([1])
    curvature = estimate_curvature(model, [(x, y)], fisher="empirical", progress=False)
    loss = torch.nn.functional.cross_entropy(model(x), y)
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        weight, bias = torch.autograd.grad(loss, (layer.weight, layer.bias), retain_graph=True)
        joined = torch.cat([weight, bias.unsqueeze(1)], 1).flatten()
        c = curvature[name]
        torch.testing.assert_close(
            torch.kron(c.S, homogeneous(c.A, c.mean)), torch.outer(joined, joined)
        )


def _one_position_layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Layers whose output is a single position, of every geometry, and the input they need."""
    sizes = {
        "plain": (3, 3),
        "padded": (1, 1),
        "strided": (2, 1),
        "uneven": (2, 2),
        "dilated": (1, 1),
        "same": (1, 1),
        "valid": (3, 3),
        "pointwise": (1, 1),
        "pointwise strided": (2, 2),
        "wide stride": (3, 2),
        "larger than the image": (1, 1),
    }
    return {name: (convolution(name), (3, *size)) for name, size in sizes.items()} | {
        "linear": (nn.Linear(5, 4), (5,))
    }


@pytest.mark.parametrize("name", list(_one_position_layers()))
def test_kfac_is_exact_on_a_deep_linear_network_with_squared_error(name: str) -> None:
    torch.manual_seed(1)
    layer, size = _one_position_layers()[name]
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(4, 5), nn.Linear(5, 3)).double()
    x = torch.randn(16, *size, dtype=torch.float64)
    assert model[0](x).shape[1:].numel() == 4
    found = find_layers(model).compressible["0"]
    curvature = estimate_curvature(model, x.split(5), loss="mse", fisher="exact", progress=False)
    outputs = 3
    block = torch.zeros(layer.weight.numel(), layer.weight.numel(), dtype=torch.float64)
    patches = torch.zeros(found.inputs * found.offsets, found.inputs * found.offsets).double()
    for n in range(len(x)):
        for d in range(outputs):
            (g,) = torch.autograd.grad(model(x[n : n + 1])[0, d], layer.weight)
            block += torch.outer(g.flatten(), g.flatten()) * (2 / outputs) / len(x)
        a = x[n] if found.geometry is None else found.geometry.patches(x[n : n + 1])[0, :, :, 0]
        patches += torch.outer(a.flatten(), a.flatten()) / len(x)
    c = curvature["0"]
    torch.testing.assert_close(torch.kron(c.S, patches), block)
    # and the channel factor is the patch moment's average over its diagonal blocks of offsets
    i, k = found.inputs, found.offsets
    blocks = patches.reshape(i, k, i, k).diagonal(dim1=1, dim2=3).sum(-1) / k
    torch.testing.assert_close(c.A, blocks)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_lambda_sums_to_the_trace_of_the_fisher(case: Case, fisher: str) -> None:
    model, (x, y) = case.model(), case.data(6)
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    curvature = estimate_curvature(model, data, fisher=fisher, progress=False)
    assert set(curvature) == set(find_layers(model).compressible)
    for name, c in curvature.items():
        trace = fisher_trace(model, weight_of(model, name), x, y if fisher == "empirical" else None)
        assert float(c.eigenvalues.sum()) == pytest.approx(trace, rel=1e-9)


def test_lambda_sums_to_the_trace_in_any_orthonormal_basis() -> None:
    case = CASES["mixed"]
    model, (x, y) = case.model(), case.data(5)
    base = estimate_curvature(model, [(x, y)], fisher="exact", eigenvalues="kfac", progress=False)
    torch.manual_seed(3)
    rotated = replace(
        base,
        layers={
            n: replace(
                c,
                Q_S=torch.linalg.qr(torch.randn_like(c.Q_S)).Q,
                Q_A=torch.linalg.qr(torch.randn_like(c.Q_A)).Q,
            )
            for n, c in base.items()
        },
    )
    found = estimate_curvature(model, [(x, y)], fisher="exact", basis=rotated, progress=False)
    for name, c in found.items():
        trace = fisher_trace(model, weight_of(model, name), x)
        assert float(c.eigenvalues.sum()) == pytest.approx(trace, rel=1e-9)


def test_lambda_is_the_diagonal_of_the_rotated_fisher(case: Case) -> None:
    model, (x, y) = case.model(), case.data(4)
    curvature = estimate_curvature(model, [(x, y)], fisher="empirical", progress=False)
    for name, c in curvature.items():
        expected = torch.zeros_like(c.eigenvalues)
        for g in example_gradients(model, weight_of(model, name), x, y):
            matrix = g.reshape(c.eigenvalues.shape)
            expected += torch.einsum("op,oik,iq->pqk", c.Q_S, matrix, c.Q_A).square() / len(x)
        torch.testing.assert_close(c.eigenvalues, expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_batches_order_and_duplicates_change_nothing(name: str, fisher: str) -> None:
    model, (x, y) = CASES[name].model(), CASES[name].data(12)

    def run(*parts: tuple[Tensor, Tensor]) -> Curvature:
        return estimate_curvature(model, list(parts), fisher=fisher, progress=False)

    whole = run((x, y))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert_same_curvature(whole, run((x[:11], y[:11]), (x[11:], y[11:])))
    assert_same_curvature(whole, run(*zip(x[order].split(7), y[order].split(7), strict=True)))
    assert_same_curvature(whole, run((x, y), (x, y), (x, y)))


@pytest.mark.parametrize("name", KINDS)
def test_drawn_labels_do_not_depend_on_the_batches(name: str) -> None:
    model, (x, _) = CASES[name].model(), CASES[name].data(12)
    whole = estimate_curvature(model, [x], seed=5, progress=False)
    parts = estimate_curvature(model, x.split(5), seed=5, progress=False)
    other = estimate_curvature(model, [x], seed=6, progress=False)
    assert_same_curvature(whole, parts)
    first = next(iter(whole))
    assert not torch.allclose(whole[first].S, other[first].S)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_function_as_loss_mean_or_sum(reduction: str) -> None:
    case = CASES["residual"]
    model, (x, y) = case.model(), case.data(10)
    data = list(zip(x.split(4), y.split(4), strict=True))
    loss = nn.CrossEntropyLoss(reduction=reduction)
    named = estimate_curvature(model, data, fisher="empirical", progress=False)

    def plain(z: Tensor, t: Tensor) -> Tensor:  # without the attribute that tells its reduction
        return loss(z, t)

    for function in (loss, plain):
        given = estimate_curvature(
            model, data, loss=function, fisher="empirical", reduction=reduction, progress=False
        )
        assert_same_curvature(named, given)
    each = nn.CrossEntropyLoss(reduction="none")
    assert_same_curvature(
        named,
        estimate_curvature(model, data, loss=each, fisher="empirical", progress=False),
    )


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_mc_converges_to_exact_at_one_over_root_samples(loss: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    exact = estimate_curvature(model, [x], loss=loss, fisher="exact", progress=False)["0"].S

    def error(samples: int, seed: int) -> float:
        many = x.repeat(samples, 1)
        drawn = estimate_curvature(model, [many], loss=loss, seed=seed, progress=False)["0"].S
        return float((drawn - exact).norm() / exact.norm())

    few = sum(error(50, s) for s in range(8)) / 8
    many = sum(error(5000, s) for s in range(8)) / 8
    assert few < 0.5
    assert math.log(few / many) == pytest.approx(math.log(10), abs=0.5)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_exact_is_the_hessian_of_a_linear_model(loss: str) -> None:
    """For a model that is linear in its weight the Fisher block is the loss's own Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    curvature = estimate_curvature(model, [x], loss=loss, fisher="exact", progress=False)
    y = {
        "cross_entropy": torch.tensor([0, 1, 2, 0, 1, 2]),
        "mse": torch.randn(6, 3, dtype=torch.float64),
        "bce": torch.randint(0, 2, (6, 3)).double(),
    }[loss]
    function = {
        "cross_entropy": torch.nn.functional.cross_entropy,
        "mse": torch.nn.functional.mse_loss,
        "bce": torch.nn.functional.binary_cross_entropy_with_logits,
    }[loss]
    weight = model[0].weight.detach()
    hessian = torch.autograd.functional.hessian(lambda w: function(x @ w.T, y), weight)
    c = curvature["0"]
    rotation = torch.kron(c.Q_S, c.Q_A)
    rotated = rotation.T @ hessian.reshape(12, 12) @ rotation
    torch.testing.assert_close(c.eigenvalues.flatten(), rotated.diagonal())


def test_kfac_eigenvalues_are_products() -> None:
    case = CASES["mixed"]
    model, (x, _) = case.model(), case.data(6)
    curvature = estimate_curvature(model, [x], eigenvalues="kfac", progress=False)
    for c in curvature.values():
        S = c.Q_S @ torch.diag(c.S_eigenvalues) @ c.Q_S.T
        torch.testing.assert_close(S, c.S)
        expected = c.S_eigenvalues[:, None, None] * c.A_eigenvalues[None, :, None]
        torch.testing.assert_close(c.eigenvalues, expected.expand_as(c.eigenvalues))


def test_masked_tokens_count_for_nothing_in_the_gradients() -> None:
    case = CASES["tokens"]
    model, (x, y) = case.model(), case.data(4)
    masked = y.clone()
    masked[:, 2] = -100
    free = estimate_curvature(model, [(x, masked)], fisher="empirical", progress=False)
    for name in ("up", "head"):
        expected = 0.0
        for n in range(4):
            loss = torch.nn.functional.cross_entropy(
                model(x[n : n + 1])[0], masked[n], ignore_index=-100, reduction="sum"
            )
            (g,) = torch.autograd.grad(loss, weight_of(model, name))
            expected += float(g.square().sum()) / 4
        assert float(free[name].eigenvalues.sum()) == pytest.approx(expected, rel=1e-9)


def test_every_geometry_is_in_the_table() -> None:
    assert {f"conv {name}" for name in CONVOLUTIONS} <= set(CASES)
