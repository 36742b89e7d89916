"""Surgery is exact when nothing is dropped, honest about the loss, and leaves a plain module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.layers import FORMS, balance
from eigendamage.plan import CounterPlan, Plan
from tests.cases import CASES, Case


def full_rank(model: nn.Module, curvature: ed.Curvature, form: str) -> Plan:
    """A plan that factors every layer and drops nothing."""
    layers = {
        name: ed.LayerPlan(
            action=ed.EigenBlock(
                rows=tuple(range(c.shape.outputs)), columns=tuple(range(c.shape.inputs)), form=form
            ),
            price=0.0,
            shape=(c.shape.outputs, c.shape.inputs, c.shape.offsets),
            macs=(0.0, 0.0),
            parameters=(0, 0),
        )
        for name, c in curvature.items()
    }
    return Plan(
        method="eigendamage",
        budget=ed.Budget(ratio=0.0),
        layers=layers,
        left_alone={},
        macs=(0.0, 0.0),
        parameters=(0, 0),
    )


@pytest.mark.parametrize("form", FORMS)
def test_full_rank_reproduces_the_logits_and_knows_the_dense_weight(case: Case, form: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, (x, _) = case.model().to(dtype), case.data(6)
        x = x.to(dtype) if x.is_floating_point() else x
        curvature = ed.estimate_curvature(model, [x], progress=False)
        factored = ed.apply_plan(model, full_rank(model, curvature, form), curvature)
        before, after = model(x).detach(), factored(x).detach()
        assert float((before - after).abs().max()) <= tolerance * float(before.abs().max() + 1)
        kinds = {type(m) for m in factored.modules()}
        assert kinds & {ed.FactoredConv2d, ed.FactoredLinear}
        for name in curvature:
            stages = factored.get_submodule(name)
            assert isinstance(stages, nn.Sequential)
            assert len(stages) == (3 if form == "three" else 2)
            assert all(type(s) in (nn.Linear, nn.Conv2d) for s in stages)
            assert all(s.bias is None for s in list(stages)[:-1])
            dense = model.get_submodule(name)
            torch.testing.assert_close(
                stages.weight.reshape(dense.weight.shape), dense.weight, rtol=0, atol=tolerance
            )
            assert (stages.bias is None) == (dense.bias is None)


def test_the_input_model_is_not_touched(case: Case) -> None:
    model, (x, _) = case.model(), case.data(6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    structure = str(model)
    curvature = ed.estimate_curvature(model, [x], progress=False)
    small = ed.apply_plan(model, full_rank(model, curvature, "three"), curvature)
    with torch.no_grad():
        for p in small.parameters():
            p.add_(1)
    assert str(model) == structure
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_factored_model_can_be_factored_again(case: Case) -> None:
    model, (x, _) = case.model(), case.data(6)
    curvature = ed.estimate_curvature(model, [x], progress=False)
    once = ed.apply_plan(model, full_rank(model, curvature, "three"), curvature)
    again = ed.estimate_curvature(once, [x], progress=False)
    assert list(again) == list(curvature)
    for name in curvature:
        torch.testing.assert_close(again[name].S, curvature[name].S)
        torch.testing.assert_close(again[name].A, curvature[name].A)
        assert again[name].shape == curvature[name].shape
    twice = ed.apply_plan(once, full_rank(once, again, "merge_in"), again)
    torch.testing.assert_close(twice(x), model(x))
    assert all(len(twice.get_submodule(n)) == 2 for n in again)


def test_stages_have_equal_norms(case: Case) -> None:
    model, (x, _) = case.model(), case.data(6)
    curvature = ed.estimate_curvature(model, [x], progress=False)
    factored = ed.apply_plan(model, full_rank(model, curvature, "three"), curvature)
    for name in curvature:
        norms = torch.stack([s.weight.norm() for s in factored.get_submodule(name)])
        torch.testing.assert_close(norms, norms.mean().expand(3))


def test_balance_leaves_products_and_zeros_alone() -> None:
    a, b = torch.randn(3, 4), 100 * torch.randn(5, 3)
    left, right = balance([a, b])
    torch.testing.assert_close(right @ left, b @ a)
    assert float(left.norm()) == pytest.approx(float(right.norm()))
    zero = balance([torch.zeros(2, 2), torch.ones(2, 2)])
    assert torch.equal(zero[1], torch.ones(2, 2))


def test_on_a_quadratic_loss_the_measured_rise_is_the_price() -> None:
    """A linear model under squared error: the loss is quadratic and K-FAC exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 4)).double()
    x = torch.randn(64, 30, dtype=torch.float64)
    target = model(x).detach()  # at the minimum the gradient is zero
    curvature = ed.estimate_curvature(model, [x], loss="mse", fisher="exact", progress=False)
    prices = []
    for fraction in (0.8, 0.6, 0.4):
        plan = ed.make_plan(
            model, curvature, ed.Budget(params=fraction), method="eigendamage", form="three"
        )
        small = ed.apply_plan(model, plan, curvature)
        measured = ed.evaluate(small, [(x, target)], loss="mse", progress=False).loss
        prices.append(plan.price)
        assert measured == pytest.approx(plan.price, rel=1e-6)
    assert prices[0] < prices[-1]


@pytest.mark.parametrize("fraction", [0.8, 0.3])
def test_the_result_runs_trains_and_saves(case: Case, fraction: float) -> None:
    model, (x, y) = case.model(), case.data(8)
    curvature = ed.estimate_curvature(model, [x], progress=False)
    try:
        plan = ed.make_plan(model, curvature, ed.Budget(params=fraction), method="eigendamage")
    except ed.BudgetError as error:
        assert "smallest that can be reached" in str(error)
        return
    small = ed.apply_plan(model, plan, curvature)
    assert small.training == model.training
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy(small(x).flatten(0, -2), y.flatten())
    loss.backward()
    assert all(p.grad is not None for n, p in small.named_parameters() if "depthwise" not in n)
    optimizer.step()
    other = ed.apply_plan(model, plan, curvature)
    other.load_state_dict(small.state_dict())
    torch.testing.assert_close(other.eval()(x), small.eval()(x))


def test_requires_grad_modes_and_memory_format_are_kept() -> None:
    case = CASES["residual"]
    model, (x, _) = case.model().to(memory_format=torch.channels_last), case.data(6)
    model.conv2.requires_grad_(False)
    model.conv1.train()
    curvature = ed.estimate_curvature(model, [x], progress=False)
    small = ed.apply_plan(model, full_rank(model, curvature, "three"), curvature)
    assert not any(p.requires_grad for p in small.conv2.parameters())
    assert all(p.requires_grad for p in small.stem.parameters())
    assert small.conv1.training
    assert not small.conv2.training
    assert small.conv2.core.weight.is_contiguous(memory_format=torch.channels_last)


def test_partial_freezing_is_kept() -> None:
    case = CASES["fc"]
    model, (x, _) = case.model(), case.data(4)
    model[0].weight.requires_grad_(False)
    curvature = ed.estimate_curvature(model, [x], progress=False)
    small = ed.apply_plan(model, full_rank(model, curvature, "three"), curvature)
    assert [p.requires_grad for p in small[0].parameters()] == [False, False, False, True]


def test_a_curvature_of_another_shape_is_refused() -> None:
    case = CASES["fc"]
    model, (x, _) = case.model(), case.data(4)
    curvature = ed.estimate_curvature(model, [x], progress=False)
    plan = full_rank(model, curvature, "three")
    other = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    wrong = ed.estimate_curvature(other.double(), [x], progress=False)
    with pytest.raises(ed.MismatchError, match="layer '0'"):
        ed.apply_plan(model, plan, wrong)


def test_hooks_of_other_modules_survive() -> None:
    case = CASES["residual"]
    model, (x, _) = case.model(), case.data(4)
    model.bn1.register_forward_hook(lambda m, a, out: out * 2)
    curvature = ed.estimate_curvature(model, [x], progress=False)
    small = ed.apply_plan(model, full_rank(model, curvature, "three"), curvature)
    torch.testing.assert_close(small(x), model(x))


def test_a_bare_layer_is_a_model_too() -> None:
    layer = nn.Linear(5, 4).double()
    x = torch.randn(9, 5, dtype=torch.float64)
    curvature = ed.estimate_curvature(layer, [x], progress=False)
    assert list(curvature) == [""]
    torch.testing.assert_close(
        ed.apply_plan(layer, full_rank(layer, curvature, "three"), curvature)(x), layer(x)
    )


def test_plans_of_other_models_are_refused() -> None:
    case = CASES["fc"]
    model, (x, _) = case.model(), case.data(4)
    curvature = ed.estimate_curvature(model, [x], progress=False)
    plan = full_rank(model, curvature, "three")
    missing = nn.Sequential(nn.Linear(7, 9), nn.Tanh()).double()
    with pytest.raises(ed.MismatchError, match="'2'"):
        ed.apply_plan(missing, plan, curvature)
    other = copy.deepcopy(model)
    other[2] = nn.Linear(9, 5).double()
    with pytest.raises(ed.MismatchError, match="'2'"):
        ed.apply_plan(other, plan, curvature)
    broken = plan.layers["0"].model_copy(
        update={"action": ed.EigenBlock(rows=(0, 99), columns=(0,), form="three")}
    )
    with pytest.raises(ed.MismatchError, match="distinct indices below 9"):
        ed.apply_plan(
            model, plan.model_copy(update={"layers": {**plan.layers, "0": broken}}), curvature
        )


def test_a_plan_sets_no_attribute_but_those_that_count_heads() -> None:
    case = CASES["fc"]
    model, (x, _) = case.model(), case.data(4)
    curvature = ed.estimate_curvature(model, [x], progress=False)
    plan = full_rank(model, curvature, "three")
    setting = CounterPlan(module="0", attribute="in_features", before=7, after=6)
    with pytest.raises(ed.MismatchError, match="'in_features' of '0', which is no count of heads"):
        ed.apply_plan(model, plan.model_copy(update={"counters": (setting,)}), curvature)


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.bn(self.conv(x))).mean((2, 3)))


def test_recalibration_measures_mean_and_variance_by_example() -> None:
    torch.manual_seed(0)
    model = _Normed().double().eval()
    x = torch.randn(10, 3, 6, 6, dtype=torch.float64) * 2 + 1
    assert ed.recalibrate_batchnorm(model, [x[:7], x[7:]], progress=False) == 1
    y = model.conv(x)
    torch.testing.assert_close(model.bn.running_mean, y.mean((0, 2, 3)))
    parts = [p.var((0, 2, 3), unbiased=True) * len(p) / 10 for p in (y[:7], y[7:])]
    torch.testing.assert_close(model.bn.running_var, sum(parts))
    assert not model.bn.training
    assert model.bn.momentum == 0.1


def test_recalibration_on_single_images_uses_all_of_them() -> None:
    torch.manual_seed(0)
    model = _Normed().double().eval()
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64) * 2 + 1
    assert ed.recalibrate_batchnorm(model, x.split(1), progress=False) == 1
    torch.testing.assert_close(model.bn.running_mean, model.conv(x).mean((0, 2, 3)))


def test_recalibration_leaves_a_norm_that_does_not_run_alone() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.aux = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            nn.init.constant_(self.aux.running_mean, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(2 + self.bn(x))

    model, x = Branches().eval(), torch.randn(8, 3)
    assert ed.recalibrate_batchnorm(model, [x], progress=False) == 1
    assert torch.equal(model.aux.running_mean, torch.full((3,), 5.0))
    # Both calls count: the second one's input has mean 2.
    torch.testing.assert_close(model.bn.running_mean, (x.mean(0) + 2) / 2)


def test_recalibration_skips_a_last_batch_of_one_and_undoes_a_failure() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(9, 3)
    assert ed.recalibrate_batchnorm(model, [x[:8], x[8:]], progress=False) == 1
    before = model[1].running_mean.clone()
    with pytest.raises(ed.DataError, match="at least two examples"):
        ed.recalibrate_batchnorm(model, x.split(1), progress=False)
    assert torch.equal(model[1].running_mean, before)
    assert model[1].momentum == 0.1
    assert ed.recalibrate_batchnorm(nn.Linear(2, 2), [torch.zeros(1, 2)], progress=False) == 0
