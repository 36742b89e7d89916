"""Compression in place: what stays, what is replaced, and what optimizers hold after it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import eigendamage as ed
from eigendamage.integrations._adopt import adopt, predecessor
from eigendamage.integrations._live import LiveRounds, moments_of, some_batches

_FEW = partial(ed.compress, method="eigendamage", progress=False)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)),
    )


def _inputs() -> list[Tensor]:
    return list(torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(3)).split(16))


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Weights with decay and biases without, one step done."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    _step(model, optimizer)
    return optimizer


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(_inputs()[0]), torch.arange(16) % 4)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("method", ["auto", "eigendamage", "kron-obs"])
def test_the_module_stays_and_returns_what_the_compressed_one_does(
    method: str, tmp_path: Path
) -> None:
    model = _network()
    optimizer = _optimizer(model)
    first, head = model[0], model[-1].weight
    state = optimizer.state[head]["exp_avg"].clone()
    model.eval()
    result = ed.compress(
        model, _inputs(), budget=ed.Budget(macs=0.5), method=method, progress=False
    )
    adopt(model, result, [optimizer])
    # It is saved like what compress returned, plan and report included.
    for name, each in (("live", model), ("result", result)):
        ed.save(each, tmp_path / name)
    loaded = ed.load(_network(), tmp_path / "live")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    for file in ("structure.json", "plan.json", "report.json"):
        assert (tmp_path / "live" / file).read_bytes() == (tmp_path / "result" / file).read_bytes()
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(model(x), result.model(x))
    assert model.state_dict().keys() == result.model.state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == result.report.parameters[1]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len({id(p) for p in held})
    assert all(p.ndim > 1 for p in optimizer.param_groups[0]["params"])
    assert all(p.ndim == 1 for p in optimizer.param_groups[1]["params"])
    if model[-1].weight is head:
        torch.testing.assert_close(optimizer.state[head]["exp_avg"], state)
    assert all(any(p is q for q in held) for p in optimizer.state)
    if isinstance(model[0], nn.Conv2d):
        assert model[0] is first
        assert model[0].out_channels == model[0].weight.shape[0]
    model.train()
    losses = [_step(model, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert all(p in optimizer.state for p in held)


def test_what_is_frozen_stays_frozen_and_out_of_the_optimizer() -> None:
    model = _network()
    model[3].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    result = _FEW(model.eval(), _inputs(), budget=ed.Budget(macs=0.5))
    assert "3" in result.plan.changed
    adopt(model, result, [optimizer])
    assert not any(p.requires_grad for p in model[3].parameters())
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_names_that_an_optimizer_keeps_go_with_the_parameters() -> None:
    model = nn.ModuleDict({"net": _network()})
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    net = model["net"].eval()
    adopt(net, _FEW(net, _inputs(), budget=ed.Budget(macs=0.5)), [optimizer])
    (group,) = optimizer.param_groups
    named = dict(model.named_parameters())
    assert sorted(group["param_names"]) == sorted(named)
    assert all(named[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))


def test_lbfgs_is_refused_before_anything_is_changed() -> None:
    model = _network().eval()
    result = _FEW(model, _inputs(), budget=ed.Budget(macs=0.5))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ed.EigenDamageError, match="LBFGS"):
        adopt(model, result, [torch.optim.LBFGS(model.parameters())])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_masks_are_refused_before_anything_is_changed() -> None:
    model = _network().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = ed.compress(
        model, _inputs(), budget=ed.Budget(ratio=0.5), method="obd", progress=False
    )
    with pytest.raises(ed.EigenDamageError, match="'obd' masks weights"):
        adopt(model, result, [])
    assert all(torch.equal(value, model.state_dict()[k]) for k, value in before.items())


def test_every_parameter_takes_the_place_of_one() -> None:
    before = {"a.weight": nn.Parameter(), "a.bias": nn.Parameter(), "b.weight": nn.Parameter()}
    assert predecessor("a.weight", before) == "a.weight"
    assert predecessor("a.0.weight", before) == "a.weight"
    assert predecessor("a.1.bias", before) == "a.bias"
    assert predecessor("b.1.bias", before) == "b.weight"
    with pytest.raises(ed.EigenDamageError, match=r"'c\.weight'"):
        predecessor("c.weight", before)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("f.3.2.weight", "f.3.0.weight"),  # three stages where there were two
        ("f.3.2.bias", "f.3.1.bias"),
        ("f.3.weight", "f.3.0.weight"),  # one again
        ("f.3.bias", "f.3.1.bias"),
        ("f.4.bias", "f.4.weight"),  # which had none: not the neighbour's
    ],
)
def test_stages_take_the_place_of_other_stages_of_the_same_layer(name: str, of: str) -> None:
    names = ("f.0.weight", "f.0.bias", "f.3.0.weight", "f.3.1.weight", "f.3.1.bias", "f.4.weight")
    assert predecessor(name, {known: nn.Parameter(torch.zeros(1)) for known in names}) == of


def test_rounds_spread_a_budget_as_compress_does() -> None:
    model = _network()
    before = ed.count(model.eval(), _inputs())
    rounds = LiveRounds(ed.Budget(macs=0.36), (5, 2), _FEW)
    model.train()
    model[1].eval()
    assert [n for n in range(7) if rounds.due(n)] == [2, 3, 4, 5, 6]
    first = rounds.take(model, _inputs(), [])
    assert first.budget == "macs 0.6"
    assert [n for n in range(7) if rounds.due(n)] == [5, 6]
    assert [m.training for m in model[:3]] == [True, False, True]
    with pytest.warns(UserWarning, match=r"1 of 2 rounds, .* at \[5\]"):
        rounds.end()
    rounds.take(model, _inputs(), [])
    after = ed.count(model.eval(), _inputs())
    assert after.macs <= 0.36 * before.macs
    assert rounds.left["macs"] == pytest.approx(after.macs / before.macs)
    assert not any(rounds.due(n) for n in range(9))
    rounds.end()


def test_rounds_at_no_step_are_refused() -> None:
    for moments in ((), (0, 1), (2, 2)):
        with pytest.raises(ed.EigenDamageError, match="at_steps"):
            LiveRounds(ed.Budget(macs=0.5), moments, _FEW)
    with pytest.raises(ed.EigenDamageError, match="not both"):
        moments_of([1], [1])


class _Stream(IterableDataset[Tensor]):
    def __iter__(self):
        return iter(torch.arange(6.0))


def test_batches_are_drawn_beside_a_loader() -> None:
    data = TensorDataset(torch.arange(20.0))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    state = torch.random.get_rng_state()
    drawn = some_batches(loader, 2, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(b[0]) for b in drawn] == [4, 4]
    assert len({float(x) for b in drawn for x in b[0]}) == 8
    again = some_batches(loader, 2, seed=0)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(drawn, again, strict=True))
    assert not torch.equal(some_batches(loader, 2, seed=1)[0][0], drawn[0][0])
    grouped = DataLoader(data, batch_sampler=[[0, 1, 2], [5]])
    assert [b[0].tolist() for b in some_batches(grouped, 5, seed=0)] == [[0, 1, 2], [5]]
    streamed = some_batches(DataLoader(_Stream(), batch_size=4), 5, seed=0)
    assert [b.tolist() for b in streamed] == [[0, 1, 2, 3], [4, 5]]
    whole = some_batches(DataLoader(data, batch_size=None), 2, seed=0)
    assert [float(b[0]) for b in whole] == [0, 1]
    assert some_batches([1, 2, 3], 2, seed=0) == [1, 2]
    for nothing in (iter([1]), 3, []):
        with pytest.raises(ed.DataError, match="data="):
            some_batches(nothing, 2, seed=0)
