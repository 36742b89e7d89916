"""Counts against torch's flop counter, losses against torch's own functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import eigendamage as ed
from eigendamage import zoo
from eigendamage.layers import find_layers
from eigendamage.measure import evaluate_together
from tests.cases import CASES, Case


def _flops(model: nn.Module, x: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() / 2 / len(x)


def test_closed_form_counts_are_those_of_the_flop_counter(case: Case) -> None:
    model, (x, _) = case.model(), case.data(3)
    counted = ed.count(model, x)
    assert counted.macs == pytest.approx(_flops(model, x))
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    grouped = [n for n, r in find_layers(model).left_alone.items() if "grouped" in r]
    if not grouped:  # nothing but the listed layers multiplies
        assert sum(c.macs for c in counted.layers.values()) == pytest.approx(counted.macs)
    for name, cost in counted.layers.items():
        module = model.get_submodule(name)
        assert cost.parameters == sum(p.numel() for p in module.parameters())


def test_counts_of_the_compressed_model_are_those_of_the_plan(case: Case) -> None:
    model, (x, _) = case.model(), case.data(6)
    curvature = ed.estimate_curvature(model, [x], progress=False)
    for fraction in (0.9, 0.6):
        try:
            plan = ed.make_plan(model, curvature, ed.Budget(macs=fraction), method="eigendamage")
        except ed.BudgetError:
            continue
        small = ed.apply_plan(model, plan, curvature)
        assert _flops(small, x) == pytest.approx(plan.macs[1])
        assert plan.macs[1] <= fraction * plan.macs[0]
        closed = ed.count(small, x)
        assert closed.parameters == plan.parameters[1]
        for name, layer in plan.layers.items():
            assert closed.layers[name].macs == pytest.approx(layer.macs[1])
            assert closed.layers[name].parameters == layer.parameters[1]


def test_attention_counts_too() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    counted = ed.count(model, x)
    # q, k, v and output projections, scores and values, two linear layers
    assert counted.macs == 5 * 4 * 64 + 2 * 25 * 8 + 2 * 5 * 8 * 16


class TokenBeside(nn.Module):
    """Hands a parameter of its own to a module, as some transformers do with their class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 4))
        self.frozen = nn.Parameter(torch.ones(1, 4), requires_grad=False)
        self.read = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(x) + self.read(self.token) + self.frozen[:, :3]


def test_a_parameter_that_is_handed_to_a_module_is_counted_with() -> None:
    model = TokenBeside()
    assert ed.count(model, torch.randn(2, 4)).macs == 4 * 3 + 4 * 3 / 2  # the token's is shared
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert wanted == {"token", "read.weight", "read.bias"}


def test_preresnet_and_vgg_count() -> None:
    x = torch.zeros(1, 3, 32, 32)
    for build in (zoo.resnet20, zoo.preresnet29):
        model = build().eval()
        assert sum(c.macs for c in ed.count(model, x).layers.values()) == _flops(model, x)


@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_loss_and_accuracy_are_torchs(name: str) -> None:
    case = CASES[name]
    model, (x, y) = case.model(), case.data(10)
    data = list(zip(x.split(4), y.split(4), strict=True))
    found = ed.evaluate(model, data, progress=False)
    logits = model(x).detach()
    total = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum")
    assert found.loss == pytest.approx(float(total) / 10)
    assert found.accuracy == pytest.approx(float((logits.argmax(-1) == y).double().mean()))
    assert found.divergence is None


def test_divergence_is_the_kl_and_zero_from_itself() -> None:
    model, (x, _) = CASES["fc"].model(), CASES["fc"].data(10)
    other = CASES["fc"].build().double()
    zero, found = evaluate_together([model, other], [x[:6], x[6:]], progress=False)
    p, q = model(x).log_softmax(1).detach(), other(x).log_softmax(1).detach()
    expected = F.kl_div(q, p, log_target=True, reduction="batchmean")
    assert found.divergence == pytest.approx(float(expected))
    assert zero.divergence is None
    itself = ed.evaluate(model, [x], reference=model, progress=False)
    assert itself.divergence == 0
    assert itself.loss is None
    assert itself.accuracy is None


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_divergence_is_the_rise_of_the_loss_at_the_models_own_truth(loss: str) -> None:
    """The second derivative of the divergence is the exact Fisher: both are one contract."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    c = ed.estimate_curvature(model, [x], loss=loss, fisher="exact", progress=False)["0"]
    step = 1e-4 * torch.randn(2, 3, dtype=torch.float64)
    moved = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    moved.load_state_dict({"0.weight": model[0].weight + step})
    measured = ed.evaluate(moved, [x], loss=loss, reference=model, progress=False).divergence
    assert measured is not None
    total = torch.zeros(6, 6, dtype=torch.float64)
    for n in range(5):
        one = ed.estimate_curvature(
            model, [x[n : n + 1]], loss=loss, fisher="exact", progress=False
        )["0"]
        total += torch.kron(one.S, one.A) / 5
    predicted = 0.5 * step.flatten() @ total @ step.flatten()
    assert measured == pytest.approx(float(predicted), rel=1e-3)
    assert float(c.eigenvalues.sum()) == pytest.approx(float(total.trace()))


class _Right(nn.Module):
    """Predicts class 1 where the input says so, else class 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([-x, x], -1)


@pytest.mark.parametrize("tokens", [1, 12])
def test_the_standard_error_of_an_accuracy_is_the_spread_over_redrawn_data(tokens: int) -> None:
    chance = torch.Generator().manual_seed(0)

    def texts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        # How hard a text is decides most of its tokens: they are right or wrong together.
        hard = torch.rand(count, 1, generator=chance)
        right = torch.rand(count, tokens, generator=chance) < hard**2
        labels = torch.ones(count, tokens, dtype=torch.long)
        length = torch.randint(1, tokens + 1, (count, 1), generator=chance)
        labels[torch.arange(tokens) >= length] = -100
        return 2.0 * right - 1, labels

    def measured(count: int) -> ed.Evaluation:
        return ed.evaluate(_Right(), [texts(count // 2), texts(count // 2)], progress=False)

    found = [measured(200) for _ in range(300)]
    spread = torch.tensor([e.accuracy for e in found]).std().item()
    told = torch.tensor([e.accuracy_error for e in found]).mean().item()
    assert told == pytest.approx(spread, rel=0.1)
    if tokens == 1:
        p = found[0].accuracy
        assert p is not None
        assert found[0].accuracy_error == pytest.approx((p * (1 - p) / 200) ** 0.5)


def test_without_class_labels_there_is_no_standard_error() -> None:
    found = ed.evaluate(nn.Linear(3, 2), [torch.randn(4, 3)], progress=False)
    assert (found.accuracy, found.accuracy_error) == (None, None)


def test_labels_that_are_all_ignored_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    ignored = [(torch.randn(5, 2, 2), torch.full((5,), -100))]
    with pytest.raises(ed.DataError, match="no position of the 5 examples counts"):
        ed.evaluate(model, ignored, progress=False)


@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_a_reference_with_other_outputs_is_refused(outputs: int, loss: ed.Loss) -> None:
    data = [torch.randn(4, 8)]
    with pytest.raises(ed.MismatchError, match=rf"returns \(4, {outputs}\) and the model \(4, 3\)"):
        ed.evaluate(
            nn.Linear(8, 3), data, reference=nn.Linear(8, outputs), loss=loss, progress=False
        )
