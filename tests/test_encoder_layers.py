"""torch's own encoder layers, which may compute with their layers' weights in one fused call."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.integrations._adopt import adopt
from eigendamage.layers import FactoredLinear, find_layers

WIDTH, TOKENS = 16, 5
SWITCHES = ("use_nested_tensor", "activation_relu_or_gelu")
Way = Literal["low-rank", "channels"]


class Encoder(nn.Module):
    """Words to classes by `nn.TransformerEncoder`, which packs what is not padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, activation="gelu", batch_first=True)
        self.read = nn.Linear(6, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out = self.encoder(self.read(x), src_key_padding_mask=padding)
        if padding is not None:
            out = out.masked_fill(padding[:, :, None], 0.0)
        return self.head(out.mean(1))


def _model() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


def _inputs() -> list[Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return list(torch.randn(64, TOKENS, 6, generator=drawn).split(16))


@cache
def _compressed(way: Way) -> ed.Compressed:
    options: dict[str, Any] = {"actions": (way,), "progress": False}
    return ed.compress(_model(), _inputs(), budget=ed.Budget(macs=0.7), **options)


def _factored(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, FactoredLinear)]


def _switches(model: nn.Module) -> list[int]:
    """Of the stack, then of its layers."""
    return [getattr(m, name) for m in model.modules() for name in SWITCHES if hasattr(m, name)]


@pytest.fixture
def no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may multiply the stages of a factored layer."""

    def refuse(_: FactoredLinear) -> Tensor:
        raise AssertionError("the product of the stages was read")

    monkeypatch.setattr(FactoredLinear, "weight", property(refuse))


def test_its_neurons_and_weights_are_found_and_attention_is_not() -> None:
    found = find_layers(_model())
    layers = [f"encoder.layers.{n}.linear{k}" for n in (0, 1) for k in (1, 2)]
    assert list(found.compressible) == ["read", *layers, "head"]
    assert "read directly" in found.left_alone["encoder.layers.0.self_attn.out_proj"]


@pytest.mark.parametrize("ignored", [(), "*.layers.0.*", "*.layers.1.*"])
def test_factored_layers_are_called_where_the_fused_call_would_be(
    ignored: str | tuple[()], no_products: None
) -> None:
    model = _model()
    curvature = ed.estimate_curvature(model, _inputs(), ignore=ignored, progress=False)
    plan = ed.make_plan(model, curvature, ed.Budget(ratio=0.4), method="eigendamage")
    small = ed.apply_plan(model, plan, curvature)
    assert _factored(small)
    x = _inputs()[0]
    padding = torch.arange(TOKENS)[None] >= torch.tensor([TOKENS - 2] * 8 + [TOKENS] * 8)[:, None]
    for masked in (None, padding):
        with torch.no_grad():
            fast = small(x, masked)
        torch.testing.assert_close(fast, small(x, masked).detach(), rtol=1e-5, atol=1e-6)


def test_only_layers_that_are_factored_turn_the_fused_call_off() -> None:
    small = _compressed("low-rank").model
    holders = {name.rpartition(".")[0] for name in _factored(small)}
    for path, module in small.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            assert module.activation_relu_or_gelu == (0 if path in holders else 2)
    assert small.get_submodule("encoder").use_nested_tensor is False
    narrow = _compressed("channels")
    assert any(layer.changes for layer in narrow.plan.layers.values())
    assert _switches(narrow.model) == [True, 2, 2]
    x = _inputs()[0]
    with torch.no_grad():
        fused = narrow.model(x)
    torch.testing.assert_close(fused, narrow.model(x).detach(), rtol=1e-4, atol=1e-5)


def test_what_is_given_keeps_its_fused_call() -> None:
    model = _model()
    curvature = ed.estimate_curvature(model, _inputs(), progress=False)
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.7), method="eigendamage")
    small = ed.apply_plan(model, plan, curvature)
    assert _switches(model) == [True, 2, 2]
    assert 0 in _switches(small)


def test_the_files_of_one_say_so(tmp_path: Path) -> None:
    result = _compressed("low-rank")
    ed.save(result, tmp_path / "small")
    loaded = ed.load(_model(), tmp_path / "small")
    assert _switches(loaded) == _switches(result.model)
    x = _inputs()[0]
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))


def test_another_shot_of_what_is_factored_already() -> None:
    result = ed.compress(
        _model(),
        _inputs(),
        budget=ed.Budget(macs=0.5),
        shots=2,
        actions=("low-rank",),
        progress=False,
    )
    assert _factored(result.model)
    assert result.report.macs[1] <= 0.5 * result.report.macs[0]


def test_in_place_it_is_turned_off_too() -> None:
    model = _model()
    result = ed.compress(
        model, _inputs(), budget=ed.Budget(macs=0.7), actions=("low-rank",), progress=False
    )
    adopt(model, result, [])
    assert _switches(model) == _switches(result.model)
    assert 0 in _switches(model)


def test_it_exports_as_any_other(tmp_path: Path) -> None:
    small = _compressed("low-rank").model
    path = tmp_path / "small.pt2"
    assert ed.export(small, path, _inputs()[0], format="torch.export", progress=False).path == path
    x = _inputs()[0]
    with torch.no_grad():
        torch.testing.assert_close(ed.plain(small)(x), small(x), rtol=0, atol=0)


def test_multiplied_out_it_computes_in_one_call_again(tmp_path: Path) -> None:
    result = _compressed("low-rank")
    dense = ed.densify(result.model)
    assert _switches(dense) == [True, 2, 2]
    x = _inputs()[0]
    with torch.no_grad():
        torch.testing.assert_close(dense(x), result.model(x), rtol=1e-4, atol=1e-5)
    ed.save(dense, tmp_path / "dense")
    assert _switches(ed.load(_model(), tmp_path / "dense")) == [True, 2, 2]
