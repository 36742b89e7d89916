"""Neurons and heads are found by what depends on what, and only where they can go."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eigendamage.batch import Batch, as_batch
from eigendamage.calls import call
from eigendamage.errors import ChannelError
from eigendamage.layers import (
    ChannelGraph,
    ChannelGroup,
    Counter,
    FactoredLinear,
    _channels,
    _linear_groups,
    channels_of,
    find_channels,
    remove_units,
    zero_inputs,
)
from tests.transformer_networks import (
    HEAD,
    TOKENS,
    WIDTH,
    Fused,
    Gated,
    Grouped,
    Plain,
    tokens,
    transformer,
)

Blocks = tuple[tuple[int, ...], ...]


def _batch(x: object) -> Batch:
    return as_batch(x, 0, torch.device("cpu"))


def _runs(*starts: int, length: int = HEAD) -> tuple[int, ...]:
    return tuple(start + at for start in starts for at in range(length))


def _members(group: ChannelGroup) -> dict[str, Blocks]:
    return {m.module: m.indices for m in (*group.producers, *group.readers)}


def _without_reading(model: nn.Module, graph: ChannelGraph, units: dict[str, list[int]]) -> Tensor:
    model = copy.deepcopy(model)
    for name, gone in units.items():
        for member in graph.groups[name].readers:
            zero_inputs(model.get_submodule(member.module), channels_of(member, gone))
    return model(tokens())


def _without(model: nn.Module, graph: ChannelGraph, units: dict[str, list[int]]) -> Tensor:
    model = copy.deepcopy(model)
    remove_units(model, graph, units)
    return model(tokens())


def _check_removal(model: nn.Module, graph: ChannelGraph) -> None:
    chance = random.Random(0)
    for _ in range(4):
        units = {
            name: chance.sample(range(group.size), chance.randint(1, group.size - 1))
            for name, group in graph.groups.items()
        }
        with torch.no_grad():
            expected = _without_reading(model, graph, units)
            torch.testing.assert_close(_without(model, graph, units), expected, rtol=0, atol=1e-10)


def test_a_head_is_its_keys_and_values_with_all_queries_that_share_them() -> None:
    model = transformer(Grouped(), Gated())
    graph = find_channels(model, _batch(tokens()))
    assert list(graph.groups) == ["blocks.0.q", "blocks.1.gate"]
    shared = tuple(_runs(2 * HEAD * k, 2 * HEAD * k + HEAD) for k in range(3))
    own = tuple(_runs(HEAD * k) for k in range(3))
    assert _members(graph.groups["blocks.0.q"]) == {
        "blocks.0.q": shared,
        "blocks.0.k": own,
        "blocks.0.v": own,
        "blocks.0.out": shared,
    }
    _check_removal(model, graph)


def test_neurons_that_a_relu_happens_to_silence_are_found() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 50), nn.ReLU(), nn.Linear(50, 3))
    groups = _linear_groups.find_linear_groups(model, _batch(torch.randn(1, 7)))
    assert {name: group.size for name, group in groups.items()} == {"1": 50}


@pytest.mark.parametrize("block", [Gated, Plain])
def test_a_neuron_is_one_output_of_each_layer_and_one_input(block: type[nn.Module]) -> None:
    model = transformer(Grouped(), block())
    graph = find_channels(model, _batch(tokens()))
    (group,) = (g for name, g in graph.groups.items() if name.startswith("blocks.1"))
    layers = [name for name, m in model.named_modules() if name and isinstance(m, nn.Linear)]
    assert list(_members(group)) == [name for name in layers if name.startswith("blocks.1")]
    assert set(_members(group).values()) == {tuple((unit,) for unit in range(10))}
    _check_removal(model, graph)


def test_heads_in_one_layer_for_queries_keys_and_values() -> None:
    graph = find_channels(transformer(Fused("by kind")), _batch(tokens()))
    assert _members(graph.groups["blocks.0.qkv"]) == {
        "blocks.0.qkv": tuple(_runs(HEAD * h, HEAD * (4 + h), HEAD * (8 + h)) for h in range(4)),
        "blocks.0.proj": tuple(_runs(HEAD * h) for h in range(4)),
    }
    model = transformer(Fused("by head"))
    graph = find_channels(model, _batch(tokens()))
    assert _members(graph.groups["blocks.0.qkv"]) == {
        "blocks.0.qkv": tuple(_runs(3 * HEAD * h, length=3 * HEAD) for h in range(4)),
        "blocks.0.proj": tuple(_runs(HEAD * h) for h in range(4)),
    }
    _check_removal(model, graph)


def test_a_number_of_heads_that_a_reshape_reads_follows() -> None:
    model = transformer(Fused("by kind", counted=True))
    graph = find_channels(model, _batch(tokens()))
    assert graph.groups["blocks.0.qkv"].counters == (
        Counter(module="blocks.0", attribute="num_heads", whole=4, per_unit=1),
    )
    _check_removal(model, graph)
    model.blocks[0].number = model.blocks[0].__dict__.pop("num_heads")
    model.blocks[0].__class__ = _OddlyNamed
    graph = find_channels(model, _batch(tokens()))
    assert not graph.groups
    assert "does not run without some of them" in graph.left_alone["blocks.0.qkv"]


class _OddlyNamed(Fused):
    number: int

    @property
    def num_heads(self) -> int:
        return self.number


def test_a_head_costs_its_attention_beside_its_layers() -> None:
    graph = find_channels(transformer(Grouped(), Gated()), _batch(tokens()))
    # Two query heads, each with queries by keys and weights by values.
    assert graph.groups["blocks.0.q"].macs == 2 * 2 * TOKENS * TOKENS * HEAD
    assert graph.groups["blocks.1.gate"].macs == 0


def test_heads_in_one_module_and_its_parts_are_counted_apart() -> None:
    class Within(Grouped):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Fused()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.inner(x)

    graph = find_channels(transformer(Within(), Fused()), _batch(tokens()))
    one = 2 * TOKENS * TOKENS * HEAD
    assert {name: group.macs for name, group in graph.groups.items()} == {
        "blocks.0.q": 2 * one,
        "blocks.0.inner.qkv": one,
        "blocks.1.qkv": one,
    }


def test_norms_over_all_heads_tie_them() -> None:
    model = transformer(Grouped(norm=nn.LayerNorm(6 * HEAD)), Gated())
    assert list(find_channels(model, _batch(tokens())).groups) == ["blocks.1.gate"]


def test_the_only_head_of_keys_stays() -> None:
    model = transformer(Grouped(queries=4, keys=1), Gated())
    assert list(find_channels(model, _batch(tokens())).groups) == ["blocks.1.gate"]


class _ReadTwice(Gated):
    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(F.silu(self.gate(x)) * up) + up.sum(-1, keepdim=True)


class _CalledTwice(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class _WithAnother(nn.Module):
    """The reader reads what another layer reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)
        self.side = nn.Linear(10, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        return self.down(hidden) + self.side(hidden)


@pytest.mark.parametrize("block", [_ReadTwice, _CalledTwice, _WithAnother])
def test_channels_that_something_else_reads_stay(block: type[nn.Module]) -> None:
    model = transformer(Grouped(), block())
    graph = find_channels(model, _batch(tokens()))
    assert list(graph.groups) == ["blocks.0.q"]
    assert set(graph.left_alone) >= {"blocks.1.0" if block is _CalledTwice else "blocks.1.up"}


def test_what_hooks_and_shared_weights_hold_stays_with_its_reason() -> None:
    model = transformer(Grouped(), Gated(), Gated())
    model.blocks[0].k.register_forward_hook(lambda *_: None)
    model.blocks[2].down.weight = model.blocks[1].down.weight
    graph = find_channels(model, _batch(tokens()))
    assert not graph.groups
    assert "'blocks.0.k'" in graph.left_alone["blocks.0.q"]
    assert "hooks" in graph.left_alone["blocks.0.q"]
    assert "shared" in graph.left_alone["blocks.1.gate"]


def test_factored_layers_have_neurons() -> None:
    model = transformer(Grouped(), Gated())
    dense = model.blocks[1].up
    model.blocks[1].up = FactoredLinear(
        nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, dense.out_features)
    ).double()
    graph = find_channels(model, _batch(tokens()))
    assert [m.module for m in graph.groups["blocks.1.gate"].producers] == [
        "blocks.1.gate",
        "blocks.1.up",
    ]
    _check_removal(model, graph)


def test_networks_of_linear_layers_with_heads_are_not_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(*_: object, **__: object) -> None:
        pytest.fail("torch-pruning was asked")

    monkeypatch.setattr(_channels, "find_couplings", asked)
    graph = find_channels(transformer(Grouped(), Gated()), _batch(tokens()))
    assert set(graph.left_alone) == {"stem", "blocks.0.out", "blocks.1.down", "head"}


def test_neurons_are_found_where_tracing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ChannelError("it cannot be traced")

    monkeypatch.setattr(_channels, "find_couplings", fails)
    graph = find_channels(transformer(Gated()), _batch(tokens()))
    assert list(graph.groups) == ["blocks.0.gate"]
    assert graph.left_alone["stem"] == "it cannot be traced"
    with pytest.raises(ChannelError, match="it cannot be traced"):
        find_channels(transformer(nn.Identity()), _batch(tokens()))


def test_the_search_leaves_no_trace() -> None:
    model = transformer(Grouped(), Gated())
    model.stem.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trained = [p.requires_grad for p in model.parameters()]
    found = _linear_groups.find_linear_groups(model, _batch(tokens()))
    assert list(found) == ["blocks.0.q", "blocks.1.gate"]
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class _Checked(Gated):
    def forward(self, x: Tensor) -> Tensor:
        if bool(self.gate(x).detach().abs().amax() < 100):
            raise ValueError("these are other numbers than ever")
        return super().forward(x)


def test_a_model_that_refuses_random_numbers_has_no_neurons() -> None:
    model = transformer(_Checked())
    with torch.no_grad():
        model.blocks[0].gate.weight.mul_(1e4)
        call(model, _batch(tokens()))
    assert _linear_groups.find_linear_groups(model, _batch(tokens())) == {}
