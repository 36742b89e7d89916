"""Models and data of a kind that users bring and that nothing was written for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.layers import find_layers

BUDGET = ed.Budget(macs=0.6)


class Remembers(nn.Module):
    """It keeps what it computed, as many do to look at it later."""

    def __init__(self, *, in_a_list: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 64), nn.ReLU())
        self.more, self.head = nn.Linear(64, 64), nn.Linear(64, 5)
        self.in_a_list = in_a_list
        self.features: Any = None

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        self.features = [features] if self.in_a_list else features
        return self.head(torch.relu(self.more(features)))


class Spectral(nn.Module):
    """It mixes frequencies by a layer of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 64), nn.Linear(64, 5)
        self.mixing = nn.Linear(33, 33, dtype=torch.cfloat)
        self.middle = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.fft.irfft(self.mixing(torch.fft.rfft(torch.relu(self.first(x)))), n=64)
        return self.last(torch.relu(self.middle(mixed)))


def plain() -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    return nn.Sequential(*layers).eval()


def batches(size: int = 16) -> list[Tensor]:
    return [torch.randn(size, 12, generator=torch.Generator().manual_seed(i)) for i in range(6)]


@pytest.mark.parametrize("in_a_list", [False, True])
@pytest.mark.parametrize("method", ["auto", "kron-obs", "magnitude"])
def test_a_model_may_keep_what_it_computed(method: str, in_a_list: bool) -> None:
    torch.manual_seed(0)
    model = Remembers(in_a_list=in_a_list).eval()
    small = ed.compress(model, batches(), budget=BUDGET, method=method, progress=False)
    assert small.plan.left("macs") <= 0.6
    assert small.model(batches()[0]).shape == (16, 5)


@pytest.mark.parametrize("method", ["auto", "eigendamage"])
def test_a_complex_layer_is_left_alone(method: str) -> None:
    torch.manual_seed(0)
    model = Spectral().eval()
    assert "complex" in find_layers(model).left_alone["mixing"]
    small = ed.compress(model, batches(), budget=ed.Budget(macs=0.8), method=method, progress=False)
    assert torch.equal(small.model.get_submodule("mixing").weight, model.mixing.weight)
    assert bool(torch.isfinite(small.model(batches()[0])).all())


def _endless(drawn: list[int]) -> Iterator[Tensor]:
    for number in count():
        assert number < 50, "it is drawn without end"
        drawn.append(number)
        yield torch.randn(16, 12, generator=torch.Generator().manual_seed(number))


def test_of_endless_data_no_more_is_drawn_than_is_asked_for() -> None:
    drawn: list[int] = []
    small = ed.compress(plain(), _endless(drawn), budget=BUDGET, max_examples=100, progress=False)
    assert small.plan.left("macs") <= 0.6
    assert len(drawn) == 7
    ed.estimate_curvature(plain(), _endless(drawn), max_examples=16, progress=False)
    assert len(drawn) == 8
    assert ed.evaluate(plain(), _endless(drawn), max_examples=20, progress=False).examples == 20
    assert len(drawn) == 10


@pytest.mark.parametrize("bad", [torch.randn(16, 11), torch.zeros(16, 12).long()])
@pytest.mark.parametrize("at", [1, 2, 5, 6])
@pytest.mark.parametrize("method", ["auto", "eigendamage"])
def test_a_later_batch_that_does_not_fit_is_named(method: str, bad: Tensor, at: int) -> None:
    data = [*batches()[:at], bad, *batches()[at:]]
    with pytest.raises(ed.DataError, match=rf"cannot run on inputs of shape .* \(batch {at}\)"):
        ed.compress(plain(), data, budget=BUDGET, method=method, progress=False)


def test_so_is_one_of_training_and_of_measuring() -> None:
    data = [*batches()[:2], torch.randn(16, 11)]
    labelled = [(x, torch.zeros(16, dtype=torch.long)) for x in data]
    with pytest.raises(ed.DataError, match=r"\(16, 11\) \(batch 2\)"):
        ed.finetune(plain(), labelled, ed.FinetuneConfig(held_out=0.0), progress=False)
    with pytest.raises(ed.LayerError, match=r"\(16, 11\) \(batch 2\).*form that the model takes"):
        ed.evaluate(plain(), data, progress=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_plain_values_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.ones(3, 12), torch.ones(2, 12)])
    sparse = torch.eye(12).to_sparse()
    for odd in (sparse, torch.ones(4, 12, device="meta"), nested, (torch.ones(12, 12), sparse)):
        with pytest.raises(ed.DataError, match="batch 0 holds a tensor that is"):
            ed.compress(plain(), [odd], budget=BUDGET, progress=False)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ed.EigenDamageError, match="Module was expected, found function"):
        ed.compress(lambda x: x, batches(), budget=BUDGET, progress=False)  # type: ignore[arg-type]


def test_a_comparison_refuses_what_would_fail_in_every_row() -> None:
    labels = torch.zeros(16, dtype=torch.long)
    shown = [(x, labels) for x in batches()]
    with pytest.raises(ed.DataError, match="have no labels"):
        ed.compare(
            plain(), batches(), eval_data=shown, train_data=batches, epochs=1, progress=False
        )
    with pytest.raises(ed.BudgetError, match=r"a budget is 0\.5"):
        ed.sweep(plain(), batches(), budgets=[0.5], progress=False)  # type: ignore[list-item]
    with pytest.raises(ed.DataError, match="returned a generator"):
        ed.compare(
            plain(),
            batches(),
            eval_data=shown,
            train_data=lambda: (pair for pair in shown),
            epochs=1,
            progress=False,
        )
    with pytest.raises(ed.BudgetError, match="unit is 'bananas'"):
        ed.compare(plain(), batches(), eval_data=shown, unit="bananas", progress=False)  # type: ignore[arg-type]


def test_what_is_measured_has_to_be_a_model() -> None:
    with pytest.raises(ed.EigenDamageError, match="found str"):
        ed.evaluate("a", batches())  # type: ignore[arg-type]


def test_a_reduction_that_is_none_is_refused() -> None:
    with pytest.raises(ed.LossError, match="reduction is 'x'"):
        ed.compress(plain(), batches(), budget=BUDGET, reduction="x", progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("training.pt", lambda path: path.write_bytes(path.read_bytes()[:999]), "state of a train"),
        ("training.pt", lambda path: path.write_bytes(path.read_bytes()[:-999]), "state of a tr"),
        ("untrained.safetensors", lambda path: path.write_bytes(b""), "whole safetensors"),
        ("untrained.safetensors", lambda path: path.unlink(), "Remove that folder"),
        ("curvature.safetensors", lambda path: path.write_bytes(b""), "Remove that folder"),
        ("plan.json", lambda path: path.unlink(), "Remove that folder"),
    ],
)
def test_a_folder_of_rounds_with_a_spoilt_file_is_refused_by_its_name(
    name: str, spoil: Any, said: str, tmp_path: Path
) -> None:
    labelled = [(x, torch.zeros(16, dtype=torch.long)) for x in batches()]

    def run(data: list[Tensor]) -> ed.Compressed:
        return ed.compress(
            plain(),
            data,
            budget=BUDGET,
            method="eigendamage",
            rounds=2,
            epochs=1,
            train_data=labelled,
            directory=tmp_path,
            progress=False,
        )

    run(batches())
    later = [*batches()[:-1], batches()[-1] * 5]
    with pytest.raises(ed.MismatchError, match="the data was"):
        run(later)
    spoil(tmp_path / "round-1" / name)
    with pytest.raises(ed.EigenDamageError, match=f"(?s){name}.*{said}|{said}.*{name}"):
        run(batches())
