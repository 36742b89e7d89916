"""Capture leaves no trace, whatever the model does to its tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import eigendamage as ed
from eigendamage import (
    DataError,
    EigenDamageError,
    LayerError,
    MismatchError,
    NothingToCompressError,
    estimate_curvature,
)
from eigendamage.curvature import preserved_random_state
from tests.cases import CASES, Case, Residual


def test_leaves_no_trace(case: Case) -> None:
    model, (x, y) = case.model(), case.data(6)
    children = list(model.modules())
    children[-1].train()  # modes are each module's own
    first = next(model.parameters())
    first.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "wanted": [p.requires_grad for p in model.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
    }
    torch.manual_seed(3)
    np.random.seed(3)
    state = (torch.get_rng_state(), np.random.get_state()[1].tolist())
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    with torch.no_grad():  # the caller's own setting does not matter
        estimate_curvature(model, loader, progress=False)

    assert all(torch.equal(v, before["state"][k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == before["modes"]
    assert [p.requires_grad for p in model.parameters()] == before["wanted"]
    for p in model.parameters():
        assert (p.grad is None) == (not p.requires_grad)
        assert p.grad is None or torch.equal(p.grad, torch.ones_like(p))
    assert before["hooks"] == [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]


def test_random_states_are_preserved() -> None:
    state = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    with preserved_random_state():
        torch.rand(3), np.random.rand(3), random.random()
    assert random.getstate() == state[2]
    assert np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[0])


def test_leaves_no_trace_after_an_error() -> None:
    model = CASES["residual"].model().train()
    x, _ = CASES["residual"].data(4)

    def broken() -> Iterator[Tensor]:
        yield x
        raise RuntimeError("the disk is gone")

    class Source:
        def __iter__(self) -> Iterator[Tensor]:
            return broken()

    with pytest.raises(DataError, match="batch 1 with RuntimeError: the disk is gone") as told:
        estimate_curvature(model, Source(), progress=False)
    assert isinstance(told.value.__cause__, RuntimeError)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_frozen_model_has_the_same_curvature() -> None:
    case = CASES["residual"]
    x, _ = case.data(6)
    free = estimate_curvature(case.model(), [x], progress=False)
    frozen = estimate_curvature(case.model().requires_grad_(False), [x], progress=False)
    for name in free:
        torch.testing.assert_close(free[name].S, frozen[name].S)
        torch.testing.assert_close(free[name].eigenvalues, frozen[name].eigenvalues)


class _OutOfPlace(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=False)


def test_in_place_activations_change_nothing() -> None:
    case = CASES["residual"]
    x, _ = case.data(6)
    torch.manual_seed(0)
    plain = _OutOfPlace().double().eval()
    a = estimate_curvature(case.model(), [x], progress=False)
    b = estimate_curvature(plain, [x], progress=False)
    for name in a:
        torch.testing.assert_close(a[name].eigenvalues, b[name].eigenvalues)


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner[0](x)
        return checkpoint(self.inner[1:], x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant: bool) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)
    ).double()
    x = torch.randn(9, 5, dtype=torch.float64)
    plain = estimate_curvature(inner, [x], fisher="exact", progress=False)
    saved = estimate_curvature(
        _Checkpointed(inner, reentrant),
        [x],
        fisher="mc" if reentrant else "exact",
        progress=False,
    )
    if reentrant:  # it can be gone through backwards only once
        plain = estimate_curvature(inner, [x], fisher="mc", progress=False)
    for name in plain:
        found = saved[f"inner.{name}"]
        torch.testing.assert_close(found.A, plain[name].A)
        torch.testing.assert_close(found.S, plain[name].S)
        torch.testing.assert_close(found.eigenvalues, plain[name].eigenvalues)
        assert found.positions == plain[name].positions


def test_autocast_is_for_the_model_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))
    x = torch.randn(400, 64)
    plain = estimate_curvature(model, [x], progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = estimate_curvature(model, [x], progress=False)
    assert cast["0"].A.dtype == torch.float32
    # The first layer's input is the same; a bfloat16 product would be off by 1e-2.
    torch.testing.assert_close(cast["0"].A, plain["0"].A, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cast["2"].S, plain["2"].S, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_accumulators_are_at_least_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).to(dtype)
    c = estimate_curvature(model, [torch.randn(8, 4).to(dtype)], progress=False)["0"]
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in (c.S, c.A, c.mean, c.Q_S, c.eigenvalues)} == {wanted}


def test_channels_last_changes_nothing() -> None:
    case = CASES["residual"]
    x, _ = case.data(6)
    a = estimate_curvature(case.model(), [x], progress=False)
    b = estimate_curvature(
        case.model().to(memory_format=torch.channels_last),
        [x.contiguous(memory_format=torch.channels_last)],
        progress=False,
    )
    for name in a:
        torch.testing.assert_close(a[name].eigenvalues, b[name].eigenvalues)


def test_streaming_gives_the_same_in_several_passes() -> None:
    case = CASES["mixed"]
    model, (x, _) = case.model(), case.data(10)
    whole = estimate_curvature(model, x.split(4), progress=False)
    parts = estimate_curvature(model, x.split(4), layers_per_pass=2, progress=False)
    assert list(whole) == list(parts)
    for name in whole:
        torch.testing.assert_close(whole[name].S, parts[name].S)
        torch.testing.assert_close(whole[name].eigenvalues, parts[name].eigenvalues)


def test_a_generator_is_kept_for_the_second_pass() -> None:
    case = CASES["fc"]
    model, (x, _) = case.model(), case.data(10)
    a = estimate_curvature(model, list(x.split(4)), progress=False)
    b = estimate_curvature(model, (part for part in x.split(4)), progress=False)
    torch.testing.assert_close(a["0"].eigenvalues, b["0"].eigenvalues)
    assert b.examples == 10


def test_max_examples_cuts_the_last_batch() -> None:
    case = CASES["fc"]
    model, (x, y) = case.model(), case.data(10)
    data = list(zip(x.split(4), y.split(4), strict=True))
    cut = estimate_curvature(model, data, fisher="empirical", max_examples=6, progress=False)
    few = estimate_curvature(model, [(x[:6], y[:6])], fisher="empirical", progress=False)
    assert cut.examples == 6
    torch.testing.assert_close(cut["0"].S, few["0"].S)


def test_data_as_dicts_and_single_tensors() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, features: Tensor) -> dict[str, Tensor]:
            return {"logits": self.fc(features)}

    torch.manual_seed(0)
    model, x, y = Named(), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = estimate_curvature(model, [(x, y)], fisher="empirical", progress=False)["fc"].S
    for data in (
        [{"features": x, "labels": y}],
        {"features": x, "labels": y},
        {"image": x, "label": y},
        (x, y),
    ):
        found = estimate_curvature(model, data, fisher="empirical", progress=False)
        torch.testing.assert_close(found["fc"].S, expected)


class _ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.head = nn.Linear(5, 6), nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(a) + self.right(b)))


class _InDict(_ByName):
    def forward(self, batch: dict[str, Tensor], scale: float = 1.0) -> Tensor:
        return super().forward(batch["a"], batch["b"] * scale)


def test_a_model_that_takes_the_whole_dict_gets_it() -> None:
    a, b = torch.randn(6, 5), torch.randn(6, 3)
    data = [{"a": a, "b": b, "labels": torch.tensor([0, 1, 2, 3, 0, 1])}]
    options: dict[str, Any] = {"also": ("patches", "channels", "gradients"), "progress": False}
    expected = estimate_curvature(_ByName(), data, **options)
    found = estimate_curvature(_InDict(), data, **options)
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name].eigenvalues, expected[name].eigenvalues)
    assert found.channels == expected.channels
    small = ed.compress(
        _InDict().eval(), data * 6, budget=ed.Budget(macs=0.8), eval_data=data, polish=1,
        progress=False,
    )  # fmt: skip
    assert small.report.final.accuracy is not None
    assert small.model({"a": a, "b": b}).shape == (6, 4)
    with pytest.raises(DataError, match=r"cannot run on inputs .*KeyError: 'b'"):
        estimate_curvature(_InDict(), [{"a": a, "c": b}], progress=False)
    with pytest.raises(DataError, match=r"cannot run on inputs .*unexpected keyword"):
        estimate_curvature(_ByName(), [{"c": a, "d": b}], progress=False)


class _TimeFirst(nn.Module):
    """Goes through (time, batch, features), as recurrent networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x.transpose(0, 1)))
        return self.head(x.mean(0))


def test_a_batch_on_another_axis_is_left_alone_with_its_reason() -> None:
    x = torch.randn(6, 8, 4)
    found = estimate_curvature(_TimeFirst(), [x], progress=False)
    assert list(found) == ["head"]
    assert "batch on another axis" in found.left_alone["inner"]


class _Windows(nn.Module):
    """Cuts each example into pieces that become the leading axis, as window attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.reshape(-1, 2, 4)
        return self.head(torch.tanh(self.inner(pieces)).reshape(x.shape).mean(1))


def test_pieces_of_examples_are_put_together() -> None:
    torch.manual_seed(0)
    model = _Windows().double()
    x, y = torch.randn(5, 6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    found = estimate_curvature(model, [(x, y)], fisher="empirical", progress=False)
    trace = 0.0
    for n in range(5):
        loss = nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        (g,) = torch.autograd.grad(loss, model.inner.weight)
        trace += float(g.square().sum()) / 5
    assert float(found["inner"].eigenvalues.sum()) == pytest.approx(trace, rel=1e-9)


def test_what_does_not_run_is_left_alone_with_its_reason() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 3)
            self.unused = nn.Linear(4, 3)
            self.cut = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + 0 * self.cut(x).detach()

    found = estimate_curvature(Branches(), [torch.randn(6, 4)], progress=False)
    assert list(found) == ["used"]
    assert "did not run" in found.left_alone["unused"]
    assert "no gradient" in found.left_alone["cut"]


def test_an_input_overwritten_in_place_is_refused() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x) * 1
            out = self.second(h)
            h.mul_(0)
            return out

    x = torch.randn(6, 4)
    assert estimate_curvature(Overwrites(), [x], eigenvalues="kfac", progress=False)
    with pytest.raises(LayerError, match="in place") as error:
        estimate_curvature(Overwrites(), [x], progress=False)
    assert error.value.layer == "second"


def test_no_compressible_layer_is_an_error_that_says_why() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten())
    with pytest.raises(NothingToCompressError, match="Conv1d is not a Linear or Conv2d"):
        estimate_curvature(model, [torch.randn(2, 3, 8)], progress=False)


def test_a_basis_of_another_model_is_refused() -> None:
    x, _ = CASES["fc"].data(4)
    basis = estimate_curvature(CASES["fc"].model(), [x], progress=False)
    other = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with pytest.raises(MismatchError, match="'0'"):
        estimate_curvature(other, [x], basis=basis, progress=False)


@pytest.mark.parametrize(
    "wrong", [{"fisher": "true"}, {"eigenvalues": "all"}, {"layers_per_pass": 0}]
)
def test_unknown_options_are_refused(wrong: dict[str, object]) -> None:
    x, _ = CASES["fc"].data(4)
    with pytest.raises((EigenDamageError, Exception), match=str(next(iter(wrong)))):
        estimate_curvature(CASES["fc"].model(), [x], progress=False, **wrong)


def test_a_function_as_loss_may_take_any_output() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.boxes, self.scores = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> dict[str, dict[str, Tensor]]:
            h = torch.tanh(self.body(x))
            return {"found": {"boxes": self.boxes(h), "scores": self.scores(h)}}

    def loss(output: dict[str, dict[str, Tensor]], target: Tensor) -> Tensor:
        found = output["found"]
        return (found["boxes"] - target).square().sum(1) + found["scores"].square().sum(1)

    torch.manual_seed(0)
    x, y = torch.randn(6, 5), torch.randn(6, 4)
    found = estimate_curvature(Detector(), [(x, y)], loss=loss, fisher="empirical", progress=False)
    assert set(found) == {"body", "boxes", "scores"}
    assert set(found.classifier) == {"boxes", "scores"}


def test_the_layout_is_probed_on_the_first_batch_of_several() -> None:
    x = torch.randn(6, 8, 4)
    found = estimate_curvature(_TimeFirst(), [x[:1], x[1:]], progress=False)
    assert "batch on another axis" in found.left_alone["inner"]


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.main, self.aux = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.main(h), self.aux(h)


def test_a_second_output_is_left_alone_with_its_reason() -> None:
    found = estimate_curvature(_TwoHeads(), [torch.randn(6, 6)], progress=False)
    assert set(found) == {"body", "main"}
    assert found.classifier == ("main",)
    assert "no gradient of the loss" in found.left_alone["aux"]


def test_a_tensor_without_a_batch_axis_is_not_cut() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(mask @ torch.tanh(self.fc(x))).mean(1)

    macs = {
        n: estimate_curvature(
            Mixes(), [{"x": torch.randn(n, 5, 6), "mask": torch.eye(5)}], progress=False
        ).macs
        for n in (5, 7)
    }
    assert macs[5] == macs[7] == 5 * (6 * 8 + 8 * 3) + 5 * 5 * 8


def test_inference_mode_around_the_call_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(8, 5)
    expected = estimate_curvature(model, [x], progress=False)["0"].S
    with torch.inference_mode():
        inside = [x * 1.0]
        found = estimate_curvature(model, inside, progress=False)["0"].S
    torch.testing.assert_close(found, expected)
