"""Datasets of columns as batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import eigendamage as ed

datasets = pytest.importorskip("datasets", reason="datasets is not installed")


class _Two(nn.Module):
    """Two inputs, of which one may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h if scale is None else h * scale.unsqueeze(1))


def _dataset(**more: Any) -> Any:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    return datasets.Dataset.from_dict(
        {"x": x.tolist(), "label": [n % 3 for n in range(20)], **more}
    )


def test_columns_go_to_the_arguments_of_their_names() -> None:
    data = _dataset(scale=[0.5] * 20, text=["a"] * 20, index=list(range(20)))
    batches = ed.column_batches(data, _Two(), batch_size=8)
    assert len(batches) == 3
    found = list(batches)
    assert [b["x"].shape for b in found] == [(8, 6), (8, 6), (4, 6)]
    assert all(b.keys() == {"x", "scale", "label"} for b in found)
    assert torch.cat([b["label"] for b in found]).tolist() == data["label"][:]
    again = torch.cat([b["x"] for b in batches])
    torch.testing.assert_close(again, torch.tensor(data["x"][:]))


def test_a_lone_column_of_numbers_is_the_input() -> None:
    data = _dataset(text=["a"] * 20).rename_column("x", "pixels")
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    assert [list(b) for b in ed.column_batches(data, model)] == [["pixels", "label"]]
    assert ed.evaluate(model, ed.column_batches(data, model), progress=False).accuracy is not None


@pytest.mark.parametrize("form", ["dataset", "streamed", "loader", "generator", "torch"])
def test_compress_takes_the_same_data_in_any_form(form: str) -> None:
    torch.manual_seed(0)
    model, data = _Two().eval(), _dataset()
    x, y = torch.tensor(data["x"][:]), torch.tensor(data["label"][:])
    plain: Any = [(x, y)]
    given: Any = {
        "dataset": lambda: data,
        "streamed": data.to_iterable_dataset,
        "loader": lambda: DataLoader(TensorDataset(x, y), batch_size=20),
        "generator": lambda: (batch for batch in plain),
        "torch": lambda: TensorDataset(x, y),
    }[form]()
    options: Any = {"budget": ed.Budget(macs=0.6), "method": "eigendamage", "progress": False}
    expected = ed.compress(model, plain, **options)
    found = ed.compress(model, given, **options)
    assert found.plan == expected.plan
    assert found.report.final == expected.report.final
    assert found.report.final.accuracy is not None


def test_columns_that_do_not_fit_are_named_with_what_forward_takes() -> None:
    text = datasets.Dataset.from_dict({"text": ["a", "b"], "index": [0, 1]})
    words = r"'text' \(str\), 'index' \(int64\).*_Two.forward takes 'x', 'scale'"
    with pytest.raises(ed.DataError, match=words):
        ed.column_batches(text.add_column("more", [1, 2]), _Two())
    without = _dataset(scale=[1.0] * 20).remove_columns("x")
    with pytest.raises(ed.DataError, match="forward takes"):
        ed.compress(_Two(), without, budget=ed.Budget(macs=0.5))
    renamed = _dataset(other=[1.0] * 20).rename_column("x", "pixels")
    chosen = {"pixels": "x", "label": "labels"}
    (batch,) = ed.column_batches(renamed, _Two(), columns=chosen)
    assert batch.keys() == {"x", "labels"}
    ragged = datasets.Dataset.from_dict({"x": [[1.0], [1.0, 2.0]]})
    with pytest.raises(ed.DataError, match=r"'x' .*different shapes, such as \(1,\), \(2,\)"):
        list(ed.column_batches(ragged, _Two()))
    with pytest.raises(ed.DataError, match="'text' of the dataset holds str"):
        list(ed.column_batches(text, _Two(), columns={"text": "x"}))
    with pytest.raises(ed.DataError, match="no example"):
        ed.column_batches(_dataset().select([]), _Two())
    with pytest.raises(ed.DataError, match="batch_size is 0"):
        ed.column_batches(_dataset(), _Two(), batch_size=0)


@pytest.mark.parametrize("streamed", [False, True])
def test_several_splits_are_refused_with_their_names(streamed: bool) -> None:
    one = _dataset().to_iterable_dataset() if streamed else _dataset()
    kind = datasets.IterableDatasetDict if streamed else datasets.DatasetDict
    splits = kind({"train": one, "test": one})
    told = rf"a {kind.__name__} of the splits 'train', 'test'; give .* dataset\['train'\]"
    with pytest.raises(ed.DataError, match=told):
        ed.compress(_Two(), splits, budget=ed.Budget(macs=0.5), progress=False)
    with pytest.raises(ed.DataError, match=told):
        ed.column_batches(splits, _Two())
    with pytest.raises(ed.DataError, match="give column_batches"):
        ed.export(_Two(), "no.onnx", splits, progress=False)


def test_columns_that_cannot_be_read_are_named() -> None:
    data = _dataset(weight=[None, *[[1.0]] * 19])
    with pytest.raises(ed.DataError, match=r"columns 'x', 'label', 'weight' cannot be read"):
        ed.column_batches(data, _Two())
    later = _dataset(weight=[*[[1.0]] * 16, None, *[[1.0]] * 3])
    batches = ed.column_batches(later, _Two(), batch_size=8)
    with pytest.raises(ed.DataError, match=r"cannot be read as tensors: .*select_columns"):
        list(batches)
    with pytest.raises(
        ed.DataError, match=r"columns= names 'y'; the dataset has .*'x' \(float32\)"
    ):
        ed.column_batches(_dataset(), _Two(), columns={"y": "x"})


def test_without_a_model_columns_are_refused_with_what_to_do() -> None:
    for data in (_dataset(), _dataset().to_iterable_dataset()):
        with pytest.raises(ed.DataError, match="column_batches"):
            ed.estimate_curvature(_Two(), data, progress=False)


def test_a_part_is_held_out_of_a_dataset_but_not_of_a_stream() -> None:
    data = ed.column_batches(_dataset(), _Two(), batch_size=5)
    rest, held = data.holding_out(0.25, seed=1)
    assert (len(rest), len(held)) == (3, 1)
    rows = torch.cat([b["x"] for b in (*rest, *held)])
    assert sorted(rows.tolist()) == sorted(_dataset()["x"][:])
    stream = ed.column_batches(_dataset().to_iterable_dataset(), _Two())
    with pytest.raises(ed.DataError, match="streamed dataset cannot be divided"):
        stream.holding_out(0.25, seed=1)
    with pytest.raises(ed.DataError, match="too few"):
        ed.column_batches(_dataset(), _Two()).holding_out(0.99, seed=1)


def test_a_transform_of_the_dataset_s_own_is_kept() -> None:
    data = _dataset()
    data.set_transform(lambda raw: {"x": [2 * torch.tensor(row) for row in raw["x"]]})
    (batch,) = ed.column_batches(data, _Two())
    torch.testing.assert_close(batch["x"], 2 * torch.tensor(_dataset()["x"][:]))
