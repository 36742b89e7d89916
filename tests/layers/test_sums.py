"""Sums are found where a layer's output goes into one, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eigendamage.batches import Batch, Batches
from eigendamage.layers import Port, Sum, find_layers, find_sums
from eigendamage.surgery import repair_model
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
            case _:
                raise AssertionError(self.way)


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


@pytest.mark.parametrize("way", ["plain", "norm", "made later"])
@pytest.mark.parametrize("max_memory", [2**40, 0])
def test_a_repair_fits_the_sum_and_not_the_output_alone(way: str, max_memory: int) -> None:
    """What the repaired layer returns is the least-squares fit of the sum of the original."""
    torch.manual_seed(0)
    original = Block(way).double().eval()
    nn.init.uniform_(original.bn.running_var, 0.5, 1.5)
    nn.init.uniform_(original.bn.weight, -1.5, -0.5)
    small = copy.deepcopy(original)
    with torch.no_grad():  # an error in the stem that no later layer can read off its input
        small.stem.weight[0] = 0
        small.stem.bias[0] = 0
    x, other = torch.randn(2, 40, 3, 5, 5, dtype=torch.float64)
    repairs = repair_model(
        small,
        original,
        [batch_of(x)],
        held_out=[batch_of(other)],
        curvature=None,
        layers=["conv"],
        ridge=0.0,
        positions=25,
        max_memory=max_memory,
        progress=False,
    )
    assert repairs["conv"].accepted

    with torch.no_grad():
        read = small.stem(x)
        patches = F.unfold(read, 3, padding=1).transpose(1, 2).flatten(0, 1)
        patches = torch.cat([patches, torch.ones(len(patches), 1).double()], 1)
        rest = small.pool(read) if way == "made later" else read
        missing = (original(x) - rest).movedim(1, -1).flatten(0, 2)
        best = patches @ torch.linalg.lstsq(patches, missing, driver="gelsd").solution
        branch = (small(x) - rest).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(branch, best, rtol=1e-5, atol=1e-5)
