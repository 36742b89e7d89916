"""Curvatures and plans know the weights that they are of, not their shapes alone."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eigendamage as ed
from eigendamage.curvature import Curvature, estimate_curvature, load_curvature, save_curvature
from eigendamage.errors import FileFormatError, MismatchError
from eigendamage.layers import Layer, require_known, sketch_of
from eigendamage.layers._find import find_layers
from eigendamage.layers._sketch import moved
from eigendamage.plan import Budget, Plan, make_menus, make_plan
from eigendamage.surgery import apply_plan


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1))
    return nn.Sequential(
        *layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    )


def _curvature(model: nn.Module) -> Curvature:
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return estimate_curvature(model, [images], also=("patches",), progress=False)


def _moved(model: nn.Module, by: float) -> nn.Module:
    """The model with each weight moved by a fraction of its norm."""
    other = copy.deepcopy(model)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            step = torch.randn(weight.shape, generator=draws)
            weight.add_(step, alpha=float(by * weight.norm() / step.norm()))
    return other


@pytest.mark.parametrize("method", ["auto", "eigendamage"])
def test_a_curvature_of_another_model_with_the_same_shapes_is_refused(method: str) -> None:
    curvature = _curvature(_network(0))
    with pytest.raises(MismatchError, match=r"layer '0'.*other weights.*another model"):
        make_plan(_network(1), curvature, Budget(macs=0.6), method=method, progress=False)


def test_so_is_a_plan_and_with_it_a_curvature_that_fits(tmp_path: Path) -> None:
    model, other = _network(0), _network(1)
    mine, its = _curvature(model), _curvature(other)
    make_plan(model, mine, Budget(macs=0.6), progress=False).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert isinstance(apply_plan(model, plan, mine), nn.Module)
    with pytest.raises(MismatchError, match="the shape that the plan is for"):
        apply_plan(other, plan, its)
    with pytest.raises(MismatchError, match="the shape that the curvature is for"):
        apply_plan(model, plan, its)


def test_a_saved_curvature_keeps_knowing(tmp_path: Path) -> None:
    curvature = _curvature(_network(0))
    save_curvature(curvature, tmp_path / "curvature.safetensors")
    loaded = load_curvature(tmp_path / "curvature.safetensors")
    assert loaded.sketches == curvature.sketches
    with pytest.raises(MismatchError, match="other weights"):
        make_plan(_network(1), loaded, Budget(macs=0.6), progress=False)


def test_shards_of_two_models_do_not_merge() -> None:
    mine, its = _curvature(_network(0)), _curvature(_network(1))
    with pytest.raises(MismatchError, match=r"layer '0'.*the other curvature"):
        mine.merge(its)
    merged = dataclasses.replace(mine, sketches={}).merge(mine)
    assert merged.sketches == mine.sketches


def test_a_plan_sketches_each_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _network(0)
    curvature = _curvature(model)
    menus = make_menus(model, curvature)
    seen: list[int] = []

    def counted(weight: torch.Tensor) -> Any:
        seen.append(weight.numel())
        return sketch_of(weight)

    monkeypatch.setattr("eigendamage.plan._matching.sketch_of", counted)
    make_plan(model, curvature, Budget(macs=0.6), menus=menus, progress=False)
    assert len(seen) == 3


def test_a_basis_of_another_model_is_refused() -> None:
    images = [torch.randn(4, 3, 8, 8)]
    with pytest.raises(MismatchError, match="layer '0'"):
        estimate_curvature(_network(1), images, basis=_curvature(_network(0)), progress=False)


def test_weights_that_moved_a_little_are_taken_and_told_of() -> None:
    model = _network(0)
    curvature = _curvature(model)
    near = make_plan(_moved(model, 0.2), curvature, Budget(macs=0.6), progress=False)
    (note,) = [note for note in near.notes if "have changed since" in note]
    assert "3 of 3 layers" in note
    for same in (model, copy.deepcopy(model).double(), copy.deepcopy(model).bfloat16().float()):
        plan = make_plan(same, curvature, Budget(macs=0.6), progress=False)
        assert not any("have changed since" in note for note in plan.notes)


def test_compress_refuses_it_before_it_calibrates() -> None:
    model = _network(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = [torch.randn(8, 3, 8, 8)]
    with pytest.raises(MismatchError, match="another model"):
        ed.compress(model, images, budget=ed.Budget(macs=0.6), curvature=_curvature(_network(0)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 3, 1), (16, 3, 9), (64, 64, 9)])
@pytest.mark.parametrize("seed", range(5))
def test_the_distance_is_near_to_the_true_one(shape: tuple[int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(shape[1], shape[0], round(shape[2] ** 0.5)))
    moved = _moved(model, 0.2)
    layer, before = _only_layer(moved), _only_layer(model)
    distance = require_known(layer, sketch_of(before.weight()), "curvature")
    true = float((layer.weight() - before.weight()).norm() / before.weight().norm())
    assert 0.4 * true < distance < 1.8 * true


def _only_layer(model: nn.Module) -> Layer:
    (layer,) = find_layers(model).compressible.values()
    return layer


@pytest.mark.parametrize("seed", range(5))
def test_strangers_are_far_though_all_their_weights_are_positive(seed: int) -> None:
    torch.manual_seed(seed)
    one, other = nn.Linear(64, 64), nn.Linear(64, 64)
    for module in (one, other):
        nn.init.uniform_(module.weight, 0.0, 1.0)
    sketch = sketch_of(_only_layer(nn.Sequential(one)).weight())
    # What the two have in common, their mean, makes most of both.
    assert _distance(nn.Sequential(other), sketch) > 0.4
    with torch.no_grad():
        one.weight.mul_(0.9)  # as weight decay does
    assert 0.05 < _distance(nn.Sequential(one), sketch) < 0.2


def _distance(model: nn.Module, sketch: Any) -> float:
    return moved(sketch, sketch_of(_only_layer(model).weight()) or ())


@pytest.mark.parametrize("shape", [(64, 784), (784, 64), (10, 128), (1024, 64), (64, 1021)])
@pytest.mark.parametrize("side", ["rows", "columns", "sum to zero", "scale"])
def test_changes_of_any_structure_are_seen_as_large_as_they_are(
    shape: tuple[int, int], side: str
) -> None:
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=draws) + 0.5
    changes = {
        "rows": torch.randn(shape[0], 1, generator=draws).expand(shape),
        "columns": torch.randn(1, shape[1], generator=draws).expand(shape),
        "sum to zero": torch.randn(*shape, generator=draws),
        "scale": weight,
    }
    change = changes[side]
    if side == "sum to zero":  # as those of the layer before a softmax do
        change = change - change.mean(0, keepdim=True)
    change = change * (0.1 * weight.norm() / change.norm())
    before, now = (sketch_of(w[:, :, None]) or () for w in (weight, weight + change))
    assert moved(before, now) == pytest.approx(0.1, rel=0.6)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_weights_that_were_all_alike_may_have_moved(value: float) -> None:
    layer = nn.Linear(32, 32)
    nn.init.constant_(layer.weight, value)
    sketch = sketch_of(_only_layer(nn.Sequential(layer)).weight())
    with torch.no_grad():
        layer.weight.add_(torch.randn(32, 32), alpha=0.01)
    distance = require_known(_only_layer(nn.Sequential(layer)), sketch, "curvature")
    assert distance == (1.0 if value == 0 else pytest.approx(0.01, rel=0.5))


@pytest.mark.parametrize("sketch", [[], [1.0], [1.0] * 34, [float("nan")] * 33, ["x"] * 33])
def test_a_sketch_that_is_none_is_refused_with_its_file(sketch: list[Any], tmp_path: Path) -> None:
    model = _network(0)
    curvature = _curvature(model)
    path = tmp_path / "plan.json"
    make_plan(model, curvature, Budget(macs=0.6), progress=False).save(path)
    told = json.loads(path.read_text())
    told["layers"]["0"]["sketch"] = sketch
    path.write_text(json.dumps(told))
    with pytest.raises(FileFormatError, match="sketch"):
        Plan.load(path)


def test_a_sketch_beyond_all_numbers_is_a_stranger() -> None:
    layer = _only_layer(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(MismatchError, match="far away"):
        require_known(layer, (1e308,) * 33, "plan")


def test_weights_too_large_for_a_norm_have_no_sketch() -> None:
    assert sketch_of(torch.full((4, 4, 1), 3e38)) is None
    assert sketch_of(torch.zeros(4, 4, 1)) == (0.0,) * 33
