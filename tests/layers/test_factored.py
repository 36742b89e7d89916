"""The depthwise form: one layer in three stages, found as one, and counted as torch counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eigendamage import EigenDamageError
from eigendamage.batches import Batches
from eigendamage.layers import (
    FORMS,
    ConvGeometry,
    FactoredConv2d,
    LayerShape,
    balance,
    find_layers,
    trace,
)
from tests.cases import CONVOLUTIONS, convolution

KERNELS = [name for name in CONVOLUTIONS if not name.startswith("pointwise")]
every_kernel = pytest.mark.parametrize("name", KERNELS)


def depthwise(name: str, rank: int, inputs: int = 3, outputs: int = 4) -> FactoredConv2d:
    """A depthwise form of a convolution of the table, with random weights."""
    torch.manual_seed(0)
    dense = convolution(name, inputs, outputs)
    core = nn.Conv2d(
        rank,
        rank,
        dense.kernel_size,
        dense.stride,
        dense.padding,
        dense.dilation,
        groups=rank,
        bias=False,
        padding_mode=dense.padding_mode,
    )
    return FactoredConv2d(
        nn.Conv2d(inputs, rank, 1, bias=False),
        core,
        nn.Conv2d(rank, outputs, 1, bias=dense.bias is not None),
    ).double()


def as_one(layer: FactoredConv2d, name: str) -> nn.Conv2d:
    """The dense convolution of the same function."""
    dense = convolution(name, layer.in_channels, layer.out_channels).double()
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        if dense.bias is not None and layer.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=torch.manual_seed(seed))


@every_kernel
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_its_weight_is_that_of_the_dense_layer(name: str, rank: int) -> None:
    layer = depthwise(name, rank)
    torch.testing.assert_close(layer(images()), as_one(layer, name)(images()))


@every_kernel
def test_its_layout_names_the_channels_of_the_core(name: str) -> None:
    layer = depthwise(name, 5)
    assert layer.layout == ("depthwise", 5, 5)
    assert layer.core is layer[1]
    assert layer.kernel_size == as_one(layer, name).kernel_size
    assert layer.stride == as_one(layer, name).stride


def test_one_channel_is_the_dense_form_of_ranks_one() -> None:
    layer = depthwise("padded", 1)
    assert layer.layout == ("three", 1, 1)
    shape = LayerShape(4, 3, 9, False, 10.0, 5.0)
    assert shape.factored(1, 1, "three") == shape.factored(1, 1, "depthwise")


@every_kernel
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_its_cost_is_what_torch_counts(name: str, rank: int) -> None:
    layer, x = depthwise(name, rank), images()
    counter = FlopCounterMode(display=False)
    with counter:
        out = layer(x)
    shape = LayerShape(
        outputs=4,
        inputs=3,
        offsets=layer.core.weight[0, 0].numel(),
        bias=layer.bias is not None,
        positions_in=float(x[0, 0].numel()),
        positions_out=float(out[0, 0].numel()),
    )
    cost = shape.factored(rank, rank, "depthwise")
    assert cost.macs == counter.get_total_flops() / 2 / len(x)
    assert cost.parameters == sum(p.numel() for p in layer.parameters())


def test_a_depthwise_stage_has_one_rank() -> None:
    with pytest.raises(EigenDamageError, match=r"ranks \(3, 2\)"):
        LayerShape(4, 3, 9, True, 1.0, 1.0).factored(3, 2, "depthwise")


def test_the_forms_that_are_chosen_among_are_of_one_product() -> None:
    assert FORMS == ("three", "merge_in", "merge_out")


@every_kernel
def test_it_is_found_as_one_layer_with_the_geometry_of_the_dense_one(name: str) -> None:
    layer = depthwise(name, 5)
    dense = as_one(layer, name)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2, dtype=torch.float64))
    model(images())
    found = find_layers(model)
    assert list(found.compressible) == ["0", "3"]
    assert not found.left_alone
    one = found.compressible["0"]
    assert (one.outputs, one.inputs) == (4, 3)
    assert one.geometry == ConvGeometry.of(dense)
    torch.testing.assert_close(one.weight(), dense.weight.detach().flatten(2))
    assert (one.bias() is None) == (dense.bias is None)


def test_the_trace_sees_its_outer_sizes() -> None:
    model = nn.Sequential(depthwise("strided", 5))
    found = find_layers(model).compressible
    batch = next(iter(Batches([images()], torch.device("cpu"))))
    shape = trace(model, found, batch).layers["0"].shape
    assert (shape.positions_in, shape.positions_out) == (42, 12)
    assert found["0"].cost(shape) == shape.factored(5, 5, "depthwise")


def test_gradients_reach_every_stage_and_a_step_lowers_the_loss() -> None:
    layer, x = depthwise("strided", 5), images()
    target = torch.zeros_like(layer(x))
    before = nn.functional.mse_loss(layer(x), target)
    before.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert nn.functional.mse_loss(layer(x), target) < before


def test_its_weight_carries_gradients() -> None:
    layer = depthwise("padded", 2)
    layer.weight.square().sum().backward()
    assert all(s.weight.grad is not None for s in layer)


def test_balanced_stages_have_equal_norms_and_the_same_product() -> None:
    layer = depthwise("padded", 5)
    before = layer.weight.detach().clone()
    weights = [s.weight.detach() * scale for s, scale in zip(layer, (100, 0.1, 0.1), strict=True)]
    with torch.no_grad():
        for stage, weight in zip(layer, balance(weights), strict=True):
            stage.weight.copy_(weight)
    torch.testing.assert_close(layer.weight, before)
    norms = torch.stack([s.weight.norm() for s in layer])
    torch.testing.assert_close(norms, norms.mean().expand(3))
