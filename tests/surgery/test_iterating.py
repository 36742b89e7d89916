"""Compressing again: the eigenbasis of a factored layer merges with the old one."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.layers import FORMS
from eigendamage.plan import DepthwiseBlock
from eigendamage.plan.prices.eigendamage import rotated_weight
from eigendamage.zoo._resnet import ResNet
from tests.cases import CASES, Case
from tests.reference import fisher_trace

Factored = (ed.FactoredConv2d, ed.FactoredLinear)
LAYOUTS = (*FORMS, "depthwise")
# Every place that a stage's geometry can be in; that all geometries survive one cut is tested
# elsewhere.
SOME = (
    *("fc", "tokens", "residual", "mixed", "shared", "conv uneven", "conv same"),
    *("conv pointwise strided", "conv pointwise padded", "conv reflect"),
)


@pytest.fixture(params=SOME)
def case(request: pytest.FixtureRequest) -> Case:
    """The models whose stages differ in more than numbers."""
    return CASES[request.param]


def _curvature(model: nn.Module, x: Tensor, **options: object) -> ed.Curvature:
    return ed.estimate_curvature(model, [x], progress=False, **options)


def _planned(curvature: ed.Curvature, actions: Mapping[str, object]) -> ed.Plan:
    """A plan with these actions and no numbers."""
    layers = {
        name: ed.LayerPlan(
            action=action,
            price=0.0,
            shape=tuple(curvature[name].eigenvalues.shape),
            macs=(0.0, 0.0),
            parameters=(0, 0),
        )
        for name, action in actions.items()
    }
    return ed.Plan(
        method="eigendamage",
        budget=ed.Budget(ratio=0.5),
        layers=layers,
        left_alone={},
        macs=(0.0, 0.0),
        parameters=(0, 0),
    )


def _last(size: int, rank: int) -> tuple[int, ...]:
    return tuple(range(size - rank, size))


def _most_of(curvature: ed.Curvature, layout: str, fraction: float) -> ed.Plan:
    """A plan that keeps a fraction of the ranks of every layer, those that matter least first."""
    actions: dict[str, object] = {}
    for name, layer in curvature.items():
        o, i, K = layer.eigenvalues.shape
        out, into = (max(1, math.ceil(fraction * rank)) for rank in layer.ranks)
        rows, columns = _last(o, out), _last(i, into)
        if layout == "depthwise" and K > 1:
            actions[name] = DepthwiseBlock(rows=rows, columns=columns, rank=max(out, into))
            continue
        form = "three" if layout == "depthwise" else layout
        if form == "merge_in":
            columns = tuple(range(i))
        elif form == "merge_out":
            rows = tuple(range(o))
        actions[name] = ed.EigenBlock(rows=rows, columns=columns, form=form)
    return _planned(curvature, actions)


@functools.cache
def _factored(case: Case, layout: str) -> tuple[nn.Module, Tensor]:
    """A case's model with every layer factored, and its stages moved as training would; made once.

    Surgery and curvature leave it as it is, which is tested elsewhere.
    """
    torch.set_num_threads(1)
    model, (x, _) = case.model(), case.data(4)
    curvature = _curvature(model, x)
    small = ed.apply_plan(model, _most_of(curvature, layout, 0.6), curvature)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return small, x


@functools.cache
def _known(case: Case, layout: str) -> tuple[nn.Module, Tensor, ed.Curvature]:
    """That model, its inputs and its curvature."""
    small, x = _factored(case, layout)
    return small, x, _curvature(small, x)


def _outer(module: nn.Module) -> tuple[Tensor, Tensor]:
    """The first stage's rows and the last stage's columns, as columns."""
    stages = [stage.weight.detach().flatten(1) for stage in module]
    return stages[0].T, stages[-1]


def _dense(model: nn.Module) -> nn.Module:
    """The same function with plain layers, for autograd."""
    plain = copy.deepcopy(model)
    for layer in ed.find_layers(plain).compressible.values():
        old = layer.module
        if not isinstance(old, Factored):
            continue
        if isinstance(old, ed.FactoredLinear):
            new: nn.Module = nn.Linear(old.in_features, old.out_features, old.bias is not None)
        else:
            core = old.core
            new = nn.Conv2d(
                old.in_channels,
                old.out_channels,
                core.kernel_size,
                core.stride,
                core.padding,
                core.dilation,
                bias=old.bias is not None,
                padding_mode=core.padding_mode,
            )
        new.double()
        with torch.no_grad():
            new.weight.copy_(layer.dense_weight())
            if old.bias is not None:
                new.bias.copy_(old.bias)
        for name in layer.names:
            plain.set_submodule(name, new)
    return plain


def _projection(columns: Tensor, like: nn.Module, bias: Tensor | None = None) -> nn.Module:
    """Q Qᵀ of orthonormal columns as a layer of its own."""
    size = len(columns)
    kind = nn.Conv2d if isinstance(like, nn.Conv2d) else nn.Linear
    options = {"kernel_size": 1} if kind is nn.Conv2d else {}
    new = kind(size, size, bias=bias is not None, **options).to(columns)
    with torch.no_grad():
        new.weight.copy_((columns @ columns.T).reshape(new.weight.shape))
        if bias is not None:
            new.bias.copy_(bias)
    return new


def _unmerged(model: nn.Module, plan: ed.Plan, curvature: ed.Curvature) -> nn.Module:
    """What a plan means without merging: old stages stay, projections come before and after."""
    reference = copy.deepcopy(model)
    found = ed.find_layers(reference).compressible
    for name in plan.changed:
        action, known = plan.layers[name].action, curvature[name]
        assert isinstance(action, ed.EigenBlock)
        old = reference.get_submodule(name)
        stages = list(old) if isinstance(old, Factored) else [old]
        bias, stages[-1].bias = stages[-1].bias, None
        U, V = known.Q_S[:, list(action.rows)], known.Q_A[:, list(action.columns)]
        longer = nn.Sequential(_projection(V, stages[0]), *stages, _projection(U, stages[-1], bias))
        for alias in found[name].names:
            reference.set_submodule(alias, longer)
    return reference


def _apart(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """The largest difference of two models' outputs, relative to the largest output."""
    with torch.no_grad():
        ours, theirs = model.eval()(x), other.eval()(x)
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_last_eigenvectors_span_what_the_outer_stages_span(case: Case, layout: str) -> None:
    small, _, curvature = _known(case, layout)
    for name, known in curvature.items():
        module = small.get_submodule(name)
        o, i, K = known.eigenvalues.shape
        into, out = _outer(module)
        both = K == 1 or layout in ("three", "depthwise")
        expected = (
            min(o, out.shape[1]) if both or layout == "merge_in" else o,
            min(i, into.shape[1]) if both or layout == "merge_out" else i,
        )
        assert known.ranks == expected, name
        for Q, rank, columns, size in (
            (known.Q_S, known.ranks[0], out, o),
            (known.Q_A, known.ranks[1], into, i),
        ):
            torch.testing.assert_close(Q.T @ Q, torch.eye(size, dtype=torch.float64))
            if rank < size:
                inside = Q[:, -rank:]
                # They hold the stage, and are no more: the stage has that many directions.
                torch.testing.assert_close(inside @ (inside.T @ columns), columns)
                assert torch.linalg.matrix_rank(columns) == rank


@pytest.mark.parametrize("layout", LAYOUTS)
def test_within_the_span_the_factors_are_diagonal(case: Case, layout: str) -> None:
    *_, curvature = _known(case, layout)
    for known in curvature.values():
        for moment, Q, values, rank in (
            (known.S, known.Q_S, known.S_eigenvalues, known.ranks[0]),
            (known.A, known.Q_A, known.A_eigenvalues, known.ranks[1]),
        ):
            inside = Q[:, -rank:].T @ moment @ Q[:, -rank:]
            torch.testing.assert_close(inside, torch.diag(values[-rank:]), atol=1e-9, rtol=1e-7)
            assert bool((values[-rank:].diff() >= 0).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rotated_weight_is_zero_outside_the_last_ranks(case: Case, layout: str) -> None:
    small, _, curvature = _known(case, layout)
    for name, layer in ed.find_layers(small).compressible.items():
        known = curvature[name]
        rotated = rotated_weight(layer.weight(), known.Q_S, known.Q_A)
        out, into = known.ranks
        size = rotated.norm()
        assert rotated[: len(known.S) - out].norm() <= 1e-12 * size
        assert rotated[:, : len(known.A) - into].norm() <= 1e-12 * size
        torch.testing.assert_close(rotated[-out:, -into:].norm(), size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eigenvalues_of_a_factored_layer_still_sum_to_the_trace(case: Case, layout: str) -> None:
    small, x = _factored(case, layout)
    x = x[:3]
    curvature = _curvature(small, x, fisher="exact")
    plain = _dense(small)
    torch.testing.assert_close(plain(x), small(x))
    for name, known in curvature.items():
        weight = plain.get_submodule(name).weight
        assert float(known.eigenvalues.sum()) == pytest.approx(
            fisher_trace(plain, weight, x), rel=1e-9
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_stages_compute_what_further_projections_would(case: Case, layout: str) -> None:
    small, x, curvature = _known(case, layout)
    for again in FORMS:
        plan = _most_of(curvature, again, 0.7)
        merged = ed.apply_plan(small, plan, curvature)
        assert _apart(merged, _unmerged(small, plan, curvature), x) < 1e-10
        for name in curvature:
            module = merged.get_submodule(name)
            assert isinstance(module, Factored)
            assert len(module) == (3 if again == "three" else 2)
            assert all(stage.bias is None for stage in list(module)[:-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeping_all_that_is_there_loses_nothing(case: Case, layout: str) -> None:
    small, x, curvature = _known(case, layout)
    again = ed.apply_plan(small, _most_of(curvature, "three", 1.0), curvature)
    assert _apart(again, small, x) < 1e-10
    for name, known in curvature.items():
        into, out = _outer(again.get_submodule(name))
        assert (out.shape[1], into.shape[1]) == known.ranks


def _resnet(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = ed.zoo.resnet20().to(dtype).eval()
    x = torch.randn(8, 3, 8, 8, dtype=dtype)
    return model, x, torch.arange(8) % 10


def _train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize(
    ("dtype", "tolerance", "form"),
    [
        (torch.float64, 1e-10, "cheapest"),
        pytest.param(torch.float64, 1e-10, "three", marks=pytest.mark.slow),
        (torch.float32, 1e-5, "cheapest"),
    ],
)
def test_three_rounds_on_resnet20(dtype: torch.dtype, tolerance: float, form: str) -> None:
    model, x, y = _resnet(dtype)
    before = ed.count(model, x)
    twice_changed = 0
    for _ in range(3):
        curvature = _curvature(model, x)
        budget = 0.75
        plan = ed.make_plan(
            model, curvature, ed.Budget(macs=budget), method="eigendamage", form=form
        )
        smaller = ed.apply_plan(model, plan, curvature)
        after = ed.count(smaller, x)
        assert after.macs == pytest.approx(plan.macs[1])
        assert after.parameters == plan.parameters[1]
        assert plan.macs[0] == pytest.approx(before.macs)
        assert after.macs <= budget * before.macs
        assert _apart(smaller, _unmerged(model, plan, curvature), x) < tolerance
        for name, layer in plan.layers.items():
            module, old = smaller.get_submodule(name), model.get_submodule(name)
            if not layer.changes:
                assert str(module) == str(old)
                continue
            assert isinstance(layer.action, ed.EigenBlock)
            twice_changed += isinstance(old, Factored)
            assert isinstance(module, Factored)
            assert len(module) <= 3
            assert all(type(stage) in (nn.Conv2d, nn.Linear) for stage in module)
            assert layer.macs[1] < layer.macs[0]
            _, out, into = module.layout
            ranks = curvature[name].ranks
            # A side that is multiplied into the core is there in full, and costs less so.
            if layer.action.form != "merge_out":
                assert out <= ranks[0]
                assert set(layer.action.rows) <= set(_last(layer.shape[0], ranks[0]))
            if layer.action.form != "merge_in":
                assert into <= ranks[1]
                assert set(layer.action.columns) <= set(_last(layer.shape[1], ranks[1]))
        model, before = smaller, after
        _train(model, x, y)
    assert twice_changed > 5


def test_in_the_second_round_a_ratio_counts_only_units_that_are_still_there() -> None:
    model, x, y = _resnet(torch.float64)
    first = _curvature(model, x)
    small = ed.apply_plan(
        model,
        ed.make_plan(model, first, ed.Budget(ratio=0.5), method="eigendamage", form="three"),
        first,
    )
    _train(small, x, y)
    curvature = _curvature(small, x)
    assert sum(sum(c.ranks) for c in curvature.values()) < sum(sum(c.ranks) for c in first.values())
    prices: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in ed.find_layers(small).compressible.items():
        if name in curvature.classifier:
            continue
        known = curvature[name]
        worth = 0.5 * rotated_weight(layer.weight(), known.Q_S, known.Q_A) ** 2 * known.eigenvalues
        out, into = known.ranks
        prices[name] = worth.sum((1, 2))[-out:], worth.sum((0, 2))[-into:]
    units = torch.cat([side for sides in prices.values() for side in sides]).sort().values
    ratio = 0.3
    threshold = units[int(ratio * len(units))]
    plan = ed.make_plan(
        small,
        curvature,
        ed.Budget(ratio=ratio),
        method="eigendamage",
        form="three",
        max_ratio=0.999,
    )
    assert len(plan.changed) > 3
    for name in plan.changed:
        action, shape = plan.layers[name].action, plan.layers[name].shape
        assert isinstance(action, ed.EigenBlock)
        for kept, side, size in zip(
            (action.rows, action.columns), prices[name], shape, strict=False
        ):
            there = [
                size - len(side) + at for at in (side > threshold).nonzero().flatten().tolist()
            ]
            assert list(kept) == there


def test_a_layer_that_loses_channels_after_ranks_can_lose_ranks_again() -> None:
    torch.manual_seed(0)
    model = ResNet(1, (16, 32, 64), shortcut="projection").double().eval()
    x = torch.randn(8, 3, 8, 8).double()
    curvature = _curvature(model, x)
    model = ed.apply_plan(
        model, ed.make_plan(model, curvature, ed.Budget(macs=0.7), method="eigendamage"), curvature
    )
    curvature = _curvature(model, x, also=("channels", "patches"))
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.6), method="kron-obs")
    model = ed.apply_plan(model, plan, curvature)
    assert ed.count(model, x).macs == pytest.approx(plan.macs[1])
    curvature = _curvature(model, x)
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.8), method="eigendamage")
    merged = ed.apply_plan(model, plan, curvature)
    assert ed.count(merged, x).macs == pytest.approx(plan.macs[1])
    assert _apart(merged, _unmerged(model, plan, curvature), x) < 1e-10
    factored = [module for module in merged.modules() if isinstance(module, Factored)]
    assert factored
    assert all(len(module) <= 3 for module in factored)


def test_shards_of_a_factored_model_merge_within_its_spans() -> None:
    small, _ = _factored(CASES["mixed"], "three")
    x, _ = CASES["mixed"].data(12)
    parts = [_curvature(small, part, fisher="exact") for part in (x[:5], x[5:])]
    merged, whole = parts[0].merge(parts[1]), _curvature(small, x, fisher="exact")
    for name, layer in ed.find_layers(small).compressible.items():
        known = merged[name]
        assert known.ranks == whole[name].ranks
        torch.testing.assert_close(known.S, whole[name].S)
        rotated = rotated_weight(layer.weight(), known.Q_S, known.Q_A)
        out, into = known.ranks
        torch.testing.assert_close(rotated[-out:, -into:].norm(), rotated.norm())
