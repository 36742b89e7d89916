"""Several rounds: budgets spread, eigenbases merged, training shared out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import eigendamage as ed
from eigendamage.compare._dealt import Dealt


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    ).eval()


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(count)
    ]


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("method", ["eigendamage", "kron-obs", "taylor"])
def test_the_whole_budget_is_met_in_equal_steps(method: str, unit: str) -> None:
    model, data = network(), batches()
    budget = ed.Budget(macs=0.4) if unit == "macs" else ed.Budget(params=0.4)
    result = ed.compress(model, data, budget=budget, rounds=3, method=method, progress=False)
    before, after = ed.count(model, data), ed.count(result.model, data)
    whole = after.macs / before.macs if unit == "macs" else after.parameters / before.parameters
    assert whole <= 0.4 + 1e-9
    report = result.report
    assert report.macs == (before.macs, after.macs)
    assert report.parameters == (before.parameters, after.parameters)
    assert len(report.rounds) == 3
    assert len(result.earlier) == 2
    left = 1.0
    for index, plan in enumerate((*result.earlier, result.plan)):
        left *= plan.left("macs" if unit == "macs" else "params")
        assert left <= 0.4 ** ((index + 1) / 3) + 1e-9
        one = report.rounds[index]
        assert one.finetuned is None
        share = one.macs / before.macs if unit == "macs" else one.parameters / before.parameters
        assert share == pytest.approx(left, abs=0.02)


@pytest.mark.parametrize("method", ["eigendamage", "auto"])
def test_training_after_each_round_changes_the_result_and_leaves_the_input_alone(
    method: str,
) -> None:
    model, data = network(), batches(6)
    weights = copy.deepcopy(model.state_dict())
    trained = ed.compress(
        model,
        data,
        budget=ed.Budget(macs=0.5),
        method=method,
        rounds=2,
        epochs=2,
        finetuning=ed.FinetuneConfig(learning_rate=0.01),
        progress=False,
    )
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    report = trained.report
    assert len(report.rounds) == 2
    for one in report.rounds:
        assert one.finetuned is not None
        assert one.training is not None
        assert len(one.training.losses) == 2
        assert len(one.training.scores) == 3
        assert one.finetuned != one.untrained
    # Everything is held against the original, not against what a round began with.
    true = ed.evaluate(trained.model, data, reference=model, progress=False)
    assert report.final is report.finetuned
    assert report.final.divergence == pytest.approx(true.divergence)
    assert ed.count(trained.model, data).macs <= 0.5 * ed.count(model, data).macs


@pytest.mark.parametrize(("rounds", "of"), [(1, ""), (2, "round 1: ")])
def test_training_that_makes_it_worse_is_said_where_it_was_called_and_in_the_report(
    rounds: int, of: str
) -> None:
    model, data = network(), batches()
    ed.finetune(model, data, ed.FinetuneConfig(epochs=20), progress=False)
    with pytest.warns(UserWarning, match="worse on held-out data") as caught:
        result = ed.compress(
            model,
            data,
            budget=ed.Budget(macs=0.6),
            rounds=rounds,
            method="kron-obs",
            epochs=1,
            finetuning=ed.FinetuneConfig(learning_rate=30.0, schedule="constant", clip=None),
            progress=False,
        )
    assert {warning.filename for warning in caught} == {__file__}
    assert f"{of}{caught[0].message}" in result.report.notes


def test_one_round_without_training_is_compress() -> None:
    model, data = network(), batches()
    once, rounds = (
        ed.compress(
            model,
            data,
            budget=ed.Budget(macs=0.5),
            method="eigendamage",
            rounds=1,
            epochs=epochs,
            finetuning=ed.FinetuneConfig(learning_rate=1e-12, weight_decay=0.0) if epochs else None,
            progress=False,
        )
        for epochs in (0, 1)
    )
    assert rounds.plan == once.plan
    assert rounds.report.rounds[0].untrained == once.report.final


def test_data_without_labels_is_distilled() -> None:
    model = network()
    data = [x for x, _ in batches(6)]
    result = ed.compress(
        model,
        data,
        budget=ed.Budget(macs=0.4),
        method="eigendamage",
        epochs=4,
        finetuning=ed.FinetuneConfig(learning_rate=0.02),
        progress=False,
    )
    untrained, tuned = result.report.rounds[0].untrained, result.report.finetuned
    assert tuned is not None
    assert tuned.divergence is not None
    assert untrained.divergence is not None
    assert tuned.divergence < untrained.divergence


def test_batches_are_dealt_out_so_that_every_one_trains_once() -> None:
    dealt = Dealt(range(7), 3)
    assert len(dealt) == 2
    passes = [list(dealt) for _ in range(4)]
    assert passes == [[0, 3], [1, 4], [2, 5], [0, 3]]
    with pytest.raises(ed.DataError, match="2 batches of training data cannot be split"):
        Dealt([1, 2], 3)


def test_what_is_ignored_is_ignored_in_every_round() -> None:
    result = ed.compress(
        network(),
        (batch for batch in batches()),
        budget=ed.Budget(params=0.6),
        method="eigendamage",
        rounds=2,
        ignore=iter(["0"]),
        progress=False,
    )
    for plan in (*result.earlier, result.plan):
        assert "0" not in plan.changed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"directory": "somewhere"}, "give epochs="),
        ({"polish": -1}, "polish is -1"),
        ({"rounds": 2, "train_data": [1]}, "train_data and finetuning are for training"),
        ({"epochs": 2, "finetuning": ed.FinetuneConfig(epochs=3)}, "give it once"),
        ({"epochs": 1, "finetuning": ed.FinetuneConfig(held_out=2.0)}, "held_out is 2"),
        ({"shots": 2, "epochs": 1, "method": "auto"}, "shots are not trained between"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], said: str) -> None:
    arguments = {"method": "eigendamage", "budget": ed.Budget(macs=0.5), **options}
    with pytest.raises(ed.EigenDamageError, match=said):
        ed.compress(network(), batches(), **arguments)  # type: ignore[arg-type]
