"""compress as a whole, and everything it refuses."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import eigendamage as ed
from eigendamage import zoo
from tests.cases import CASES, Case


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 4),
    ).eval()


def _data(n: int = 24) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=g), torch.randint(0, 4, (n,), generator=g)


def test_the_whole_way(tmp_path: Path) -> None:
    model, (x, y) = _network(), _data()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = ed.compress(
        model,
        x.split(8),
        budget=ed.Budget(macs=0.5),
        method="eigendamage",
        eval_data=[(x, y)],
        calibration_examples=8,
        progress=False,
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    report = result.report
    assert report.macs[1] <= 0.5 * report.macs[0]
    assert report.macs == (ed.count(model, x).macs, ed.count(result.model, x).macs)
    assert report.macs == result.plan.macs
    assert report.parameters == result.plan.parameters
    assert report.predicted == result.plan.price > 0
    assert report.measured_on == "eval_data"
    assert report.original.accuracy == ed.evaluate(model, [(x, y)], progress=False).accuracy
    final = ed.evaluate(result.model, [(x, y)], reference=model, progress=False)
    assert report.final.loss == pytest.approx(final.loss)
    assert report.final.divergence == pytest.approx(final.divergence)
    assert report.recalibrated is not None
    assert report.compressed.loss != report.recalibrated.loss
    assert set(report.calibration) == set(result.curvature)
    assert report.left_alone == {"1": "BatchNorm2d has no weight matrix"}
    assert {"curvature", "plan", "surgery", "measurement"} <= set(report.seconds)
    report.save(tmp_path / "report.json")
    assert ed.Report.load(tmp_path / "report.json") == report
    ed.print_report(report)


def test_same_seed_same_result() -> None:
    x, _ = _data()
    results = [
        ed.compress(
            _network(),
            [x],
            budget=ed.Budget(params=0.5),
            method="eigendamage",
            seed=4,
            progress=False,
        )
        for _ in range(2)
    ]
    assert results[0].plan == results[1].plan
    states = [r.model.state_dict() for r in results]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_without_labels_or_held_out_data_the_report_says_so() -> None:
    x, _ = _data()
    report = ed.compress(
        _network(), [x], budget=ed.Budget(macs=0.6), method="eigendamage", progress=False
    ).report
    assert report.measured_on == "data"
    assert report.original.accuracy is None
    assert report.measured_rise is None
    assert report.final.divergence is not None
    assert report.final.divergence > 0


def test_another_budget_takes_the_curvature_that_is_there() -> None:
    model, (x, _) = _network(), _data()
    first = ed.compress(
        model, [x], budget=ed.Budget(macs=0.7), method="eigendamage", progress=False
    )
    second = ed.compress(
        model,
        [x],
        budget=ed.Budget(macs=0.4),
        method="eigendamage",
        curvature=first.curvature,
        progress=False,
    )
    assert second.curvature is first.curvature
    assert "curvature" not in second.report.seconds
    assert second.report.macs[1] < first.report.macs[1]


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_outputs_without_a_second_axis(loss: str) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[:, 0]

    x, y = torch.randn(16, 8), torch.randint(0, 2, (16,)).float()
    report = ed.compress(
        Flat(),
        [(x, y)],
        budget=ed.Budget(params=0.8),
        method="eigendamage",
        loss=loss,
        progress=False,
    ).report
    assert report.final.loss is not None
    assert report.final.divergence is not None


def test_a_function_as_loss_of_any_output_compresses() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.boxes = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> dict[str, dict[str, Tensor]]:
            return {"found": {"boxes": self.boxes(torch.tanh(self.body(x)))}}

    def loss(output: dict[str, dict[str, Tensor]], target: Tensor) -> Tensor:
        return (output["found"]["boxes"] - target).square().sum(1)

    x, y = torch.randn(24, 16), torch.randn(24, 4)
    report = ed.compress(
        Detector(),
        [(x, y)],
        budget=ed.Budget(params=0.7),
        method="eigendamage",
        loss=loss,
        fisher="empirical",
        progress=False,
    ).report
    assert report.measured_rise is not None
    assert report.final.divergence is None


def test_narrow_integer_labels_are_labels() -> None:
    model, (x, y) = _network(), _data()
    wide = ed.estimate_curvature(model, [(x, y)], fisher="empirical", progress=False)
    for dtype in (torch.int32, torch.uint8):
        found = ed.estimate_curvature(model, [(x, y.to(dtype))], fisher="empirical", progress=False)
        torch.testing.assert_close(found["0"].S, wide["0"].S)


def test_what_cannot_be_meant_is_refused_before_anything_runs() -> None:
    class Untouched:
        def __iter__(self) -> Iterator[Tensor]:
            raise AssertionError("the data was read")

    for wrong in ({"method": "magic"}, {"max_ratio": 2.0}, {"multiple": 0}):
        with pytest.raises(ed.EigenDamageError, match=next(iter(wrong))):
            ed.compress(_network(), Untouched(), budget=ed.Budget(macs=0.5), **wrong)
    x = torch.randn(4, 8)
    with pytest.raises(ed.DataError, match="two tensors alike"):
        ed.estimate_curvature(nn.Linear(8, 8), (x, x), loss="mse", progress=False)
    with pytest.raises(ed.DataError, match="cannot run on inputs of shape"):
        ed.estimate_curvature(nn.Linear(5, 8), [x], progress=False)


def test_a_model_that_was_made_in_inference_mode_is_refused_and_stays_as_it_is() -> None:
    with torch.inference_mode():
        model = _network()
    data, original = [_data()[0]] * 3, copy.deepcopy(model)
    calls: tuple[Callable[[], object], ...] = (
        lambda: ed.compress(model, data, budget=ed.Budget(macs=0.5), progress=False),
        lambda: ed.estimate_curvature(model, data, progress=False),
        lambda: ed.finetune(model, data, original=original, progress=False),
        lambda: ed.recalibrate_batchnorm(model, data, progress=False),
    )
    for call in calls:
        with pytest.raises(ed.EigenDamageError, match=r"'0\.weight' was made under .*deepcopy"):
            call()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(ed.estimate_curvature(copy.deepcopy(model), data, progress=False)) == 3


def test_a_model_that_cannot_be_copied_is_refused_before_the_data_is_read() -> None:
    class Untouched:
        def __iter__(self) -> Iterator[object]:
            raise AssertionError("the data was read")

    model = nn.Sequential(_network())
    model[0][3].lock = threading.Lock()
    with pytest.raises(ed.EigenDamageError, match=r"Sequential cannot be copied.*its '0\.3\.lock'"):
        ed.compress(model, Untouched(), budget=ed.Budget(macs=0.5), progress=False)
    del model[0][3].lock
    small = ed.compress(
        model, [_data()[0]], budget=ed.Budget(macs=0.8), method="eigendamage", progress=False
    )
    assert small.report.macs[1] <= 0.8 * small.report.macs[0]


def test_no_memory_for_a_copy_is_no_fault_of_the_model() -> None:
    class Large:
        def __deepcopy__(self, _memo: object) -> object:
            raise torch.OutOfMemoryError("no memory")

    model = _network()
    model.large = Large()
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        ed.compress(model, [_data()[0]], budget=ed.Budget(macs=0.8), progress=False)


@pytest.mark.parametrize("part", ["0", "7"])
def test_a_model_without_values_is_refused(part: str) -> None:
    """Also if it is only one of its layers."""
    model = _network()
    model[int(part)] = model[int(part)].to("meta")
    data = [_data()[0]]
    calls: tuple[Callable[[], object], ...] = (
        lambda: ed.compress(model, data, budget=ed.Budget(macs=0.5), progress=False),
        lambda: ed.estimate_curvature(model, data, progress=False),
        lambda: ed.evaluate(model, data, progress=False),
        lambda: ed.count(model, data),
    )
    for call in calls:
        with pytest.raises(ed.EigenDamageError, match=rf"'{part}\.weight' is on the meta device"):
            call()


def test_a_call_within_another_on_the_same_model_says_so() -> None:
    """As from two threads, in a fixed order."""
    said: list[str] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = _network()

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not said:
                said.append("")
                with pytest.raises(ed.NothingToCompressError) as refused:
                    ed.estimate_curvature(self, [x.detach()], progress=False)
                said[0] = str(refused.value)
            return self.network(x)

    model = Watched()
    found = ed.estimate_curvature(model, [_data()[0]], progress=False)
    assert "another call of this library is at work on the model" in said[0]
    assert len(found) == 3


def test_the_same_ignore_goes_with_a_curvature_that_had_it() -> None:
    model, (x, _) = _network(), _data()
    first = ed.compress(
        model, [x], budget=ed.Budget(macs=0.8), method="eigendamage", ignore="0", progress=False
    )
    second = ed.compress(
        model,
        [x],
        budget=ed.Budget(macs=0.7),
        method="eigendamage",
        ignore="0",
        curvature=first.curvature,
        progress=False,
    )
    assert "0" not in second.plan.layers


def test_a_curvature_of_another_loss_is_refused() -> None:
    model, (x, _) = _network(), _data()
    curvature = ed.estimate_curvature(model, [x], loss="mse", progress=False)
    with pytest.raises(ed.MismatchError, match="of the loss 'mse'"):
        ed.compress(
            model,
            [x],
            budget=ed.Budget(macs=0.5),
            method="eigendamage",
            curvature=curvature,
            progress=False,
        )


def test_the_random_state_is_as_before() -> None:
    x, y = _data()
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    state = torch.get_rng_state()
    ed.compress(
        _network_at(state), loader, budget=ed.Budget(macs=0.5), method="eigendamage", progress=False
    )
    assert torch.equal(torch.get_rng_state(), state)


def _network_at(state: Tensor) -> nn.Module:
    model = _network()
    torch.set_rng_state(state)
    return model


def test_a_generator_is_data_too() -> None:
    model, (x, _) = _network(), _data()
    budget = ed.Budget(macs=0.6)
    listed = ed.compress(
        model, list(x.split(8)), budget=budget, method="eigendamage", progress=False
    )
    made = ed.compress(
        model, (part for part in x.split(8)), budget=budget, method="eigendamage", progress=False
    )
    assert listed.plan == made.plan
    assert listed.report.compressed == made.report.compressed


def test_a_budget_of_one_returns_the_model_unchanged_and_says_so() -> None:
    model, (x, _) = _network(), _data()
    result = ed.compress(
        model, [x], budget=ed.Budget(macs=1.0), method="eigendamage", progress=False
    )
    assert result.model is not model
    assert torch.equal(result.model(x), model(x))
    assert str(result.model) == str(model)
    assert "stays as is" in result.report.notes[0]
    assert result.report.final.divergence == 0


def test_an_impossible_budget() -> None:
    with pytest.raises(ed.BudgetError, match="smallest that can be reached"):
        ed.compress(
            _network(),
            [_data()[0]],
            budget=ed.Budget(macs=0.01),
            method="eigendamage",
            progress=False,
        )


@pytest.mark.parametrize("data", [[], iter([]), [torch.zeros(0, 3, 8, 8)]])
def test_no_example(data: object) -> None:
    with pytest.raises(ed.DataError, match=r"no example|empty"):
        ed.compress(
            _network(), data, budget=ed.Budget(macs=0.5), method="eigendamage", progress=False
        )


def test_nan_inputs_are_named_by_batch() -> None:
    x, _ = _data()
    x[20, 0, 0, 0] = float("nan")
    with pytest.raises(ed.NonFiniteError, match="input of batch 2 holds 1 NaN"):
        ed.compress(
            _network(), x.split(8), budget=ed.Budget(macs=0.5), method="eigendamage", progress=False
        )


def test_nan_weights_are_named_by_layer() -> None:
    model = _network()
    model[3].weight.data[0] = float("inf")
    with pytest.raises(ed.NonFiniteError):
        ed.compress(
            model, [_data()[0]], budget=ed.Budget(macs=0.5), method="eigendamage", progress=False
        )
    # Even where no NaN reaches the output, as behind a dead branch of a ReLU.
    model = _network()
    model[3].weight.data[0] = float("nan")

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.nan_to_num(self.inner(x))

    with pytest.raises(ed.NonFiniteError, match=r"layer 'inner\.3'"):
        ed.compress(
            Masked(), [_data()[0]], budget=ed.Budget(macs=0.5), method="eigendamage", progress=False
        )


def test_overflowing_gradients_are_named_by_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight.data.mul_(1e30)
    x = torch.randn(8, 4) * 1e-30
    with pytest.raises(ed.NonFiniteError, match="layer '0'"):
        ed.estimate_curvature(model, [x], loss="mse", progress=False)


def test_no_compressible_layer() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ed.NothingToCompressError, match="no weight matrix"):
        ed.compress(
            model, [_data()[0]], budget=ed.Budget(macs=0.5), method="eigendamage", progress=False
        )


def test_a_frozen_model_is_compressed_and_stays_frozen() -> None:
    model = _network().requires_grad_(False)
    result = ed.compress(
        model, [_data()[0]], budget=ed.Budget(macs=0.5), method="eigendamage", progress=False
    )
    assert result.plan.changed
    assert not any(p.requires_grad for p in result.model.parameters())
    assert not any(p.requires_grad for p in model.parameters())


def test_a_module_used_twice_is_summed_and_replaced_everywhere() -> None:
    case = CASES["shared"]
    model, (x, _) = case.model(), case.data(12)
    result = ed.compress(
        model, [x], budget=ed.Budget(params=0.75), method="eigendamage", progress=False
    )
    assert result.report.macs[1] == pytest.approx(result.plan.macs[1])
    assert result.model.named is result.model.alias
    assert result.curvature["twice"].positions == 12 * 42 * 2


@pytest.mark.parametrize("broken", ["strings", "triples", "scalars", "labels"])
def test_data_of_an_unknown_form(broken: str) -> None:
    x, y = _data()
    data: object = {
        "strings": ["image.png"],
        "triples": [(x, y, y)],
        "scalars": [torch.tensor(1.0)],
        "labels": [(x, y[:3])],
    }[broken]
    with pytest.raises(ed.DataError):
        ed.compress(
            _network(), data, budget=ed.Budget(macs=0.5), method="eigendamage", progress=False
        )


def test_losses_and_labels_that_do_not_fit() -> None:
    x, y = _data()

    def run(data: object, **options: object) -> None:
        ed.compress(
            _network(),
            data,
            budget=ed.Budget(macs=0.5),
            method="eigendamage",
            progress=False,
            **options,
        )

    with pytest.raises(ed.LossError, match="needs labels"):
        run([x], fisher="empirical")
    with pytest.raises(ed.LossError, match="range from"):
        run([(x, y + 10)], fisher="empirical")
    with pytest.raises(ed.LossError, match="predictive distribution"):
        run([(x, y)], loss=nn.functional.cross_entropy)
    with pytest.raises(ed.LossError, match="targets have shape"):
        run([(x, y)], loss="mse", fisher="empirical")


def test_a_model_without_a_tensor_to_take_a_loss_of() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> str:
            self.fc(x)
            return "done"

    with pytest.raises(ed.LossError, match="returned str"):
        ed.estimate_curvature(Strange(), [torch.randn(2, 4)], progress=False)


def test_a_pass_that_sees_other_examples_is_refused() -> None:
    class Shrinking:
        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            return iter([torch.randn(4, 7).double()] * (4 - self.passes))

    with pytest.raises(ed.MismatchError, match="more than once"):
        ed.estimate_curvature(CASES["fc"].model(), Shrinking(), progress=False)


def test_every_model_of_the_table_can_be_compressed(case: Case) -> None:
    model, (x, y) = case.model(), case.data(12)
    try:
        result = ed.compress(
            model,
            [(x, y)],
            budget=ed.Budget(params=0.85),
            method="eigendamage",
            max_ratio=0.8,
            progress=False,
        )
    except ed.BudgetError as error:
        assert "smallest that can be reached" in str(error)
        return
    assert result.report.parameters[1] <= 0.85 * result.report.parameters[0]
    assert result.model(x).shape == model(x).shape


def test_finetuning_lowers_the_loss_and_keeps_modes() -> None:
    train = zoo.fashion_mnist("train").take(slice(0, 600))
    model = zoo.demo_network()
    small = ed.compress(
        model,
        zoo.ImageSet(train.images[:200]).batches(100),
        budget=ed.Budget(macs=0.4),
        method="eigendamage",
        calibration_examples=0,
        progress=False,
    ).model
    batches = train.batches(50, shuffle_seed=0)
    before = ed.evaluate(small, batches, progress=False).loss
    ed.finetune(small, batches, progress=False)
    after = ed.evaluate(small, batches, progress=False).loss
    assert after < before
    assert not small.training
    with pytest.raises(ed.DataError, match="labels"):
        ed.finetune(small, [train.images[:4]] * 4, progress=False)


@pytest.mark.parametrize(
    ("eval_data", "said"),
    [
        ([], "eval_data: the data has no example"),
        ([torch.randn(4, 7)], "eval_data: layer '0'"),
        ([(torch.randn(4, 3, 8, 8), torch.full((4,), 9))], "eval_data: .*9"),
    ],
)
def test_faulty_eval_data_is_refused_before_the_work(eval_data: list[Tensor], said: str) -> None:
    def never() -> Iterator[Tensor]:
        raise AssertionError("the data was read")
        yield

    class Unread:
        def __iter__(self) -> Iterator[Tensor]:
            return never()

    with pytest.raises(ed.EigenDamageError, match=said):
        ed.compress(
            _network(),
            Unread(),  # type: ignore[arg-type]
            budget=ed.Budget(macs=0.5),
            method="kron-obs",
            eval_data=eval_data,
            progress=False,
        )


def test_a_table_of_less_than_no_example_is_refused() -> None:
    with pytest.raises(ed.EigenDamageError, match="calibration_examples is -1"):
        ed.compress(
            _network(), [], budget=ed.Budget(macs=0.5), calibration_examples=-1, progress=False
        )
