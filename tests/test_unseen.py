"""What a report cannot measure is said in its notes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed


class TwoHeads(nn.Module):
    """Classes by some inputs, a box by others, from one trunk."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.trunk = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
        self.classes, self.box = nn.Linear(48, 3), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.trunk(x)
        classes, box = self.classes(h), self.box(h)
        return (classes, box) if self.form == "tuple" else {"logits": classes, "box": box}


@pytest.mark.parametrize(("form", "name"), [("tuple", "1"), ("dict", "'box'")])
def test_an_output_that_the_loss_is_not_of_is_told_with_how_far_it_moved(
    form: str, name: str
) -> None:
    torch.manual_seed(0)
    model = TwoHeads(form).eval()
    data = list(torch.randn(120, 8).split(20))
    result = ed.compress(model, data, budget=ed.Budget(macs=0.5), progress=False)
    (note,) = [note for note in result.report.notes if "the loss is not taken of" in note]
    assert f"output {name}, which moved by" in note
    with torch.no_grad():
        before, after = (
            (out[1] if form == "tuple" else out["box"])
            for out in (model(data[0]), result.model(data[0]))
        )
    spread = (before - before.mean(0)).norm()
    found = re.search(r"moved by ([\d.]+)%", note)
    assert found is not None
    assert float(found[1]) == pytest.approx(100 * float((after - before).norm() / spread), abs=0.1)


@dataclass
class Found:
    logits: Tensor
    balance: Tensor


class Scalar(nn.Module):
    """Classes, and a number that does not differ between examples, in an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Found:
        h = self.trunk(x)
        return Found(self.head(h), h.mean())


def test_a_number_moves_by_so_much_in_steps_or_rounds_too() -> None:
    torch.manual_seed(0)
    data = list(torch.randn(120, 8).split(20))
    for shots in (1, 2):
        result = ed.compress(
            Scalar().eval(), data, budget=ed.Budget(macs=0.5), shots=shots, progress=False
        )
        (note,) = [note for note in result.report.notes if "not taken of" in note]
        assert re.search(r"output 'balance', which moved by \d\.?[\de-]* \(root", note)


def test_all_outputs_in_one_tensor_are_seen() -> None:
    class Joined(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(self.inner(x), 1)

    torch.manual_seed(0)
    model = Joined(TwoHeads("tuple")).eval()
    data = list(torch.randn(120, 8).split(20))
    result = ed.compress(model, data, budget=ed.Budget(macs=0.5), loss="mse", progress=False)
    assert not [note for note in result.report.notes if "not taken of" in note]
    assert len(result.model.inner(data[0])) == 2


def test_values_at_padding_are_told() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])

    torch.manual_seed(0)
    padding = torch.arange(4)[None].expand(20, 4) >= 3
    data = [{"x": torch.randn(20, 4, 8), "padding": padding} for _ in range(6)]
    options: dict[str, Any] = {"budget": ed.Budget(macs=0.7), "progress": False}
    model = Padded().eval()
    result = ed.compress(model, data, actions=("low-rank",), **options)
    assert any("'encoder' no longer packs" in note for note in result.report.notes)
    narrow = ed.compress(model, data, actions=("channels",), **options)
    assert not any("packs" in note for note in narrow.report.notes)


class ReadsAWeight(nn.Module):
    """Takes a layer's weight, or only its type, outside of the layer."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.pre, self.a = nn.Linear(8, 48), nn.Linear(48, 48)
        self.b, self.head = nn.Linear(48, 48), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.pre(x))
        if self.what == "dtype":
            x = x.to(self.a.weight.dtype).type_as(self.a.weight)
        x = torch.relu(self.a(x))
        if self.what == "values":
            x = torch.nn.functional.linear(x, self.a.weight.t())
        return self.head(torch.relu(self.b(x)))


def test_a_layer_whose_weight_is_read_past_its_forward_is_left_alone() -> None:
    torch.manual_seed(0)
    model = ReadsAWeight("values").eval()
    data = list(torch.randn(120, 8).split(20))
    for method in ("auto", "eigendamage"):
        result = ed.compress(model, data, budget=ed.Budget(macs=0.9), method=method, progress=False)
        assert "read directly" in result.report.left_alone["a"]
        before, after = result.report.macs
        assert after == ed.count(result.model, data).macs <= 0.9 * before
        assert not [note for note in result.report.notes if "the budget of" in note]


def test_a_model_larger_than_its_budget_because_of_what_it_reads_says_so() -> None:
    torch.manual_seed(0)
    model = ReadsAWeight("dtype").eval()
    data = list(torch.randn(120, 8).split(20))
    result = ed.compress(
        model, data, budget=ed.Budget(macs=0.5), actions=["low-rank"], progress=False
    )
    assert "a" not in result.report.left_alone
    assert result.report.macs[1] > 0.5 * result.report.macs[0]
    (note,) = [note for note in result.report.notes if "above the budget of 0.5" in note]
    assert note.startswith(f"the model has {result.report.macs[1] / result.report.macs[0]:.4g}")


def test_a_model_far_below_its_budget_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    ).eval()
    data = list(torch.randn(40, 3, 8, 8).split(10))
    result = ed.compress(
        model, data, budget=ed.Budget(macs=0.6), method="slimming", progress=False
    )  # every scale is 1
    left = result.report.macs[1] / result.report.macs[0]
    assert left < 0.3
    assert [n for n in result.report.notes if f"{left:.3g} of the macs, far below" in n]
