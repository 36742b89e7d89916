"""Layers and groups of channels as the prices see them: tensors in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.curvature import LayerCurvature
from eigendamage.errors import EigenDamageError
from eigendamage.plan.prices._inverse import damped, inverse


@dataclass(frozen=True, eq=False)
class LayerView:
    """A layer's weight and curvature, with what is computed from them at most once.

    Attributes:
        name: dotted path.
        weight: (o, i, K).
        bias: (o,), if it has one.
        curvature: of the layer.
        damping: added to S and A, relative to their mean diagonal.
        factored: whether its weight is a product of stages, which is not repaired: the result would
            not fit its ranks.
    """

    name: str
    weight: Float[Tensor, "o i K"]
    bias: Float[Tensor, " o"] | None
    curvature: LayerCurvature
    damping: float
    factored: bool = False

    def with_bias(self) -> LayerView:
        """The same layer with a bias, of zeros if it has none."""
        if self.bias is not None:
            return self
        shape = replace(self.curvature.shape, bias=True)
        return replace(
            self,
            bias=self.weight.new_zeros(len(self.weight)),
            curvature=replace(self.curvature, shape=shape),
        )

    @cached_property
    def W(self) -> Float[Tensor, "o m"]:
        """The weight as a matrix, (o, iK), with the bias as a last column if there is one."""
        flat = self.weight.double().cpu().flatten(1)
        if self.bias is None:
            return flat
        return torch.cat([flat, self.bias.double().cpu().unsqueeze(1)], 1)

    @cached_property
    def S(self) -> Float[Tensor, "o o"]:
        """The gradients' factor, damped."""
        return damped(self.curvature.S.cpu(), self.damping)

    @cached_property
    def A(self) -> Float[Tensor, "m m"]:
        """The inputs' factor over whole patches and the bias, damped."""
        return damped(self.curvature.patch_factor(self.name), self.damping)

    @cached_property
    def S_inverse(self) -> Float[Tensor, "o o"]:
        """Of the damped S."""
        return inverse(self.curvature.S.cpu(), self.damping)

    @cached_property
    def A_inverse(self) -> Float[Tensor, "m m"]:
        """Of the damped A."""
        return inverse(self.curvature.patch_factor(self.name), self.damping)

    def columns(self, inputs: Sequence[int]) -> list[int]:
        """The columns of W that read these inputs: all their kernel offsets."""
        K = self.weight.shape[2]
        return [c * K + k for c in inputs for k in range(K)]

    def kept_columns(self, inputs: Sequence[int]) -> list[int]:
        """The columns of W that read these inputs, and the bias, which always stays."""
        return self.columns(inputs) + ([] if self.bias is None else [self.W.shape[1] - 1])


@dataclass(frozen=True, eq=False)
class End:
    """A layer that makes or reads the channels of a group.

    Attributes:
        layer: the layer.
        units: for each unit of the group, the layer's outputs or inputs that go with it.
    """

    layer: LayerView
    units: Sequence[Sequence[int]]

    def summed(self, by_channel: Float[Tensor, " c"]) -> Float[Tensor, " units"]:
        """What is known of each channel, added up by unit."""
        return by_channel[torch.tensor(self.units)].sum(1)


@dataclass(frozen=True, eq=False)
class GroupView:
    """Channels that go together.

    Attributes:
        name: of the group.
        size: number of units.
        producers: the layers that make them.
        readers: the layers that read them.
        scales: |γ| of each batch norm that they go through, by its dotted path, (size,).
    """

    name: str
    size: int
    producers: Sequence[End]
    readers: Sequence[End]
    scales: Mapping[str, Float[Tensor, " units"]]


GroupPrices = Mapping[str, Float[Tensor, " units"]]
"""For each layer (or norm) that a group's price is made of, its part of the price of each unit."""


def estimated(layer: LayerView, what: Tensor | None) -> Tensor:
    """A part of a layer's curvature that comes with its gradients, in float64 on the CPU.

    Raises:
        EigenDamageError: if it was not estimated.
    """
    if what is None:
        raise EigenDamageError(
            f"layer '{layer.name}': per-example gradients are needed and were not estimated; give "
            f"also=('gradients',) to estimate_curvature"
        )
    return what.double().cpu()
