"""MACs and parameters of a whole model, in closed form for its layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from eigendamage.batches import Batches, Data
from eigendamage.calls import device_of
from eigendamage.curvature import preserved_random_state
from eigendamage.layers import Cost, find_layers, trace


@dataclass(frozen=True)
class Count:
    """What one example costs, and how many parameters there are.

    Attributes:
        macs: multiply-accumulates of the whole model, as ``torch.utils.flop_counter`` counts them
            (two operations each).
        parameters: all parameters, shared ones once.
        layers: the compressible layers that ran, each in closed form from its sizes.
    """

    macs: float
    parameters: int
    layers: dict[str, Cost]


def count(model: nn.Module, data: Data) -> Count:
    """Count MACs and parameters; the data gives the size of one example (two are run).

    Raises:
        DataError: if there is no example.
    """
    layers = find_layers(model).compressible
    with preserved_random_state():
        traced = trace(model, layers, Batches(data, device_of(model)).peek())
    return Count(
        macs=traced.macs,
        parameters=sum(p.numel() for p in model.parameters()),
        layers={name: layers[name].cost(t.shape) for name, t in traced.layers.items()},
    )
