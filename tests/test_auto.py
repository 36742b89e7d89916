"""compress by method auto: the repair, the truth, data of all kinds, and what can be saved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eigendamage as ed
from eigendamage import zoo
from eigendamage.compress import _report
from eigendamage.errors import ChannelError
from eigendamage.plan import Channels
from eigendamage.report import TRUST, Truth
from tests.cases import CASES
from tests.networks import NETWORKS

HALF = ed.Budget(macs=0.5)


def _model() -> nn.Module:
    return NETWORKS["vgg, flattened"].model()


def _inputs(examples: int = 30) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(examples, 3, 8, 8, dtype=torch.float64, generator=generator)


def _batches(examples: int = 30) -> list[Tensor]:
    """Five of them or more: whole ones are held out, of five the last."""
    return (
        [*_inputs(30).split(6), *_inputs(examples - 30).split(6)]
        if examples > 30
        else list(_inputs(examples).split(6))
    )


def _labels(seed: int, examples: int = 30) -> Tensor:
    return torch.randint(0, 5, (examples,), generator=torch.Generator().manual_seed(seed))


def _compress(model: nn.Module, data: Iterable[object], **options: object) -> ed.Compressed:
    return ed.compress(
        model,
        data,
        **{"budget": HALF, "refine": 0, "calibrate": False, "progress": False, **options},
    )


def _same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def _kl(original: nn.Module, model: nn.Module, x: Tensor) -> float:
    """In torch's own words."""
    with torch.no_grad():
        p, q = original(x).log_softmax(-1), model(x).log_softmax(-1)
    return F.kl_div(q, p, reduction="sum", log_target=True).item() / len(x)


@pytest.fixture(scope="session")
def compressed() -> ed.Compressed:
    """Without labels."""
    torch.set_num_threads(1)
    return _compress(_model(), _batches())


@pytest.fixture(scope="session")
def calibrated() -> ed.Compressed:
    """With prices corrected by measurements."""
    torch.set_num_threads(1)
    return _compress(_model(), _batches(), calibrate=True)


# The repair and the truth.


def test_the_repair_brings_a_trained_network_nearer_to_the_original() -> None:
    model = zoo.demo_network()
    images = zoo.fashion_mnist("train").images
    fit, unseen = images[:300], images[1000:1100]
    result = _compress(
        model,
        fit.split(30),
        budget=ed.Budget(macs=0.85),
        ignore=("conv1", "layer2.*", "layer3.*"),
        actions=("channels",),
        eval_data=unseen,
    )
    truth = result.report.truth
    assert result.repairs is not None
    assert any(layer.accepted for layer in result.repairs.values())
    assert truth.after_repair < truth.before_repair
    cut = ed.apply_plan(model, result.plan, result.curvature)
    assert _kl(model, result.model, unseen) < _kl(model, cut, unseen)
    for name in ("conv1", "layer2.0.conv1", "layer3.1.conv2"):
        assert _same(model.get_submodule(name), result.model.get_submodule(name))


def test_the_truth_is_what_is_measured_on_the_part_held_out(calibrated: ed.Compressed) -> None:
    model, truth, plan = _model(), calibrated.report.truth, calibrated.plan
    held_out = _batches()[4]
    cut = ed.apply_plan(model, plan, calibrated.curvature)
    assert truth.examples == len(held_out)
    assert truth.before_repair == pytest.approx(_kl(model, cut, held_out), rel=1e-9)
    assert truth.measured == pytest.approx(_kl(model, calibrated.model, held_out), rel=1e-9)
    assert truth.priced == pytest.approx(plan.price)
    assert truth.calibrated == pytest.approx(plan.calibrated)
    assert calibrated.report.predicted == plan.price
    assert truth.layers.keys() == {n for n in plan.changed if plan.layers[n].price}
    assert any(layer.measured is not None for layer in truth.layers.values())


@pytest.mark.parametrize("examples", [5, 13])
def test_few_batches_lose_their_last_examples_to_the_part_held_out(examples: int) -> None:
    model, x = _model(), _inputs(2 * examples)
    result = _compress(model, [x[:examples], x[examples:]])
    held_out = torch.cat([half[-max(1, examples // 10) :] for half in x.split(examples)])
    assert result.report.truth.examples == len(held_out)
    assert result.curvature.examples == 2 * examples - len(held_out)
    assert result.report.truth.measured == pytest.approx(_kl(model, result.model, held_out))


def _truth(measured: float, *, calibrated: float | None = 0.1) -> Truth:
    return Truth(
        examples=1,
        priced=0.05,
        calibrated=calibrated,
        quadratic=None,
        before_repair=9.0,
        after_repair=measured,
        layers={},
    )


def test_trust_ends_above_its_factor_and_the_note_says_how_far_above() -> None:
    assert _truth(0.1 * TRUST).note is None
    assert _truth(0.0).note is None
    assert _truth(0.05).trusted
    assert "is 3.0 times the predicted one" in _truth(0.3).note
    assert "is 4.0 times" in _truth(0.2, calibrated=None).note


@pytest.mark.parametrize(("measured", "noted"), [(1e3, True), (1e-9, False)])
def test_the_note_on_trust_is_in_the_report(
    monkeypatch: pytest.MonkeyPatch,
    compressed: ed.Compressed,
    measured: float,
    noted: bool,
) -> None:
    monkeypatch.setattr(_report, "truth_of", lambda *_args: _truth(measured))
    report = _compress(_model(), _batches(), curvature=compressed.curvature).report
    assert any("predictions are trusted" in note for note in report.notes) is noted


# The data.


def test_labels_change_nothing(compressed: ed.Compressed) -> None:
    labelled = zip(_batches(), _labels(0).split(6), strict=True)
    result = _compress(_model(), list(labelled))
    assert result.plan == compressed.plan
    assert _same(result.model, compressed.model)
    assert result.report.truth == compressed.report.truth


class _Named(nn.Module):
    """Takes its inputs by name, one or two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _model()

    def forward(self, image: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.inner(image if shift is None else image + shift[:, None, None, None])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda batches: (batch for batch in batches),
        lambda batches: [{"image": batch} for batch in batches],
        lambda batches: [{"image": b, "shift": torch.zeros(len(b)).double()} for b in batches],
    ],
    ids=["generator", "dicts", "dicts of two"],
)
def test_batches_of_any_kind_give_the_same_model(
    compressed: ed.Compressed, wrap: Callable[[list[Tensor]], Iterable[object]]
) -> None:
    result = _compress(_Named().eval(), wrap(_batches()))
    assert _same(result.model.inner, compressed.model)


def test_a_lone_tensor_is_one_batch() -> None:
    x = _inputs()
    result = _compress(_model(), x)
    assert result.curvature.examples == 27
    held_out = x[27:]
    assert result.report.truth.measured == pytest.approx(_kl(_model(), result.model, held_out))


def test_no_more_examples_are_used_than_allowed(compressed: ed.Compressed) -> None:
    result = _compress(_model(), _batches(60), max_examples=30)
    assert result.curvature.examples == 24
    assert result.report.truth.examples == 6
    assert _same(result.model, compressed.model)


def test_what_cannot_be_held_out_is_refused_with_what_to_do() -> None:
    batches = [{"image": b, "shift": torch.zeros(len(b)).double()} for b in _batches()]
    with pytest.raises(
        ed.DataError, match=r"takes at least 5 batches .* has 4\. Give more, or repair=F"
    ):
        _compress(_Named().eval(), batches[:4])
    with pytest.raises(ed.DataError, match="batches of one example"):
        _compress(_model(), _inputs(1))
    result = _compress(_Named().eval(), batches[:4], repair=False, calibrate=False)
    assert result.report.truth is None
    assert result.report.macs[1] <= 0.5 * result.report.macs[0]


# Channels that cannot be traced.


def test_where_channels_cannot_be_traced_it_goes_on_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_args: object, **_options: object) -> None:
        raise ChannelError("the network is a mystery")

    monkeypatch.setattr("eigendamage.curvature._estimate.find_channels", fails)
    result = _compress(_model(), _batches())
    assert "channels are not on the menu: the network is a mystery" in result.report.notes
    assert not any(isinstance(p.action, Channels) for p in result.plan.layers.values())
    assert result.report.macs[1] <= 0.5 * result.report.macs[0]
    with pytest.raises(ChannelError, match="mystery"):
        _compress(_model(), _batches(), method="kron-obs")


# What goes in stays, what comes out is a model like any other.


def test_the_model_and_the_random_state_are_as_they_were() -> None:
    model = _model()
    model[3].train()
    calls: list[int] = []
    model[4].register_forward_hook(lambda *_args: calls.append(1))
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    frozen = model[0].weight.requires_grad_(False)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    _compress(model, _batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert [len(m._forward_hooks) for m in model] == [0, 0, 0, 0, 1, *[0] * (len(model) - 5)]
    assert [len(m._forward_pre_hooks) for m in model] == [0] * len(model)
    assert calls


def test_the_weights_load_into_what_the_plan_makes(
    compressed: ed.Compressed, tmp_path: Path
) -> None:
    torch.save(compressed.model.state_dict(), tmp_path / "weights.pt")
    compressed.plan.save(tmp_path / "plan.json")
    again = ed.apply_plan(_model(), ed.Plan.load(tmp_path / "plan.json"), compressed.curvature)
    x = _inputs()
    with torch.no_grad():
        expected = compressed.model(x)
        again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert torch.equal(again(x), expected)
        assert torch.equal(copy.deepcopy(compressed.model)(x), expected)


def test_the_result_exports_and_learns(compressed: ed.Compressed) -> None:
    model, x = copy.deepcopy(compressed.model), _inputs(4)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    F.cross_entropy(model(x), _labels(0, 4)).backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)
    assert all(bool(g.any()) for g in gradients if g is not None and g.dim() > 1)


def test_layers_that_a_pattern_names_stay_bit_for_bit_through_the_repair() -> None:
    model = CASES["residual"].model()
    x, _ = CASES["residual"].data(30)
    result = _compress(model, x.split(6), budget=ed.Budget(macs=0.7), ignore=("conv2", "bn*"))
    assert result.plan.changed
    for name in ("conv2", "bn1", "bn2"):
        assert _same(model.get_submodule(name), result.model.get_submodule(name))
