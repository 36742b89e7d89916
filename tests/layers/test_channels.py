"""Groups of channels: the right ones, no wrong one, and the model untouched."""

from __future__ import annotations

import copy
import functools
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from eigendamage.batch import Batch, as_batch
from eigendamage.calls import call
from eigendamage.errors import DataError, EigenDamageError
from eigendamage.layers import (
    ChannelGraph,
    FactoredConv2d,
    FactoredLinear,
    Member,
    _dependencies,
    _proof,
    channels_of,
    find_channels,
    remove_units,
)
from eigendamage.zoo._resnet import ResNet
from tests.networks import NETWORKS, Network

Units = Mapping[str, Sequence[int]]


@pytest.fixture(params=list(NETWORKS), ids=list(NETWORKS), scope="module")
def network(request: pytest.FixtureRequest) -> Network:
    return NETWORKS[request.param]


def _batch(x: object) -> Batch:
    return as_batch(x, 0, torch.device("cpu"))


@functools.cache
def _found(name: str) -> ChannelGraph:
    """The groups of a network of the table, found once."""
    return find_channels(NETWORKS[name].model(), _batch(NETWORKS[name].inputs()))


def _some(graph: ChannelGraph, seed: int, names: Sequence[str]) -> dict[str, list[int]]:
    """A random number of units of each group, at least one and not all."""
    chance = random.Random(seed)
    sizes = {name: graph.groups[name].size for name in names}
    return {n: chance.sample(range(size), chance.randint(1, size - 1)) for n, size in sizes.items()}


def _without_reading(model: nn.Module, graph: ChannelGraph, units: Units, batch: Batch) -> Tensor:
    """The output when readers see zeros in place of these units: hooks, no weight is touched."""
    model = copy.deepcopy(model)
    for name, gone in units.items():
        for member in graph.groups[name].readers:
            reader, channels = model.get_submodule(member.module), channels_of(member, gone)

            def blind(
                reader: nn.Module, args: tuple[Tensor], channels: list[int] = channels
            ) -> Tensor:
                linear = isinstance(reader, nn.Linear | FactoredLinear)
                return args[0].index_fill(-1 if linear else 1, torch.tensor(channels), 0.0)

            reader.register_forward_pre_hook(blind)
    with torch.no_grad():
        return call(model, batch)


def _without(model: nn.Module, graph: ChannelGraph, units: Units, batch: Batch) -> Tensor:
    model = copy.deepcopy(model)
    remove_units(model, graph, units)
    with torch.no_grad():
        return call(model, batch)


def _check(model: nn.Module, graph: ChannelGraph, batch: Batch) -> None:
    """Every group alone and all together, for several choices of units."""
    choices = [[name] for name in graph.groups] + [list(graph.groups)]
    for names in choices:
        for seed in range(3):
            units = _some(graph, seed, names)
            expected = _without_reading(model, graph, units, batch)
            torch.testing.assert_close(
                _without(model, graph, units, batch), expected, rtol=0, atol=1e-10
            )


def _modules(graph: ChannelGraph) -> dict[str, tuple[set[str], set[str], set[str]]]:
    return {
        name: (
            {m.module for m in group.producers},
            {m.module for m in group.carriers},
            {m.module for m in group.readers},
        )
        for name, group in graph.groups.items()
    }


def test_groups_are_those_that_the_network_has(network: Network) -> None:
    graph = _found(network.name)
    assert _modules(graph) == network.groups
    heads = {"vgg, flattened": "11"}
    assert list(graph.left_alone) == [heads.get(network.name, "head")]
    assert "an output of the model" in next(iter(graph.left_alone.values()))


def test_removing_units_is_not_reading_them(network: Network) -> None:
    _check(network.model(), _found(network.name), _batch(network.inputs()))


def test_groups_are_named_by_the_first_producer_in_order_of_execution(network: Network) -> None:
    model, batch = network.model(), _batch(network.inputs())
    ran: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    call(model, batch)
    for name, group in _found(network.name).groups.items():
        producers = [m.module for m in group.producers]
        assert name == min(producers, key=ran.index)
        assert producers == sorted(producers, key=ran.index)


def test_every_unit_has_its_channels_once(network: Network) -> None:
    for group in _found(network.name).groups.values():
        for member in (*group.producers, *group.carriers, *group.readers):
            assert len(member.indices) == group.size
            flat = [channel for unit in member.indices for channel in unit]
            assert len(set(flat)) == len(flat)
            assert len({len(unit) for unit in member.indices}) == 1


def test_a_concatenation_maps_with_offsets() -> None:
    graph = _found("inception")
    starts = {"one.0": 0, "three.1.0": 3, "pool.1.0": 8}
    for conv, start in starts.items():
        group = graph.groups[f"trunk.2.{conv}"]
        (reader,) = group.readers
        assert reader.indices == tuple((start + unit,) for unit in range(group.size))


def test_flattened_maps_are_read_in_blocks() -> None:
    (reader,) = _found("vgg, flattened").groups["4"].readers
    assert reader.indices == tuple(tuple(range(4 * unit, 4 * unit + 4)) for unit in range(7))


def test_carriers_cost_what_a_channel_of_them_costs() -> None:
    carriers = _found("mobilenet").carriers
    depthwise, norm = carriers["trunk.1.depthwise.0"], carriers["trunk.1.depthwise.1"]
    assert (depthwise.channels, depthwise.parameters, depthwise.macs) == (8, 9, 9 * 8 * 8)
    assert (norm.channels, norm.parameters, norm.macs) == (8, 2, 0)


def test_the_graph_survives_json(network: Network) -> None:
    graph = _found(network.name)
    assert ChannelGraph.model_validate_json(graph.model_dump_json()) == graph


def test_the_answer_is_the_same_each_time_and_nothing_is_printed(
    network: Network, capfd: pytest.CaptureFixture[str]
) -> None:
    before = _found(network.name)
    capfd.readouterr()
    assert find_channels(network.model(), _batch(network.inputs())) == before
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("frozen", "grad"), [(True, False), (False, True)], ids=["frozen, no_grad", "grad"]
)
def test_the_model_is_not_touched(network: Network, frozen: bool, grad: bool) -> None:
    model, batch = network.model().train(), _batch(network.inputs())
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    call(model, batch).sum().backward()
    model.requires_grad_(not frozen)
    first.weight.requires_grad_(False)
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d) or m is model).eval()
    calls.clear()

    def state() -> dict[str, Any]:
        return {
            "tensors": {k: v.clone() for k, v in model.state_dict().items()},
            "identities": [id(p) for p in model.parameters()],
            "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            "wanted": [p.requires_grad for p in model.parameters()],
            "modes": [m.training for m in model.modules()],
            "hooks": list(model._forward_hooks.items()),
            "random": torch.random.get_rng_state(),
            "numpy": np.random.get_state()[1].tolist(),
            "threads": threading.active_count(),
        }

    before = state()
    with torch.set_grad_enabled(grad):
        graph = find_channels(model, batch)
    after = state()
    for key in ("identities", "wanted", "modes", "hooks", "numpy", "threads"):
        assert after[key] == before[key], key
    assert torch.equal(after["random"], before["random"])
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name], tensor), name
    for a, b in zip(after["grads"], before["grads"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert not calls
    handle.remove()
    assert _modules(graph) == network.groups


def _swapped(member: Member) -> Member:
    first, *middle, last = member.indices
    return Member(module=member.module, indices=(last, *middle, first))


@pytest.mark.parametrize("side", ["producers", "carriers", "readers"])
@pytest.mark.parametrize("fault", ["swapped", "missing"])
def test_a_graph_with_a_mistake_does_not_pass(network: Network, side: str, fault: str) -> None:
    """Of groups that look alike, as those of a second block do, the first one stands for all."""
    model, batch = network.model(), _batch(network.inputs())
    tried: set[tuple[int, ...]] = set()
    for name, group in _found(network.name).groups.items():
        members: tuple[Member, ...] = getattr(group, side)
        kind = len(group.producers), len(group.carriers), len(group.readers)
        if kind in tried:
            continue
        tried.add(kind)
        for at, member in enumerate(members):
            instead = (_swapped(member),) if fault == "swapped" else ()
            wrong = group.model_copy(update={side: (*members[:at], *instead, *members[at + 1 :])})
            kept, refused = _proof.proven(model, batch, {name: wrong})
            assert name not in kept, member.module
            assert name in refused


class Small(nn.Module):
    """A stem of eight channels, a middle to be chosen, and a head."""

    def __init__(self, middle: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 8, 3, padding=1), middle
        self.last, self.head = nn.Conv2d(width, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.relu(self.stem(x)))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _small(middle: nn.Module, width: int = 8) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Small(middle, width).double().eval(), _batch(x)


def _shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer norm": (lambda: nn.LayerNorm([8, 8, 8]), "'middle': LayerNorm"),
    "group norm": (lambda: nn.GroupNorm(4, 8), "'middle': GroupNorm computes over several"),
    "grouped": (lambda: nn.Conv2d(8, 8, 1, groups=4), "grouped Conv2d (groups=4)"),
    "more outputs than groups": (
        lambda: nn.Conv2d(8, 16, 1, groups=8),
        "grouped Conv2d (groups=8)",
    ),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 1), "'middle': ConvTranspose2d"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        "'middle': the weight of ParametrizedConv2d is computed",
    ),
    "masked": (
        lambda: prune.l1_unstructured(nn.Conv2d(8, 8, 1), "weight", 3),
        "'middle': the weight of Conv2d is computed",
    ),
    "mean over channels": (lambda: Do(lambda x: x - x.mean(1, keepdim=True)), "something else"),
    "softmax over channels": (lambda: Do(lambda x: x.softmax(1)), "something else"),
    "normalised over channels": (lambda: Do(lambda x: F.normalize(x, dim=1)), "something else"),
    "functional group norm": (lambda: Do(lambda x: F.group_norm(x, 4)), ""),
    "shuffled in groups": (lambda: Do(_shuffled), ""),
    "detached": (lambda: Do(lambda x: x * x.detach().mean(1, keepdim=True)), "something else"),
    "flipped": (lambda: Do(lambda x: x + x.flip(1)), ""),
    "rolled": (lambda: Do(lambda x: x.roll(1, 1)), ""),
    "fixed number": (lambda: Do(lambda x: x.reshape(2, 8, 8, 8) * 2), "does not run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_groups_that_would_be_wrong_are_refused(name: str) -> None:
    middle, said = REFUSED[name]
    model, batch = _small(middle(), 16 if name == "more outputs than groups" else 8)
    graph = find_channels(model, batch)
    assert "stem" not in graph.groups
    assert said in graph.left_alone["stem"]
    assert list(graph.groups) == ["last"]
    with torch.no_grad():
        call(model, batch)  # leaves a masked weight in a state that can be copied
    _check(model, graph, batch)


def _gated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a * torch.sigmoid(b)


def test_the_halves_of_a_gate_go_together() -> None:
    model, batch = _small(Do(_gated), 4)
    graph = find_channels(model, batch)
    (producer,) = graph.groups["stem"].producers
    assert producer.indices == tuple((unit, unit + 4) for unit in range(4))
    _check(model, graph, batch)


class Halves(nn.Module):
    """Two layers, each of which reads half of the channels of one, or of two in a row."""

    def __init__(self, stems: int) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Linear(5, 8 // stems) for _ in range(stems))
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.cat([torch.tanh(stem(x)) for stem in self.stems], 1).chunk(2, 1)
        return self.one(a) * self.two(b)


@pytest.mark.parametrize("stems", [1, 2])
def test_halves_that_stay_equal_only_if_two_groups_shrink_alike_are_refused(stems: int) -> None:
    torch.manual_seed(0)
    graph = find_channels(Halves(stems).double(), _batch(torch.randn(4, 5, dtype=torch.float64)))
    assert not graph.groups
    assert {"stems.0", "one"} <= graph.left_alone.keys()


class Divided(nn.Module):
    """A sum in which one layer meets the concatenation of two."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.one, self.two = nn.Linear(5, 7), nn.Linear(5, 3), nn.Linear(5, 4)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.both(x) + torch.cat([self.one(x), self.two(x)], 1)))


def test_a_layer_can_share_its_rows_among_groups() -> None:
    torch.manual_seed(0)
    model, batch = Divided().double(), _batch(torch.randn(4, 5, dtype=torch.float64))
    graph = find_channels(model, batch)
    assert {name: group.size for name, group in graph.groups.items()} == {"both": 3, "two": 4}
    assert [m.module for m in graph.groups["two"].producers] == ["both", "two"]
    _check(model, graph, batch)


class Auxiliary(nn.Module):
    """A classifier on the way that runs in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 7)
        self.head, self.early = nn.Linear(7, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        y = self.head(torch.tanh(self.second(x)))
        return y + self.early(x) if self.training else y


def test_what_is_read_in_train_mode_only_stays() -> None:
    graph = find_channels(Auxiliary(), _batch(torch.randn(4, 5)))
    assert list(graph.groups) == ["second"]
    assert "in train mode" in graph.left_alone["first"]
    assert "no output of the model depends on it" in graph.left_alone["early"]


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.relu(self.first(x) - 1e6))))


def test_channels_that_are_all_zero_prove_nothing() -> None:
    graph = find_channels(Dead(), _batch(torch.randn(4, 5)))
    assert list(graph.groups) == ["second"]
    assert "nothing is proven" in graph.left_alone["first"]


def test_a_branch_that_starts_at_zero_is_proven_all_the_same() -> None:
    network = NETWORKS["preresnet"]
    model = network.model()
    for name, parameter in model.named_parameters():
        if "conv2" in name or "bn2" in name:
            nn.init.zeros_(parameter)
    assert _modules(find_channels(model, _batch(network.inputs()))) == network.groups


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.position = nn.Parameter(torch.randn(3, 8))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def test_a_transformer_gives_its_hidden_neurons_and_no_more() -> None:
    torch.manual_seed(0)
    model = Transformer().double().eval()
    batch = _batch(torch.randn(4, 3, 5, dtype=torch.float64))
    graph = find_channels(model, batch)
    assert _modules(graph) == {"up": ({"up"}, set(), {"down"})}
    assert graph.groups["up"].size == 12
    assert "embed" in graph.left_alone
    assert "attention.out_proj" in graph.left_alone
    _check(model, graph, batch)


class Scaled(nn.Module):
    """Multiplies by a parameter a channel, which no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_parameter_outside_of_layers_is_named() -> None:
    graph = find_channels(*_small(Scaled()))
    assert "the parameter 'middle.scale'" in graph.left_alone["stem"]


def test_shared_weights_and_hooked_layers_stay() -> None:
    one, other = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
    other.weight = one.weight
    model, batch = _small(nn.Sequential(one, nn.ReLU(), other))
    graph = find_channels(model, batch)
    assert list(graph.groups) == ["last"]
    assert "shared" in graph.left_alone["stem"]

    model, batch = _small(nn.BatchNorm2d(8))
    model.middle.register_forward_hook(lambda *_: None)
    graph = find_channels(model, batch)
    assert list(graph.groups) == ["last"]
    assert "'middle': it carries hooks" in graph.left_alone["stem"]


def test_one_channel_cannot_go() -> None:
    graph = find_channels(
        nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2)), _batch(torch.randn(4, 3))
    )
    assert not graph.groups
    assert "one channel" in graph.left_alone["0"]


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_and_prelu_go_along(affine: bool) -> None:
    model, batch = _small(
        nn.Sequential(nn.InstanceNorm2d(8, affine=affine), nn.PReLU(8), nn.PReLU())
    )
    graph = find_channels(model, batch)
    assert {m.module for m in graph.groups["stem"].carriers} == {"middle.0", "middle.1"}
    assert graph.carriers["middle.0"].parameters == 2 * affine
    assert graph.carriers["middle.1"].parameters == 1
    _check(model, graph, batch)


@pytest.mark.parametrize("count", [2, 3])
def test_a_factored_layer_is_one_layer(count: int) -> None:
    core = nn.Conv2d(4 if count == 3 else 8, 5, 3, padding=1, bias=False)
    stages = [nn.Conv2d(8, 4, 1, bias=False), core, nn.Conv2d(5, 7, 1)][3 - count :]
    model, batch = _small(FactoredConv2d(*stages), 7)
    model.head = FactoredLinear(nn.Linear(6, 3, bias=False), nn.Linear(3, 4)).double()
    graph = find_channels(model, batch)
    assert _modules(graph) == {
        "stem": ({"stem"}, set(), {"middle"}),
        "middle": ({"middle"}, set(), {"last"}),
        "last": ({"last"}, set(), {"head"}),
    }
    ranks = {k for k, v in graph.left_alone.items() if "ranks" in v}
    assert ranks == {f"middle.{i}" for i in range(count - 1)} | {"head.0"}
    _check(model, graph, batch)


class Named(nn.Module):
    """Takes keyword arguments and returns a dict with an integer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(5, 6), nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, a: Tensor, *, b: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.left(a) + self.right(b)))
        return {"logits": logits, "best": logits.argmax(1)}


def test_batches_of_keyword_arguments() -> None:
    torch.manual_seed(0)
    batch = _batch({"a": torch.randn(4, 5), "b": torch.randn(4, 3), "labels": torch.zeros(4)})
    graph = find_channels(Named(), batch)
    assert _modules(graph) == {"left": ({"left", "right"}, set(), {"head"})}


def test_inner_outputs_that_are_returned_stay() -> None:
    class Both(Dead):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = torch.tanh(self.first(x))
            return self.head(torch.tanh(self.second(features))), features

    graph = find_channels(Both(), _batch(torch.randn(4, 5)))
    assert list(graph.groups) == ["second"]
    assert "outputs change their shape" in graph.left_alone["first"]


def test_a_model_in_single_precision_that_makes_its_own_constants() -> None:
    class Single(Dead):
        def forward(self, x: Tensor) -> Tensor:
            constant = torch.eye(5, dtype=torch.float32)
            return self.head(torch.tanh(self.second(torch.tanh(self.first(x @ constant)))))

    torch.manual_seed(0)
    graph = find_channels(Single(), _batch(torch.randn(4, 5)))
    assert set(graph.groups) == {"first", "second"}


def test_a_model_that_cannot_run_on_the_batch() -> None:
    with pytest.raises(DataError, match=r"inputs of shape \(2, 3\)"):
        find_channels(nn.Linear(5, 2), _batch(torch.randn(4, 3)))


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Linear(3, 2)
    model.lock = threading.Lock()
    with pytest.raises(EigenDamageError, match="Linear cannot be copied"):
        find_channels(model, _batch(torch.randn(4, 3)))


def test_a_crash_of_the_graph_names_the_model_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr(_dependencies, "_build", crash)
    model, batch = _small(nn.Identity())
    with pytest.raises(
        EigenDamageError, match="Small go together: ZeroDivisionError: by zero"
    ) as e:
        find_channels(model, batch)
    assert 'method="eigendamage"' in str(e.value)
    assert "and more" not in str(e.value)


def test_a_graph_that_hangs_is_cut_and_does_not_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = 0

    def loop(*_: object) -> None:
        nonlocal turns
        while True:
            with suppress(Exception):  # what is raised to stop it is none
                turns += 1

    monkeypatch.setattr(_dependencies, "_build", loop)
    model, batch = _small(nn.Identity())
    start = time.monotonic()
    with pytest.raises(EigenDamageError, match=r"Small go together took over 0\.2 s"):
        find_channels(model, batch, limit_s=0.2)
    assert time.monotonic() - start < 10
    assert not [t for t in threading.enumerate() if t.name == "eigendamage-channels"]
    before = turns
    time.sleep(0.05)
    assert turns == before


def test_channels_that_are_padded_on_the_way_are_left_alone() -> None:
    """The paper's CIFAR networks pad the channels of a shortcut with zeros, without a layer."""
    model = ResNet(1, (6, 8, 10)).double().eval()
    graph = find_channels(model, _batch(torch.randn(2, 3, 16, 16, dtype=torch.float64)))
    inner = {f"layer{s}.0.conv1" for s in (1, 2, 3)}
    assert set(graph.groups) == inner
    assert {"conv1", "layer2.0.conv2", "layer3.0.conv2"} <= set(graph.left_alone)
    assert "could not be followed to" in graph.left_alone["layer2.0.conv2"]
