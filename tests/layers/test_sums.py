"""Sums are found where a layer's output goes into one, and nowhere else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.batches import Batches
from eigendamage.errors import LayerError
from eigendamage.layers import Port, Sum, find_layers, find_sums
from eigendamage.surgery import Repairs, repair_model
from eigendamage.zoo import resnet20
from tests.cases import CASES

CPU = torch.device("cpu")


def batch_of(x: Tensor) -> Batch:
    return next(iter(Batches([x], CPU)))


def sums_of(model: nn.Module, x: Tensor) -> dict[str, Sum]:
    return find_sums(model, find_layers(model).compressible, batch_of(x))


class Block(nn.Module):
    """A convolution whose output goes on in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4, track_running_stats=way != "norm of the batch")
        self.second = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout()
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = self.conv(x)
        match self.way:
            case "plain":
                return x + y
            case "other way round":
                return y + x
            case "in place":
                y += x
                return y
            case "in place, then read":
                y += x
                return self.relu(y) * y
            case "returned as well":
                return x + y, y
            case "norm" | "norm of the batch":
                return torch.add(self.bn(y), x)
            case "two norms":
                return self.second(self.bn(y)) + x
            case "dropout":
                return self.dropout(self.bn(y)) + x
            case "made later":
                return self.bn(y) + self.pool(x)
            case "made later by a function":
                return y + F.avg_pool2d(x, 3, 1, 1)
            case "changed in between":
                return self.relu(x) + y
            case "read twice":
                return x + y + y.mean()
            case "read before the norm":
                return self.bn(y) + x + y
            case "scaled":
                return torch.add(x, y, alpha=2)
            case "broadcast":
                return y + x.mean((2, 3), keepdim=True)
            case "itself":
                return y + y
            case "read by a property":
                return x + y + y.mT.mean()
            case "read by a script":
                return x + y + _scripted_mean(y)
            case "changed by a script":
                _scripted_double(y)
                return x + y
            case "the same for all examples":
                return y + self.pool(x[:1])
            case _:
                raise AssertionError(self.way)


def _scripted(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


def _mean(y: Tensor) -> Tensor:
    return y.mean()


def _double(y: Tensor) -> Tensor:
    return y.mul_(2)


_scripted_mean, _scripted_double = _scripted(_mean), _scripted(_double)


STEM = Port("stem", "output")
FOUND = {
    "plain": Sum(None, STEM),
    "other way round": Sum(None, STEM),
    "in place": Sum(None, STEM),
    "in place, then read": Sum(None, STEM),
    "norm": Sum("bn", STEM),
    "dropout": Sum("bn", STEM),
    "made later": Sum("bn", STEM, through="pool"),
}
NOT_FOUND = (
    "norm of the batch",
    "two norms",
    "made later by a function",
    "changed in between",
    "read twice",
    "read before the norm",
    "scaled",
    "broadcast",
    "returned as well",
    "itself",
)


@pytest.mark.parametrize("way", [*FOUND, *NOT_FOUND])
def test_what_goes_into_a_sum_alone_is_found(way: str) -> None:
    model = Block(way).eval()
    found = sums_of(model, torch.randn(2, 3, 6, 6))
    assert found.get("conv") == FOUND.get(way)


def test_a_residual_network() -> None:
    found = sums_of(resnet20().eval(), torch.randn(2, 3, 32, 32))
    assert list(found) == [f"layer{s}.{b}.conv2" for s in (1, 2, 3) for b in (0, 1, 2)]
    assert found["layer1.1.conv2"] == Sum("layer1.1.bn2", Port("layer1.0", "output"))
    downsampled = Sum("layer2.0.bn2", Port("layer1.2", "output"), through="layer2.0.shortcut")
    assert found["layer2.0.conv2"] == downsampled


def test_of_two_layers_in_one_sum_the_later_one_makes_up_for_the_earlier() -> None:
    case = CASES["residual"]
    assert sums_of(case.model(), case.data()[0]) == {"shortcut": Sum(None, Port("conv2", "output"))}


def test_tokens_are_found_too() -> None:
    case = CASES["tokens"]
    assert sums_of(case.model(), case.data()[0]) == {"down": Sum(None, Port("embed", "output"))}


def test_a_layer_that_runs_twice_has_no_one_sum() -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.conv(self.conv(x))

    assert sums_of(Twice("plain").eval(), torch.randn(2, 3, 6, 6)) == {}


class Torchvision(nn.Module):
    """As torchvision's BasicBlock: one ReLU for both places, and the sum in place."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)
        down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.downsample = None if inputs == outputs else down

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn2(self.conv2(self.relu(self.conv1(x))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def test_blocks_as_torchvision_writes_them() -> None:
    shapes = [(4, 4, 1), (4, 4, 1), (4, 6, 2), (6, 6, 1), (6, 6, 1)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *(Torchvision(*shape) for shape in shapes)).eval()
    x = torch.randn(2, 3, 12, 12)
    expected = {
        "1.conv2": Sum("1.bn2", Port("0", "output")),
        "2.conv2": Sum("2.bn2", Port("1", "output")),
        "3.downsample.0": Sum("3.downsample.1", Port("3.bn2", "output")),
        "4.conv2": Sum("4.bn2", Port("3", "output")),
        "5.conv2": Sum("5.bn2", Port("4", "output")),
    }
    for _ in range(3):  # what is found does not hang on which memory is used again
        assert sums_of(model, x) == expected


class Negative(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return -x


class WithReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize("module", [Negative(), WithReLU(4)])
def test_a_subclass_is_not_what_it_inherits_from(module: nn.Module) -> None:
    model = Block("norm")
    model.bn = module
    assert sums_of(model.eval(), torch.randn(2, 3, 6, 6)) == {}


class Stateful(nn.Module):
    """A module that is more than a function of its input, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.scale: Tensor | None = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        match self.way:
            case "random":
                return x + torch.rand_like(x)
            case "counting":
                self.calls += 1
                return 2 * x
            case _:
                assert self.scale is not None
                return self.scale * x


class Prepared(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(x)
        self.pool.scale = x.mean()
        return y + self.pool(x)


@pytest.mark.parametrize("way", ["random", "counting", "prepared by others"])
def test_a_module_that_is_no_function_is_not_called_early(way: str) -> None:
    model = Prepared("made later") if way == "prepared by others" else Block("made later")
    model.pool = Stateful(way)
    x = torch.randn(2, 3, 6, 6)
    for _ in range(2):  # the second time what others prepared is there from the first
        assert sums_of(model.eval(), x) == {}
    if way == "counting":
        assert model.pool.calls == 2, "each pass calls it once"


class TokensWithNorm(nn.Module):
    """Linear, and a batch norm whose channels are tokens, or a Linear layer's outputs."""

    def __init__(self, per_token: bool) -> None:
        super().__init__()
        self.per_token = per_token
        self.embed = nn.Linear(5, 6)
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(7 if per_token else 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x if self.per_token else x[:, 0])
        return x + self.norm(self.linear(x))


def test_a_norm_counts_where_its_channels_are_the_outputs() -> None:
    x = torch.randn(2, 7, 5)
    assert sums_of(TokensWithNorm(per_token=True).eval(), x) == {}
    expected = {"linear": Sum("norm", Port("embed", "output"))}
    assert sums_of(TokensWithNorm(per_token=False).eval(), x) == expected


def test_it_leaves_no_trace() -> None:
    model = Block("dropout").train()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 6, 6)
    state = torch.random.get_rng_state()
    assert sums_of(model, x)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert model.dropout.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def repaired(
    small: Block, original: Block, x: Tensor, other: Tensor, max_memory: int = 2**40
) -> Repairs:
    """A repair of the one convolution, at all positions."""
    return repair_model(
        small,
        original,
        [batch_of(x)],
        held_out=[batch_of(other)],
        curvature=None,
        layers=["conv"],
        ridge=0.0,
        positions=10_000,
        max_memory=max_memory,
        progress=False,
    )


def with_a_blind_stem(original: Block) -> Block:
    """A copy whose stem has lost two channels, which no later layer can read off its input."""
    small = copy.deepcopy(original)
    with torch.no_grad():
        small.stem.weight[:2] = 0
        small.stem.bias[:2] = 0
    return small


def fitted(read: Tensor, wanted: Tensor) -> Tensor:
    """The least-squares fit of what is wanted at every position on patches of what is read."""
    patches = F.unfold(read, 3, padding=1).transpose(1, 2).flatten(0, 1)
    patches = torch.cat([patches, torch.ones(len(patches), 1).double()], 1)
    rows = wanted.movedim(1, -1).flatten(0, 2)
    found = patches @ torch.linalg.lstsq(patches, rows, driver="gelsd").solution
    return found.unflatten(0, (len(read), *wanted.shape[2:])).movedim(-1, 1)


def test_a_channel_that_hardly_gets_through_is_fitted_to_the_output_alone() -> None:
    torch.manual_seed(0)
    original = Block("norm").double().eval()
    with torch.no_grad():
        original.bn.weight[0] = 1e-3
    small = with_a_blind_stem(original)
    x, other = torch.randn(2, 40, 3, 5, 5, dtype=torch.float64)
    assert repaired(small, original, x, other)["conv"].accepted
    with torch.no_grad():
        read = small.stem(x)
        found, alone = small.conv(read), fitted(read, original.conv(original.stem(x)))
    torch.testing.assert_close(found[:, 0], alone[:, 0], rtol=1e-5, atol=1e-5)
    assert (found[:, 1] - alone[:, 1]).abs().max() > 0.1


@pytest.mark.parametrize("way", ["plain", "norm", "made later"])
@pytest.mark.parametrize("max_memory", [2**40, 0])
def test_a_repair_fits_the_sum_and_not_the_output_alone(way: str, max_memory: int) -> None:
    """What the repaired layer returns is the least-squares fit of the sum of the original."""
    torch.manual_seed(0)
    original = Block(way).double().eval()
    nn.init.uniform_(original.bn.running_var, 0.5, 1.5)
    nn.init.uniform_(original.bn.weight, -1.5, -0.5)
    small = with_a_blind_stem(original)
    x, other = torch.randn(2, 40, 3, 5, 5, dtype=torch.float64)
    repairs = repaired(small, original, x, other, max_memory)
    assert repairs["conv"].accepted

    with torch.no_grad():
        read = small.stem(x)
        rest = small.pool(read) if way == "made later" else read
        best, branch = fitted(read, original(x) - rest), small(x) - rest
    torch.testing.assert_close(branch, best, rtol=1e-5, atol=1e-5)


class Bypassed(Block):
    """Does without its stem where inputs are large."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) if x.mean() < 5 else x.mean(1, keepdim=True).expand(-1, 4, -1, -1)
        return x + self.conv(x)


@pytest.mark.parametrize("max_memory", [2**40, 0])
def test_a_summand_that_is_not_there_on_some_batch_is_told(max_memory: int) -> None:
    original = Bypassed("plain").double().eval()
    small = with_a_blind_stem(original)
    x, other = torch.randn(2, 8, 3, 5, 5, dtype=torch.float64)
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(LayerError, match="'conv': on some batch 'stem' did not run before it"):
        repaired(small, original, x, other + 10, max_memory)
    for name, value in small.state_dict().items():
        assert torch.equal(value, before[name]), name
