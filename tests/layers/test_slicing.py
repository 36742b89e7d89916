"""Slicing a module keeps exactly the weights of the channels that stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from eigendamage.errors import EigenDamageError, LayerError, ShapeError
from eigendamage.layers import (
    ChannelGraph,
    ChannelGroup,
    FactoredConv2d,
    FactoredLinear,
    Kept,
    Member,
    Sides,
    kept_indices,
    remove_units,
    sides,
    slice_channels,
    zero_inputs,
)

DENSE = {
    "linear": (lambda: nn.Linear(6, 7), (2, 6)),
    "linear without bias": (lambda: nn.Linear(6, 7, bias=False), (2, 3, 6)),
    "conv": (lambda: nn.Conv2d(6, 7, 3, stride=2, padding=1), (2, 6, 5, 4)),
    "factored conv": (
        lambda: FactoredConv2d(
            nn.Conv2d(6, 3, 1, bias=False),
            nn.Conv2d(3, 2, 3, padding=1, bias=False),
            nn.Conv2d(2, 7, 1),
        ),
        (2, 6, 5, 4),
    ),
    "factored linear": (
        lambda: FactoredLinear(nn.Linear(6, 3, bias=False), nn.Linear(3, 7)),
        (2, 6),
    ),
}
CARRIERS = {
    "batch norm": (lambda: nn.BatchNorm2d(6), (4, 6, 3, 2)),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(6), (4, 6)),
    "batch norm of volumes": (lambda: nn.BatchNorm3d(6), (4, 6, 2, 2, 2)),
    "batch norm without parameters": (lambda: nn.BatchNorm2d(6, affine=False), (4, 6, 3, 2)),
    "batch norm without statistics": (
        lambda: nn.BatchNorm2d(6, track_running_stats=False),
        (4, 6, 3, 2),
    ),
    "instance norm": (lambda: nn.InstanceNorm2d(6, affine=True), (4, 6, 3, 2)),
    "instance norm without parameters": (lambda: nn.InstanceNorm2d(6), (4, 6, 3, 2)),
    "prelu": (lambda: nn.PReLU(6), (4, 6, 3, 2)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (4, 6, 3, 2)),
}


def _randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) + 0.2
    return module.double().eval()


def _channels(x: Tensor, kept: list[int], axis: int) -> Tensor:
    return x.index_select(axis, torch.tensor(kept))


@pytest.mark.parametrize("name", DENSE)
def test_a_sliced_layer_is_the_layer_on_what_it_keeps(name: str) -> None:
    build, shape = DENSE[name]
    layer = _randomised(build())
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    axis = 1 if x.ndim == 4 else -1
    outputs, inputs = [5, 0, 3], [4, 1, 2, 0]
    masked = torch.zeros_like(x)
    masked.index_copy_(axis, torch.tensor(inputs), _channels(x, inputs, axis))
    expected = _channels(layer(masked), outputs, axis)
    slice_channels(layer, outputs=outputs, inputs=inputs)
    torch.testing.assert_close(layer(_channels(x, inputs, axis)), expected, rtol=0, atol=1e-12)
    assert sides(layer) == Sides(outputs=3, inputs=4)


@pytest.mark.parametrize("side", ["outputs", "inputs"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CARRIERS)
def test_a_sliced_carrier_treats_the_rest_as_before(name: str, training: bool, side: str) -> None:
    build, shape = CARRIERS[name]
    carrier = _randomised(build()).train(training)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = [4, 0, 3]
    expected = _channels(carrier(x), kept, 1)
    sliced = _randomised(build()).train(training)
    slice_channels(sliced, **{side: kept})
    torch.testing.assert_close(sliced(_channels(x, kept, 1)), expected, rtol=0, atol=1e-12)
    assert sides(sliced) == Sides(3, 3)
    for (_, before), (_, after) in zip(
        carrier.named_buffers(), sliced.named_buffers(), strict=True
    ):
        torch.testing.assert_close(after, before[kept] if before.ndim else before)


def test_frozen_parameters_types_and_formats_stay() -> None:
    conv = nn.Conv2d(6, 4, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    conv.weight.grad, conv.bias.grad = None, torch.ones(4, dtype=torch.bfloat16)
    slice_channels(conv, outputs=[1, 2], inputs=[0, 5, 3])
    assert conv.weight.shape == (2, 3, 3, 3)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert conv.weight.dtype == conv.bias.dtype == torch.bfloat16
    assert not conv.weight.requires_grad
    assert conv.bias.requires_grad
    assert conv.bias.grad is None
    assert isinstance(conv.weight, nn.Parameter)


def test_nothing_asked_is_nothing_done() -> None:
    layer = nn.Linear(3, 2)
    weight = layer.weight
    slice_channels(layer)
    assert layer.weight is weight


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.LayerNorm(4), "LayerNorm"),
        (nn.GroupNorm(2, 4), "GroupNorm"),
        (nn.Conv2d(4, 4, 1, groups=2), "grouped Conv2d (groups=2)"),
        (nn.Conv2d(2, 4, 1, groups=2), "grouped Conv2d (groups=2)"),
        (nn.ConvTranspose2d(4, 4, 1), "ConvTranspose2d"),
        (nn.Conv1d(4, 4, 1), "Conv1d"),
    ],
)
def test_other_modules_are_refused_by_name(module: nn.Module, kind: str) -> None:
    with pytest.raises(LayerError, match=r"layer 'a\.b'") as caught:
        slice_channels(module, outputs=[0], name="a.b")
    assert kind in str(caught.value)


def test_a_parametrized_weight_is_refused() -> None:
    with pytest.raises(LayerError, match="parametrized"):
        slice_channels(parametrizations.weight_norm(nn.Linear(3, 2)), outputs=[0])


@pytest.mark.parametrize(
    ("outputs", "inputs", "said"),
    [
        ([], None, "no output channel would be left"),
        (None, [], "no input channel would be left"),
        ([0, 0], None, "named twice"),
        ([2], None, "does not exist"),
        (None, [-1], "does not exist"),
    ],
)
def test_channels_that_cannot_be_kept_are_refused(
    outputs: list[int] | None, inputs: list[int] | None, said: str
) -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(ShapeError, match=said):
        slice_channels(layer, outputs=outputs, inputs=inputs)
    assert layer.weight.shape == (2, 3)


def test_a_carrier_has_one_set_of_channels() -> None:
    with pytest.raises(ShapeError, match="both sides"):
        slice_channels(nn.BatchNorm2d(3), outputs=[0], inputs=[1])


@pytest.mark.parametrize("name", DENSE)
def test_zeroed_inputs_are_not_read(name: str) -> None:
    build, shape = DENSE[name]
    layer = _randomised(build())
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    axis = 1 if x.ndim == 4 else -1
    before = layer(x.index_fill(axis, torch.tensor([0, 2]), 0.0))
    zero_inputs(layer, [2, 0])
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-12)


def test_only_readers_have_inputs_to_zero() -> None:
    with pytest.raises(LayerError, match="BatchNorm2d"):
        zero_inputs(nn.BatchNorm2d(3), [0])
    with pytest.raises(LayerError, match="no weights by input channel"):
        zero_inputs(nn.Conv2d(3, 3, 1, groups=3), [0])
    with pytest.raises(ShapeError, match="does not exist"):
        zero_inputs(nn.Linear(3, 2), [3])


def _singles(count: int, start: int = 0) -> tuple[tuple[int, ...], ...]:
    return tuple((i,) for i in range(start, start + count))


def _concatenation() -> ChannelGraph:
    """``first`` (2) and ``second`` (3) make what ``norm`` passes on and ``last`` reads."""

    def group(name: str, size: int, start: int) -> ChannelGroup:
        there = _singles(size, start)
        return ChannelGroup(
            size=size,
            producers=(Member(module=name, indices=_singles(size)),),
            carriers=(Member(module="norm", indices=there),),
            readers=(Member(module="last", indices=there),),
        )

    return ChannelGraph(
        groups={"first": group("first", 2, 0), "second": group("second", 3, 2)},
        carriers={},
        left_alone={},
    )


SIZES = {"first": Sides(2, 7), "second": Sides(3, 7), "norm": Sides(5, 5), "last": Sides(4, 5)}


def test_what_a_module_keeps_is_the_rest_of_what_all_its_groups_lose() -> None:
    kept = kept_indices(_concatenation(), {"first": [1], "second": [0, 2]}, SIZES)
    assert kept == {
        "first": Kept((0,), None),
        "second": Kept((1,), None),
        "norm": Kept((0, 3), None),
        "last": Kept(None, (0, 3)),
    }
    assert kept_indices(_concatenation(), {"first": []}, SIZES) == {}


@pytest.mark.parametrize(
    ("dropped", "said"),
    [
        ({"third": [0]}, "no group of channels 'third'; groups are: first, second"),
        ({"second": [3]}, "units 0 to 2, no unit 3"),
        ({"first": [-1]}, "no unit -1"),
        ({"first": [0, 1]}, "layer 'first': all its 2 output channels would go"),
    ],
)
def test_units_that_cannot_go_are_refused(dropped: dict[str, list[int]], said: str) -> None:
    with pytest.raises(EigenDamageError, match=said):
        kept_indices(_concatenation(), dropped, SIZES)


def test_a_graph_of_another_model_is_refused_and_nothing_changed() -> None:
    model = nn.ModuleDict(
        {
            "first": nn.Linear(7, 2),
            "second": nn.Linear(7, 3),
            "norm": nn.BatchNorm1d(5),
            "last": nn.Linear(4, 4),
        }
    )
    with pytest.raises(ShapeError, match="layer 'last': input channel 4 does not exist"):
        remove_units(model, _concatenation(), {"second": [2]})
    assert [sides(m) for m in model.values()] == [(2, 7), (3, 7), (5, 5), (4, 4)]
