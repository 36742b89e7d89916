"""Low-rank forms: their prices are least, and what they are said to be is what is built."""

from __future__ import annotations

import base64
import math
import tracemalloc
import zlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.layers import FORMS, DenseForm, Layer, find_layers
from eigendamage.plan import Calibration, LowRank, Point, metric_of
from eigendamage.plan._knapsack_pool import efficient
from eigendamage.plan._menu import LayerMenu, floors_of, layer_menu
from eigendamage.plan._options import Kind, rank_grid
from eigendamage.plan._plan import packed, unpacked
from eigendamage.plan._sites import _PAIRED, Listing, Site, group_site, layer_site
from eigendamage.plan._threshold import kept_above, kept_counts
from eigendamage.plan.prices._quadratic import quadratic
from eigendamage.plan.prices.eigendamage import layer_prices
from eigendamage.plan.prices.low_rank import (
    BestForm,
    Metric,
    NestedBases,
    basis_prices,
    best_form,
    input_directions,
    refined_basis,
    svd_prices,
)
from tests.cases import CASES, CONVOLUTIONS
from tests.reference import patches_by_unfold

SIZES = {"linear": (5, 4, 1), "tall": (9, 2, 2), "wide": (3, 5, 4), "even": (6, 3, 2)}
"""(o, i, K) with fewer outputs than columns, more, and as many."""
DAMPING = 1e-3


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=_rng(seed))


def _metric(
    size: tuple[int, int, int], seed: int = 0, rank: int | None = None, damping: float = DAMPING
) -> Metric:
    """Of random patches with a mean, and of random gradients; of this rank if one is given."""
    o, i, K = size
    mix = _normal(i * K, i * K, seed=seed + 1)
    patches = _normal(rank or 4 * i * K, i * K, seed=seed) @ mix + _normal(i * K, seed=seed + 2)
    gradients = _normal(rank or 4 * o, o, seed=seed + 3) @ _normal(o, o, seed=seed + 4)
    return Metric.of(
        _normal(o, i, K, seed=seed + 5),
        gradients.T @ gradients / len(gradients),
        patches.T @ patches / len(patches),
        patches.mean(0),
        damping,
    )


def _root(M: Tensor) -> Tensor:
    """M^½, symmetric."""
    values, vectors = torch.linalg.eigh(M)
    return vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T


def _spread(basis: Tensor | None, metric: Metric) -> Tensor:
    """P = B ⊗ I_K, written down."""
    B = torch.eye(len(metric.A_c)).double() if basis is None else basis
    P = torch.einsum("ir,kl->ikrl", B, torch.eye(metric.offsets).double())
    return P.reshape(len(metric.A_c) * metric.offsets, -1)


def _reference(metric: Metric, basis: Tensor | None, rank: int | None) -> Tensor:
    """X by dense projectors and an SVD in the whitened space."""
    P = _spread(basis, metric)
    G = P.T @ metric.C @ P
    Y = metric.W @ metric.C @ P @ torch.linalg.inv(G)
    if rank is not None:
        S_half, G_half = _root(metric.S), _root(G)
        U, sigma, Vh = torch.linalg.svd(S_half @ Y @ G_half, full_matrices=False)
        cut = U[:, :rank] @ sigma[:rank].diag() @ Vh[:rank]
        Y = torch.linalg.inv(S_half) @ cut @ torch.linalg.inv(G_half)
    return Y @ P.T


def _dense(metric: Metric, form: BestForm) -> Tensor:
    """The X that a form amounts to."""
    core = form.core.flatten(1)
    Y = core if form.out is None else form.out @ core
    return Y @ _spread(form.basis, metric).T


def _cost(metric: Metric, X: Tensor) -> float:
    return quadratic(metric.W, X, metric.S, metric.C)


def _near(price: float, metric: Metric) -> object:
    return pytest.approx(price, rel=1e-8, abs=1e-10 * metric.total)


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_a_metric_is_of_what_a_bias_cannot_take_up(size: tuple[int, int, int]) -> None:
    """½ tr S D A Dᵀ over weight and bias, at the bias that is best, is that of the centred A."""
    o, i, K = size
    patches = _normal(50, i * K, seed=7) + _normal(i * K, seed=8)
    A, mean = patches.T @ patches / 50, patches.mean(0)
    metric = Metric.of(_normal(o, i, K, seed=9), torch.eye(o).double(), A, mean, 0.0)
    X = _normal(o, i * K, seed=10)
    errors = patches @ (metric.W - X).T
    free = 0.5 * (errors - errors.mean(0)).square().sum(1).mean()
    assert _cost(metric, X) == pytest.approx(float(free))
    blocks = metric.C.reshape(i, K, i, K)
    assert torch.allclose(metric.A_c, sum(blocks[:, k, :, k] for k in range(K)) / K)


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_the_price_of_every_rank_is_the_quadratic_of_its_best_form(
    size: tuple[int, int, int],
) -> None:
    metric = _metric(size)
    prices = svd_prices(metric)
    assert len(prices) == min(size[0], size[1] * size[2]) + 1
    assert float(prices[0]) == _near(_cost(metric, torch.zeros_like(metric.W)), metric)
    for rank in range(1, len(prices)):
        form = best_form(metric, None, rank)
        X = _dense(metric, form)
        assert float(prices[rank]) == _near(_cost(metric, X), metric)
        torch.testing.assert_close(X, _reference(metric, None, rank))
        torch.testing.assert_close(form.shift, (metric.W - X) @ metric.mean)
    assert float(prices[-1]) <= 1e-10 * metric.total
    torch.testing.assert_close(X, metric.W)


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_the_price_of_every_basis_and_rank_is_the_quadratic_of_its_best_form(
    size: tuple[int, int, int],
) -> None:
    o, i, K = size
    metric = _metric(size)
    directions = input_directions(metric)
    nested = NestedBases(metric, directions)
    for rank_in in range(1, i + 1):
        basis = directions[:, :rank_in]
        prices = nested.prices(rank_in)
        assert len(prices) == min(o, rank_in * K) + 1
        torch.testing.assert_close(prices, basis_prices(metric, basis))
        for rank in range(1, len(prices)):
            X = _dense(metric, best_form(metric, basis, rank))
            assert float(prices[rank]) == _near(_cost(metric, X), metric)
            torch.testing.assert_close(X, _reference(metric, basis, rank))
        uncut = _dense(metric, best_form(metric, basis, None))
        assert float(prices[-1]) == _near(_cost(metric, uncut), metric)
    torch.testing.assert_close(uncut, metric.W)
    assert float(prices[-1]) <= 1e-10 * metric.total


def test_prices_of_a_basis_are_those_of_its_span() -> None:
    metric = _metric((6, 4, 3))
    basis = _normal(4, 2, seed=1)
    mixed = basis @ _normal(2, 2, seed=2)
    torch.testing.assert_close(basis_prices(metric, mixed), basis_prices(metric, basis))
    assert bool((basis_prices(metric, basis) >= svd_prices(metric)[: 6 + 1] - 1e-12).all())


@pytest.mark.parametrize("basis", [False, True], ids=["all inputs", "a basis"])
def test_no_other_product_of_the_same_shape_is_cheaper(basis: bool) -> None:
    """Gradient steps from random starts end at the price: no lower, and some no higher."""
    metric = _metric((6, 4, 2), seed=20)
    B = _normal(4, 2, seed=3) if basis else None
    P = _spread(B, metric)
    for rank in (1, 2, 3):
        price = float((svd_prices(metric) if B is None else basis_prices(metric, B))[rank])
        reached = []
        for seed in range(2):
            U = _normal(6, rank, seed=seed).requires_grad_()
            V = _normal(rank, P.shape[1], seed=seed + 50).requires_grad_()
            optimizer = torch.optim.LBFGS([U, V], max_iter=60, line_search_fn="strong_wolfe")

            def closure(U: Tensor = U, V: Tensor = V, optimizer: torch.optim.LBFGS = optimizer):
                optimizer.zero_grad()
                D = metric.W - U @ V @ P.T
                loss = 0.5 * ((metric.S @ D) * (D @ metric.C)).sum()
                loss.backward()
                return loss

            optimizer.step(closure)
            reached.append(_cost(metric, (U @ V @ P.T).detach()))
        assert min(reached) >= price * (1 - 1e-9)
        assert min(reached) <= price * 1.05


def test_leading_directions_are_better_than_trailing_ones() -> None:
    for seed in range(5):
        metric = _metric((6, 5, 4), seed=30 + seed)
        directions = input_directions(metric)
        whitened = metric.whitened_inputs().T @ directions
        torch.testing.assert_close(whitened.T @ whitened, torch.eye(5).double())
        first = basis_prices(metric, directions[:, :2])[6]
        last = basis_prices(metric, directions[:, 3:])[6]
        assert float(first) < float(last)


def test_refining_a_basis_never_raises_the_price_and_mostly_lowers_it() -> None:
    lowered = 0
    for seed in range(10):
        metric = _metric((6, 5, 4), seed=40 + seed)
        start = input_directions(metric)[:, :2]
        found = refined_basis(metric, start, 3, 20)
        before, after = (float(basis_prices(metric, b)[3]) for b in (start, found))
        assert after <= before * (1 + 1e-12)
        lowered += after < before * (1 - 1e-4)
        torch.testing.assert_close(found.T @ found, torch.eye(2).double())
        assert torch.equal(found, refined_basis(metric, start, 3, 20))
    assert lowered >= 8


def test_a_basis_of_all_inputs_cannot_be_refined() -> None:
    metric = _metric((6, 3, 2))
    found = refined_basis(metric, input_directions(metric), 2, 20)
    torch.testing.assert_close(found.T @ found, torch.eye(3).double())
    torch.testing.assert_close(
        basis_prices(metric, found), basis_prices(metric, torch.eye(3).double())
    )


SINGULAR = ("one example", "no gradient", "no input", "neither", "no weight", "tiny")


def _singular(what: str) -> Metric:
    o, i, K = 5, 3, 2
    patches, gradients = _normal(1, i * K, seed=1), _normal(1, o, seed=2)
    S, A, mean = gradients.T @ gradients, patches.T @ patches, 0.5 * patches[0]
    if what in ("no gradient", "neither"):
        S = torch.zeros_like(S)
    if what in ("no input", "neither"):
        A, mean = torch.zeros_like(A), torch.zeros_like(mean)
    if what == "tiny":
        S, A, mean = 1e-20 * S, 1e-20 * A, 1e-10 * mean
    W = _normal(o, i, K, seed=3)
    return Metric.of(torch.zeros_like(W) if what == "no weight" else W, S, A, mean, DAMPING)


@pytest.mark.parametrize("what", SINGULAR)
def test_singular_factors_are_priced(what: str) -> None:
    metric = _singular(what)
    directions = input_directions(metric)
    nested = NestedBases(metric, directions)
    for prices in (svd_prices(metric), *(nested.prices(r) for r in (1, 2, 3))):
        assert bool(torch.isfinite(prices).all())
        assert bool((prices >= 0).all())
        assert bool((prices.diff() <= 1e-12 * metric.total).all())
    assert float(nested.prices(3)[-1]) <= 1e-10 * metric.total
    torch.testing.assert_close(_dense(metric, best_form(metric, None, 5)), metric.W)
    torch.testing.assert_close(_dense(metric, best_form(metric, directions, None)), metric.W)
    refined = refined_basis(metric, directions[:, :1], 2, 10)
    torch.testing.assert_close(refined.norm(), torch.tensor(1.0).double())
    cut = best_form(metric, refined, 1)
    assert all(bool(torch.isfinite(t).all()) for t in (cut.core, cut.out, cut.shift))


# Plans.


def _plan(curvature: ed.Curvature, name: str, action: object) -> ed.Plan:
    """One layer changed by an action; the amounts do not matter to surgery."""
    shape = curvature[name].shape
    layer = ed.LayerPlan(
        action=action,
        price=0.0,
        shape=(shape.outputs, shape.inputs, shape.offsets),
        macs=(0.0, 0.0),
        parameters=(0, 0),
    )
    return ed.Plan(
        method="auto",
        budget=ed.Budget(macs=1.0),
        layers={name: layer},
        left_alone={},
        macs=(0.0, 0.0),
        parameters=(0, 0),
    )


def _action(form: DenseForm, outputs: int, inputs: int) -> LowRank:
    basis = torch.linalg.qr(_normal(inputs, 2, seed=5)).Q
    return LowRank(
        rank=outputs if form == "merge_out" else 2,
        basis=None if form == "merge_in" else packed(basis),
        form=form,
        damping=DAMPING,
    )


LAYERS = {f"conv {name}": "0" for name in CONVOLUTIONS} | {"fc": "2", "tokens": "down"}


@pytest.fixture(scope="module", params=list(LAYERS))
def known(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, str, ed.Curvature]:
    """A model, its inputs, a layer of it, and the curvature with patches at all positions."""
    case = CASES[request.param]
    model, (x, _) = case.model(), case.data()
    curvature = ed.estimate_curvature(
        model, [x], also=("patches",), patch_positions=None, fisher="exact", progress=False
    )
    return model, x, LAYERS[request.param], curvature


def _inputs_of(model: nn.Module, name: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(*given))
    with torch.no_grad():
        model(x)
    hook.remove()
    return seen[0]


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """(n, iK) over all examples and positions, by torch's own unfold."""
    if isinstance(module, nn.Linear):
        return x.flatten(0, -2)
    return patches_by_unfold(x, module).flatten(1, 2).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_low_rank_layer_computes_the_best_weight_and_a_bias_for_the_mean(
    known: tuple[nn.Module, Tensor, str, ed.Curvature], form: DenseForm, tmp_path: Path
) -> None:
    model, x, name, curvature = known
    layer = find_layers(model).compressible[name]
    action = _action(form, layer.outputs, layer.inputs)
    plan = _plan(curvature, name, action)
    stages = ed.apply_plan(model, plan, curvature).get_submodule(name)

    assert len(stages) == (3 if form == "three" else 2)
    norms = torch.stack([stage.weight.norm() for stage in stages])
    torch.testing.assert_close(norms, norms.mean().expand(len(norms)))

    # By torch's own unfold and dense algebra, sharing nothing with surgery.
    dense = model.get_submodule(name)
    inputs = _inputs_of(model, name, x)
    patches = _patches(dense, inputs)
    A, mean = patches.T @ patches / len(patches), patches.mean(0)
    metric = Metric.of(layer.weight().detach(), curvature[name].S, A, mean, DAMPING)
    basis = None if action.basis is None else unpacked(action.basis, layer.inputs).double()
    X = _reference(metric, basis, None if form == "merge_out" else 2)
    bias = (metric.W - X) @ mean + (0.0 if dense.bias is None else dense.bias.detach())
    changed = find_layers(_Copy(dense, X, bias)).compressible["layer"].module
    with torch.no_grad():
        found = stages(inputs)
        torch.testing.assert_close(found, changed(inputs), rtol=1e-8, atol=1e-8)
        # What the bias is for: no channel's mean over the calibration data moves.
        over = (0, 2, 3) if found.ndim == 4 else tuple(range(found.ndim - 1))
        torch.testing.assert_close(found.mean(over), dense(inputs).mean(over))

    plan.save(tmp_path / "plan.json")
    loaded = ed.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    again = ed.apply_plan(model, loaded, curvature).get_submodule(name).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in stages.state_dict().items())


class _Copy(nn.Module):
    """A layer's copy with another weight and bias."""

    def __init__(self, dense: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        if isinstance(dense, nn.Linear):
            self.layer = nn.Linear(dense.in_features, dense.out_features)
        else:
            geometry = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            self.layer = nn.Conv2d(
                dense.in_channels, dense.out_channels, **{k: getattr(dense, k) for k in geometry}
            )
        self.layer.double()
        with torch.no_grad():
            self.layer.weight.copy_(weight.reshape(self.layer.weight.shape))
            self.layer.bias.copy_(bias)


def test_what_is_packed_comes_back_in_float32() -> None:
    matrix = torch.linalg.qr(_normal(7, 3, seed=0)).Q
    assert torch.equal(unpacked(packed(matrix), 7), matrix.float())
    assert torch.equal(unpacked(packed(matrix.T.contiguous().T), 7), matrix.float())
    full = torch.eye(4)
    assert torch.equal(unpacked(packed(full), 4), full)
    with pytest.raises(ed.MismatchError, match="not orthonormal"):
        unpacked(packed(2 * full), 4)


def _text(values: bytes) -> str:
    return base64.b64encode(values).decode("ascii")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not one of 4 inputs|cannot be read"),
        ("!", "not one of 4 inputs|cannot be read"),
        ("A", "cannot be read"),
        ("AAAA", "cannot be read"),
        (_text(zlib.compress(b"")), "not one of 4 inputs"),
        (_text(zlib.compress(b"\0" * 15)), "not one of 4 inputs"),
        (packed(torch.eye(4))[:8], "not one of 4 inputs"),
        (packed(torch.ones(5, 2)), "not one of 4 inputs"),
        (packed(torch.ones(4, 5)), "not one of 4 inputs"),
        (packed(torch.full((4, 1), math.nan)), "NaN or infinity"),
        (packed(torch.tensor([[1.0], [0.0], [math.inf], [0.0]])), "NaN or infinity"),
    ],
)
def test_what_is_no_basis_is_refused(text: str, said: str) -> None:
    with pytest.raises(ed.MismatchError, match=said):
        unpacked(text, 4)


def test_a_basis_that_would_fill_the_memory_is_refused_unread() -> None:
    bomb = _text(zlib.compress(b"\0" * 50_000_000, 9))
    assert len(bomb) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(ed.MismatchError, match="not one of 4 inputs"):
            unpacked(bomb, 4)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_low_rank_plan_of_another_layer_is_refused() -> None:
    case = CASES["fc"]
    model, (x, _) = case.model(), case.data()
    curvature = ed.estimate_curvature(model, [x], progress=False)
    good = _action("three", 9, 7)
    for wrong, said in (
        (good.model_copy(update={"rank": 10}), "has 9 outputs, the plan's rank is 10"),
        (good.model_copy(update={"basis": packed(torch.ones(9, 1))}), "not one of 7 inputs"),
    ):
        with pytest.raises(ed.MismatchError, match=said):
            ed.apply_plan(model, _plan(curvature, "0", wrong), curvature)


# Menus.


def _menu(
    multiple: int = 1, actions: tuple[str, ...] = ("low-rank", "blocks")
) -> tuple[nn.Module, Layer, ed.Curvature, LayerMenu]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 9, 3),
    ).double()
    x = _normal(20, 3, 6, 6, seed=1)
    curvature = ed.estimate_curvature(model, [x], also=("patches",), progress=False)
    layer = find_layers(model).compressible["2"]
    return (
        model,
        layer,
        curvature,
        layer_menu(layer, curvature["2"], actions, DAMPING, 0.9, multiple),
    )


def test_every_option_is_built_as_it_is_priced_and_counted() -> None:
    model, layer, curvature, menu = _menu()
    metric = metric_of(layer, curvature["2"], DAMPING)
    eigen = layer_prices(layer.weight(), curvature["2"])
    kinds = dict.fromkeys(Kind, 0)
    x = _normal(1, 3, 6, 6, seed=2)
    for index in range(len(menu.options)):
        kind = Kind(int(menu.options.kind[index]))
        kinds[kind] += 1
        if index % 5:  # a fifth of them, and the first, which keeps
            continue
        action = menu.action(index)
        built = ed.apply_plan(model, _plan(curvature, "2", action), curvature)
        cost = ed.count(built, x).layers["2"]
        assert menu.options.macs[index] == pytest.approx(cost.macs)
        assert menu.options.params[index] == cost.parameters
        if kind != Kind.KEEP:
            assert menu.cost(index).parameters == cost.parameters
        price = float(menu.options.prices[index])
        X = find_layers(built).compressible["2"].weight().flatten(1)
        if kind == Kind.LOW_RANK:
            # The basis is rounded to float32 on its way.
            assert price == pytest.approx(_cost(metric, X), rel=1e-5, abs=1e-9 * metric.total)
        elif kind == Kind.BLOCK:
            # A merged side is there whole.
            rows = action.rows if action.form != "merge_out" else range(8)
            columns = action.columns if action.form != "merge_in" else range(6)
            left = eigen.of_block(torch.tensor(list(rows)), torch.tensor(list(columns)))
            assert price == pytest.approx(left, abs=1e-12)
        else:
            assert price == 0
    assert menu.options.kind[0] == Kind.KEEP
    assert kinds[Kind.KEEP] == 1
    assert min(kinds.values()) > 0
    assert bool((menu.options.macs[1:] < menu.options.macs[0]).all())
    assert bool((menu.options.params[1:] < menu.options.params[0]).all())


def test_ranks_are_multiples_where_the_layer_is_wide_enough() -> None:
    *_, menu = _menu(multiple=4)
    o = menu.options
    some = o.kind != Kind.KEEP
    merged_out = np.array([FORMS[f] == "merge_out" for f in o.form])
    assert bool((o.rank_out[some] % 4 == 0).all())
    narrow = some & (np.array([FORMS[f] == "merge_in" for f in o.form]))
    # A block whose inputs would be cut to 5 keeps all 6: they are rounded up.
    assert set(o.rank_in[some & ~narrow].tolist()) <= {4, 6}
    assert set(o.rank_in[narrow].tolist()) == {6}
    assert set(o.rank_out[some & merged_out].tolist()) == {8}


def test_only_what_is_wished_for_is_on_a_menu() -> None:
    for actions, kinds in (
        (("low-rank",), {Kind.KEEP, Kind.LOW_RANK}),
        (("blocks",), {Kind.KEEP, Kind.BLOCK}),
        (("channels",), {Kind.KEEP}),
    ):
        *_, menu = _menu(actions=actions)
        assert set(menu.options.kind.tolist()) == kinds
        assert bool(menu.bases) == ("low-rank" in actions)


def test_one_more_basis_adds_its_own_options() -> None:
    _, layer, curvature, menu = _menu()
    metric = metric_of(layer, curvature["2"], DAMPING)
    basis = refined_basis(metric, menu.bases[0][:, :2], 3, 10)
    more = menu.with_basis(metric, basis, 1)
    before = len(menu.options)
    assert len(more.options) > before
    new = range(before, len(more.options))
    prices = basis_prices(metric, basis)
    for index in new:
        assert more.basis(index) is not None
        assert torch.equal(more.basis(index), basis)
        assert more.options.prices[index] == float(prices[more.options.rank_out[index]])
    old = menu.options
    same = (old.basis == 0) & (old.rank_in == 2) & (old.rank_out == 3)
    at = next(i for i in new if more.options.rank_out[i] == 3)
    assert more.options.prices[at] <= old.prices[same].item()


@pytest.mark.parametrize("most", [1, 3, 7, 8, 40, 200])
@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_a_grid_of_ranks(most: int, multiple: int) -> None:
    for size in (most, most + 5):
        ranks = rank_grid(size, most, multiple, 24)
        assert ranks == sorted(set(ranks))
        assert ranks[0] >= 1
        assert ranks[-1] <= most
        if most >= multiple:
            assert all(r % multiple == 0 or r == size for r in ranks)
            assert len(ranks) <= 25
        else:
            assert ranks == list(range(1, most + 1))
        assert (size in ranks) == (size == most)


def test_floors_are_the_largest_that_fits_a_layer() -> None:
    names = ["a.conv", "a.fc", "b.conv"]
    found = floors_of({"*.conv": 0.2, "a.*": 0.5, "b.conv": 0.1}, names)
    assert found == {"a.conv": 0.5, "a.fc": 0.5, "b.conv": 0.2}
    with pytest.raises(
        ed.EigenDamageError, match=r"'c\.\*' matches no layer that may be .*: a\.conv"
    ):
        floors_of({"c.*": 0.5}, names)


# Sites.


def _beaten(prices: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Whether another option is nowhere dearer and somewhere cheaper, or the same and earlier."""
    values = np.concatenate([prices[:, None], costs], 1)
    at = range(len(values))
    return np.array(
        [
            any(
                (values[j] <= values[k]).all() and ((values[j] < values[k]).any() or j < k)
                for j in at
                if j != k
            )
            for k in at
        ]
    )


def _values(prices: np.ndarray, costs: np.ndarray) -> set[tuple[float, ...]]:
    return {tuple(row) for row in np.concatenate([prices[:, None], costs], 1).tolist()}


def _listing(options: int, units: int, rng: np.random.Generator) -> Listing:
    """Of whole numbers, so that many are alike."""
    return Listing(
        rng.integers(0, 6, options).astype(float),
        rng.integers(0, 6, (options, units)).astype(float),
        rng.permutation(100)[:options],
    )


@pytest.mark.parametrize("units", [1, 2, 3])
def test_the_front_is_what_nothing_beats(units: int) -> None:
    rng = np.random.default_rng(units)
    for options in (1, 2, 5, 40):
        for _ in range(10):
            listing = _listing(options, units, rng)
            prices, costs = listing.prices, listing.costs
            found = efficient(prices, costs)
            assert bool((np.diff(prices[found]) >= 0).all())
            left = ~_beaten(prices, costs)
            assert len(found) == left.sum()
            assert _values(prices[found], costs[found]) == _values(prices[left], costs[left])
            site = layer_site("a", listing)
            of = {int(i): k for k, i in enumerate(listing.index)}
            picked = [of[int(i)] for i in site.picks[:, 0]]
            assert np.array_equal(site.menu.prices, prices[picked])
            assert np.array_equal(site.menu.costs, costs[picked])


def _combinations(
    channels: Listing, layers: dict[str, Listing], carriers: np.ndarray
) -> Iterator[tuple[float, np.ndarray]]:
    for chosen in product(*(range(len(one.prices)) for one in layers.values())):
        pairs = list(zip(layers.values(), chosen, strict=True))
        yield (
            sum(one.prices[k] for one, k in pairs),
            carriers + sum(one.costs[k] for one, k in pairs),
        )
    yield from zip(channels.prices, channels.costs, strict=True)


def _check_picks(
    site: Site, channels: Listing, layers: dict[str, Listing], carriers: np.ndarray
) -> None:
    """An option's price and costs are those of what it picks."""
    for at in range(len(site.menu.prices)):
        if site.channels[at] >= 0:
            assert set(site.picks[at].tolist()) == {-1}
            (k,) = np.flatnonzero(channels.index == site.channels[at])
            price, cost = channels.prices[k], channels.costs[k]
        else:
            price, cost = 0.0, carriers
            for pick, one in zip(site.picks[at], layers.values(), strict=True):
                (k,) = np.flatnonzero(one.index == pick)
                price, cost = price + one.prices[k], cost + one.costs[k]
        assert site.menu.prices[at] == price
        assert np.array_equal(site.menu.costs[at], cost)


@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize("members", [1, 2, 3])
def test_a_group_site_has_every_combination_that_nothing_beats(units: int, members: int) -> None:
    rng = np.random.default_rng(10 * units + members)
    for _ in range(5):
        layers = {f"layer {k}": _listing(5, units, rng) for k in range(members)}
        channels = _listing(6, units, rng)
        channels = Listing(channels.prices, channels.costs + 2 * members, channels.index)
        carriers = rng.integers(0, 3, units).astype(float)
        site = group_site("g", channels, layers, carriers)
        every = list(_combinations(channels, layers, carriers))
        prices, costs = np.array([p for p, _ in every]), np.stack([c for _, c in every])
        left = ~_beaten(prices, costs)
        assert _values(site.menu.prices, site.menu.costs) == _values(prices[left], costs[left])
        assert len(site.menu.prices) == left.sum()
        assert site.layers == tuple(layers)
        _check_picks(site, channels, layers, carriers)


def test_long_menus_are_thinned_to_what_can_be_had() -> None:
    count = 3 * _PAIRED[2]
    at = np.arange(count, dtype=float)
    long = Listing(at, np.stack([count - at, count - at], 1), np.arange(count))
    none = Listing(np.empty(0), np.empty((0, 2)), np.empty(0, np.int64))
    layers = {"a": long, "b": long}
    carriers = np.array([1.0, 2.0])
    site = group_site("g", none, layers, carriers)
    _check_picks(site, none, layers, carriers)
    assert site.picks[0].tolist() == [0, 0], "nothing is lost by keeping both"
    assert site.picks[-1].tolist() == [count - 1, count - 1], "nor the least that can be reached"
    assert len(set(site.picks[:, 0].tolist())) <= _PAIRED[2]


# Calibration.


def _points(*pairs: tuple[float, float]) -> tuple[Point, ...]:
    return tuple(Point(price=p, measured=m) for p, m in pairs)


def test_factors_are_interpolated_between_logarithms_and_hold_beyond() -> None:
    calibration = Calibration(points={"a": _points((1e-1, 8e-1), (1e-3, 2e-3))})
    prices = np.array([0.0, 1e-5, 1e-3, 1e-2, 1e-1, 1.0])
    factors = np.array([1.0, 2.0, 2.0, 4.0, 8.0, 8.0])
    given = prices.copy()
    np.testing.assert_allclose(calibration.corrected("a", prices), prices * factors)
    assert np.array_equal(prices, given), "what is given stays as it was"


def test_what_was_not_measured_has_the_typical_factor() -> None:
    calibration = Calibration(points={"a": _points((1.0, 2.0)), "b": _points((0.1, 0.8))})
    prices = np.array([0.0, 0.5, 2.0])
    np.testing.assert_allclose(calibration.corrected("c", prices), 4 * prices)
    np.testing.assert_allclose(calibration.corrected("b", prices), 8 * prices)
    nothing = Calibration()
    assert np.array_equal(nothing.corrected("a", prices), prices)
    of_channels = calibration.extended({"channels of a": [(1.0, 9.0)]})
    np.testing.assert_allclose(of_channels.corrected("channels of b", prices), 9 * prices)
    np.testing.assert_allclose(of_channels.corrected("c", prices), 4 * prices)
    np.testing.assert_allclose(of_channels.weighed("channels of a", prices), 9 * prices)
    np.testing.assert_allclose(of_channels.weighed("b", prices), (4 * 8) ** 0.5 * prices)


def test_what_is_dearer_stays_dearer() -> None:
    calibration = Calibration(points={"a": _points((1.0, 10.0), (2.0, 2.0))})
    found = calibration.corrected("a", np.array([0.5, 1.0, 1.5, 2.0, 3.0]))
    assert bool((np.diff(found) >= -1e-12).all())


def test_blocks_are_counted_as_they_are_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, 33):
        prices = torch.randint(0, 6, (size,), generator=generator).double()
        thresholds = torch.arange(-1, 7, 0.5).double()[::2]
        for ratio in (0.1, 0.5, 0.95):
            expected = [len(kept_above(prices, float(t), ratio)) for t in thresholds]
            assert kept_counts(prices, thresholds, ratio) == expected


def test_points_without_a_factor_are_left_out() -> None:
    first = Calibration(points={"a": _points((1.0, 2.0))})
    more = first.extended({"a": [(0.1, 0.4), (0.0, 1.0)], "b": [(1.0, 0.0)], "c": [(1.0, 3.0)]})
    assert more.points == {"a": _points((1.0, 2.0), (0.1, 0.4)), "c": _points((1.0, 3.0))}
    assert first.points == {"a": _points((1.0, 2.0))}
