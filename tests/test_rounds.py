"""Several rounds: budgets spread, eigenbases merged, training shared out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import eigendamage as ed
from eigendamage.rounds import split_batches


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
    result = ed.compress_in_rounds(
        model, data, budget=budget, rounds=3, method=method, progress=False
    )
    before, after = ed.count(model, data), ed.count(result.model, data)
    whole = after.macs / before.macs if unit == "macs" else after.parameters / before.parameters
    assert whole <= 0.4 + 1e-9
    assert len(result.rounds) == 3
    left = 1.0
    for index, one in enumerate(result.rounds):
        sizes = getattr(one.compressed.plan, "macs" if unit == "macs" else "parameters")
        left *= sizes[1] / sizes[0]
        assert left <= 0.4 ** ((index + 1) / 3) + 1e-9
        assert one.tuned is None


def test_training_between_rounds_changes_the_result_and_leaves_the_input_alone() -> None:
    model, data = network(), batches(6)
    weights = copy.deepcopy(model.state_dict())
    untrained, trained = (
        ed.compress_in_rounds(
            model,
            data,
            budget=ed.Budget(macs=0.5),
            method="eigendamage",
            rounds=2,
            train_data=train,
            finetuning=ed.FinetuneConfig(epochs=2),
            progress=False,
        )
        for train in (None, data)
    )
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert [r.tuned is None for r in untrained.rounds] == [True, True]
    assert all(r.tuned is not None and r.tuned.divergence for r in trained.rounds)
    # The untouched result of surgery is handed out too, not the trained model under its name.
    first = trained.rounds[0].compressed
    assert all(
        torch.equal(v, first.model.state_dict()[k])
        for k, v in untrained.rounds[0].compressed.model.state_dict().items()
    )
    x = data[0][0]
    assert not torch.allclose(untrained.model(x), trained.model(x))


def test_one_round_is_compress() -> None:
    model, data = network(), batches()
    once = ed.compress(
        model, data, budget=ed.Budget(macs=0.5), method="eigendamage", progress=False
    )
    rounds = ed.compress_in_rounds(
        model, data, budget=ed.Budget(macs=0.5), method="eigendamage", rounds=1, progress=False
    )
    assert rounds.rounds[0].compressed.plan == once.plan
    x = data[0][0]
    assert torch.equal(once.model(x), rounds.model(x))


def test_every_batch_trains_in_one_round_only_and_every_pass_is_a_new_one() -> None:
    parts = split_batches(range(7), 3)
    assert [list(part) for part in parts] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [len(part) for part in parts] == [3, 2, 2]
    images = ed.zoo.ImageSet(torch.randn(12, 1, 8, 8)).batches(3, shuffle_seed=0, augment=True)
    share = split_batches(images, 2)[0]
    first, second = list(share), list(share)
    assert not torch.equal(first[0], second[0]), "augmented anew in each epoch"
    with pytest.raises(ed.DataError, match="2 batches of training data cannot be split"):
        split_batches([1, 2], 3)


def test_what_is_ignored_is_ignored_in_every_round() -> None:
    result = ed.compress_in_rounds(
        network(),
        (batch for batch in batches()),
        budget=ed.Budget(params=0.6),
        method="eigendamage",
        rounds=2,
        ignore=iter(["0"]),
        progress=False,
    )
    for one in result.rounds:
        assert "0" not in one.compressed.plan.changed


def test_no_round_is_refused() -> None:
    with pytest.raises(ed.EigenDamageError, match="rounds is 0"):
        ed.compress_in_rounds(
            network(), batches(), budget=ed.Budget(macs=0.5), method="eigendamage", rounds=0
        )
