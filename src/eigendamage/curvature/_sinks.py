"""What is made of each side of captured calls: sums that become S and A."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigendamage.batch import Batch
from eigendamage.curvature._capture import (
    counted_positions,
    gradients_by_example,
    inputs_by_example,
)
from eigendamage.curvature._factors import gram, input_moments
from eigendamage.curvature._patches import PositionDraws, patch_moments
from eigendamage.distributed import summed, summed_counts
from eigendamage.layers import Layer


@dataclass
class _InputPart:
    """What one call adds to the input side, until a gradient shows that the call counts.

    Moment and total of the channels, and of whole patches where they are wanted.
    """

    channels: tuple[Tensor, Tensor] | None
    patches: tuple[Tensor, Tensor] | None


@dataclass
class FactorSums:
    """Running sums of one layer, on the device the factors live on."""

    output: Tensor
    input: Tensor
    total: Tensor
    patches: Tensor | None
    patch_total: Tensor | None
    positions: int = 0

    def reduced(self, positions: int) -> FactorSums:
        """The sums over all processes, given that of the positions."""
        output, into, total, *patches = summed(
            [
                part
                for part in (self.output, self.input, self.total, self.patches, self.patch_total)
                if part is not None
            ]
        )
        patch_moment, patch_total = patches or (None, None)
        return FactorSums(output, into, total, patch_moment, patch_total, positions)


@dataclass(frozen=True)
class PatchWish:
    """That the second moment of whole patches is wanted too.

    Attributes:
        calls: how often each layer runs; those that run several times are read at all positions.
        draws: which positions of the others are read; None for all.
    """

    calls: Mapping[str, int]
    draws: PositionDraws | None

    @staticmethod
    def of(
        layers: Mapping[str, Layer], calls: Mapping[str, int], positions: int | None, seed: int
    ) -> PatchWish:
        """At most so many positions of an example, drawn; None for all of them."""
        if positions is None:
            return PatchWish(calls, None)
        drawing = [n for n, layer in layers.items() if has_patches(layer) and calls[n] == 1]
        return PatchWish(calls, PositionDraws(positions, seed, drawing))


def has_patches(layer: Layer) -> bool:
    """Whether a layer's patches are more than its channels."""
    return layer.geometry is not None and layer.geometry.offsets > 1


def accumulated_like(layer: Layer) -> Tensor:
    """An empty tensor on a layer's device, of the type that its sums are of."""
    weight = layer.weight()
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_empty(0, dtype=wide)


class FactorSink:
    """Sums for S, A_c and the mean, and for A over whole patches where it is wished for.

    The input side is reduced to its moments while the input is at hand, so that no activation is
    kept for it, and counted once the call's gradient arrives.
    """

    def __init__(self, device: torch.device | None, patches: PatchWish | None = None) -> None:
        self.sums: dict[str, FactorSums] = {}
        self._device = device
        self._patches = patches

    def entered(self, layer: Layer, x: Tensor, batch: Batch) -> _InputPart:
        inputs = inputs_by_example(layer, x, batch)
        channels = input_moments(inputs, layer.geometry, name=layer.name)
        return _InputPart(channels, self._patch_part(layer, inputs))

    def start_at(self, example: int) -> None:
        """Say which example of the data the next batch begins with."""
        if self._patches is not None and self._patches.draws is not None:
            self._patches.draws.start_at(example)

    def _patch_part(self, layer: Layer, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
        wish, geometry = self._patches, layer.geometry
        if wish is None or geometry is None or not has_patches(layer):
            return None
        draws = wish.draws if wish.calls[layer.name] == 1 else None
        rows, columns = geometry.output_size(inputs.shape[2], inputs.shape[3])
        at = None if draws is None else draws.draw(layer.name, len(inputs), rows * columns)
        return patch_moments(inputs, geometry, at)

    def left(self, layer: Layer, record: _InputPart, g: Tensor, batch: Batch) -> None:
        gradient = gradients_by_example(layer, g, batch)
        sums = self.sums.get(layer.name)
        if sums is None:
            sums = self._empty(layer, gradient)
            self.sums[layer.name] = sums
        sums.output += gram(gradient).to(sums.output)
        if record.channels is not None:
            sums.input += record.channels[0].to(sums.input)
            sums.total += record.channels[1].to(sums.total)
            counted = counted_positions(layer, batch, gradient.shape[2])
            every = batch.size * gradient.shape[2]
            sums.positions += every if counted is None else int(counted.sum())
            record.channels = None
        if record.patches is not None and sums.patches is not None:
            assert sums.patch_total is not None
            sums.patches += record.patches[0].to(sums.patches)
            sums.patch_total += record.patches[1].to(sums.patch_total)
            record.patches = None

    def _empty(self, layer: Layer, like: Tensor) -> FactorSums:
        home = self._device or like.device
        o, i, m = layer.outputs, layer.inputs, layer.inputs * layer.offsets
        whole = self._patches is not None and has_patches(layer)
        return FactorSums(
            like.new_zeros((o, o), device=home),
            like.new_zeros((i, i), device=home),
            like.new_zeros((i,), device=home),
            like.new_zeros((m, m), device=home) if whole else None,
            like.new_zeros((m,), device=home) if whole else None,
        )

    def reduced(self, layers: Sequence[Layer]) -> dict[str, FactorSums]:
        """The sums over the batches of all processes, without layers that no gradient reached."""
        mine = [self.sums.get(y.name) or self._empty(y, accumulated_like(y)) for y in layers]
        positions = summed_counts([sums.positions for sums in mine])
        return {
            layer.name: sums.reduced(count)
            for layer, sums, count in zip(layers, mine, positions, strict=True)
            if count
        }
