"""Norms with an activation of their own, and Linear layers of another class, as timm has them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.batch import as_batch
from eigendamage.layers import ChannelGraph, find_channels


class NormAct(nn.BatchNorm2d):
    """A batch norm, dropout and an activation in one, of the shape that timm's has."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop = nn.Dropout(0.1)
        self.act = nn.SiLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        batch = self.training
        x = nn.functional.batch_norm(
            x, mean, variance, self.weight, self.bias, batch, 0.1, self.eps
        )
        return self.act(self.drop(x))


class CastLinear(nn.Linear):
    """A Linear layer with its own way to write the same."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


def _network(act: Callable[[], nn.Module | None] = lambda: None) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1, bias=False), NormAct(12, act())),
        *(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), NormAct(12, act())),
        *(nn.Conv2d(12, 10, 1, bias=False), NormAct(10, act())),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), CastLinear(10, 4)),
    )
    for module in network:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def _images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _groups(network: nn.Module) -> ChannelGraph:
    return find_channels(network, as_batch(_images(4), 0, torch.device("cpu")))


@pytest.fixture
def _as_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward of timm's Linear is known by its name."""
    monkeypatch.setattr(CastLinear.forward, "__module__", "timm.layers.linear")
    monkeypatch.setattr(CastLinear.forward, "__qualname__", "Linear.forward")


@pytest.mark.usefixtures("_as_timms")
def test_channels_pass_through_a_norm_with_an_activation_of_its_own() -> None:
    graph = _groups(_network())
    assert {name: group.size for name, group in graph.groups.items()} == {"0": 12, "4": 10}
    assert [m.module for m in graph.groups["0"].carriers] == ["1", "2", "3"]
    assert [m.module for m in graph.groups["4"].readers] == ["8"]
    assert (graph.carriers["1"].parameters, graph.carriers["1"].macs) == (2, 0)


def test_a_linear_layer_with_an_unknown_forward_stays() -> None:
    assert "overrides the forward of Linear" in ed.find_layers(_network()).left_alone["8"]
    graph = _groups(_network())
    assert list(graph.groups) == ["0"]
    assert "forward of its own" in graph.left_alone["4"]


@pytest.mark.parametrize(
    "act", [lambda: nn.Softmax(dim=1), lambda: nn.PReLU(12), lambda: nn.GroupNorm(2, 12)]
)
def test_a_norm_whose_activation_sees_other_channels_keeps_them(
    act: Callable[[], nn.Module],
) -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 12, 3), NormAct(12, act()), nn.Conv2d(12, 4, 3), nn.Flatten()),
        nn.Linear(64, 3),
    ).eval()
    graph = _groups(network)
    assert "0" not in graph.groups
    assert "some channels alone do not compute what they did" in graph.left_alone["0"]


def test_a_hook_on_the_activation_is_not_called_and_keeps_the_channels() -> None:
    network = _network()
    calls: list[object] = []
    network[1].act.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    assert "it carries hooks" in _groups(network).left_alone["0"]
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("_as_timms")
@pytest.mark.parametrize("method", ["kron-obs", "auto"])
def test_a_sliced_norm_keeps_its_class_activation_and_dropout(method: str, tmp_path: Path) -> None:
    network, x = _network(), _images(16)
    result = ed.compress(
        network, [*x.split(8)], budget=ed.Budget(macs=0.6), method=method, progress=False
    )
    small = result.model
    norm = small[1]
    assert type(norm) is NormAct
    assert (type(norm.act), type(norm.drop), norm.drop.p) == (nn.SiLU, nn.Dropout, 0.1)
    if method == "kron-obs":
        assert norm.num_features == len(norm.weight) == len(norm.running_mean) < 12
        assert small[2].groups == norm.num_features
        assert type(small[8]) is CastLinear
    ed.save(result, tmp_path / "small")
    loaded = ed.load(_network(), tmp_path / "small").eval()
    assert type(loaded[1]) is NormAct
    with torch.no_grad():
        expected = small(x)
        assert torch.equal(loaded(x), expected)
        torch.testing.assert_close(ed.densify(small)(x), expected)
    written = ed.export(small, tmp_path / "plain", x[:2], format="plain", progress=False)
    assert written.max_difference < 1e-5
    small.train()
    small(x).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize(("name", "at_least"), [("mobilenetv3_small_050", 20), ("regnetx_002", 5)])
def test_networks_of_timm_lose_channels(name: str, at_least: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ed.get_model(f"timm:{name}")
    x = torch.randn(4, 3, 64, 64)
    graph = find_channels(model, as_batch(x, 0, torch.device("cpu")))
    assert len(graph.groups) >= at_least
    assert not [why for why in graph.left_alone.values() if "of its own" in why]
    curvature = ed.estimate_curvature(model, [x], also=("channels",), progress=False)
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.6), method="magnitude")
    small = ed.apply_plan(model, plan, curvature)
    assert {type(m).__name__ for m in small.modules()} <= {
        type(m).__name__ for m in model.modules()
    }
    ed.save(small, tmp_path / "small")
    loaded = ed.load(ed.get_model(f"timm:{name}"), tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), small.eval()(x))
