"""What is made of captured calls: sums that become S, A and λ."""

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
from eigendamage.curvature._ekfac import eigenvalue_sum, gradient_moments, gradient_norms
from eigendamage.curvature._factors import gram, input_moments
from eigendamage.curvature._patches import PositionDraws, patch_moments
from eigendamage.distributed import summed, summed_counts
from eigendamage.errors import LayerError
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


@dataclass
class _KeptInput:
    """An input that waits for its gradient, and its version, to notice if it is overwritten."""

    x: Tensor
    version: int


def accumulated_like(layer: Layer) -> Tensor:
    """An empty tensor on a layer's device, of the type that its sums are of."""
    weight = layer.weight()
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_empty(0, dtype=wide)


class _PairSink:
    """Brings the input and the gradient of each call together, for all calls of a module."""

    def __init__(self, calls: Mapping[str, int]) -> None:
        self._calls = calls
        self._pending: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._seen: set[str] = set()
        self._layers: dict[str, Layer] = {}

    def entered(self, layer: Layer, x: Tensor, batch: Batch) -> _KeptInput:
        return _KeptInput(x, x._version)

    def left(self, layer: Layer, record: _KeptInput, g: Tensor, batch: Batch) -> None:
        if record.x._version != record.version:
            raise LayerError(
                layer.name,
                "its input was overwritten in place after the layer read it, so its gradient is "
                "lost; use an out-of-place operation there, or eigenvalues='kfac'",
            )
        pair = (
            inputs_by_example(layer, record.x, batch),
            gradients_by_example(layer, g, batch),
        )
        if self._calls[layer.name] > 1:
            self._pending.setdefault(layer.name, []).append(pair)
            self._layers[layer.name] = layer
            return
        if layer.name in self._seen:
            raise LayerError(
                layer.name,
                "it ran more often than in the first batch; the number of times a layer runs must "
                "be the same for all inputs. Leave it alone with ignore=",
            )
        self._seen.add(layer.name)
        self.take(layer, [pair])

    def end_of_backward(self) -> None:
        """Deal with the layers that run several times, whose gradients add up first."""
        for name, pairs in self._pending.items():
            self.take(self._layers[name], pairs)
        self._pending.clear()
        self._seen.clear()

    def take(self, layer: Layer, calls: list[tuple[Tensor, Tensor]]) -> None:
        """All calls of one layer in one backward pass."""
        raise TypeError("a pair sink says what to do with the pairs")


class EigenvalueSink(_PairSink):
    """Sums for λ in given bases."""

    def __init__(
        self,
        bases: Mapping[str, tuple[Tensor, Tensor]],
        calls: Mapping[str, int],
        device: torch.device | None,
    ) -> None:
        super().__init__(calls)
        self._bases = dict(bases)
        self._device = device
        self.sums: dict[str, Tensor] = {}

    def take(self, layer: Layer, calls: list[tuple[Tensor, Tensor]]) -> None:
        Q_S, Q_A = (q.to(calls[0][1]) for q in self._bases[layer.name])
        found = eigenvalue_sum(calls, Q_S, Q_A, layer.geometry)
        home = self._device or found.device
        if layer.name in self.sums:
            self.sums[layer.name] += found.to(home)
        else:
            self.sums[layer.name] = found.to(home)

    def reduced(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """The sums over the batches of all processes."""
        return {y.name: summed([self.sums.get(y.name, self._empty(y))])[0] for y in layers}

    def _empty(self, layer: Layer) -> Tensor:
        like = accumulated_like(layer)
        return like.new_zeros(
            (layer.outputs, layer.inputs, layer.offsets), device=self._device or like.device
        )


@dataclass
class GradientMoments:
    """Sums over examples of one layer's per-example gradients.

    Attributes:
        squares: of each weight's, (o, i, K).
        bias_squares: of each bias's, (o,).
        gates: of each output's gradient times its weights and bias, squared, (o,).
    """

    squares: Tensor
    bias_squares: Tensor
    gates: Tensor

    def add(self, other: GradientMoments) -> None:
        """Add the sums of further examples."""
        self.squares += other.squares.to(self.squares)
        self.bias_squares += other.bias_squares.to(self.bias_squares)
        self.gates += other.gates.to(self.gates)


class GradientSink(_PairSink):
    """Sums for the Fisher's diagonal and for the first-order change of the loss."""

    def __init__(self, calls: Mapping[str, int], device: torch.device | None) -> None:
        super().__init__(calls)
        self._device = device
        self.sums: dict[str, GradientMoments] = {}

    def take(self, layer: Layer, calls: list[tuple[Tensor, Tensor]]) -> None:
        home = self._device or calls[0][1].device
        weight, bias = layer.weight().to(calls[0][1]), layer.bias()
        found = GradientMoments(*gradient_moments(calls, weight, bias, layer.geometry))
        known = self.sums.get(layer.name)
        if known is None:
            self.sums[layer.name] = GradientMoments(
                found.squares.to(home), found.bias_squares.to(home), found.gates.to(home)
            )
        else:
            known.add(found)

    def reduced(self, layers: Sequence[Layer]) -> dict[str, GradientMoments]:
        """The sums over the batches of all processes."""
        mine = ((y.name, self.sums.get(y.name) or self._empty(y)) for y in layers)
        return {
            name: GradientMoments(*summed([sums.squares, sums.bias_squares, sums.gates]))
            for name, sums in mine
        }

    def _empty(self, layer: Layer) -> GradientMoments:
        like = accumulated_like(layer)
        home = self._device or like.device
        o, i, K = layer.outputs, layer.inputs, layer.offsets
        return GradientMoments(
            like.new_zeros((o, i, K), device=home),
            like.new_zeros((o,), device=home),
            like.new_zeros((o,), device=home),
        )


class TraceSink(_PairSink):
    """Sums of squared norms of the per-example weight gradients: the exact trace of each block."""

    def __init__(self, calls: Mapping[str, int]) -> None:
        super().__init__(calls)
        self.sums: dict[str, float] = {}

    def take(self, layer: Layer, calls: list[tuple[Tensor, Tensor]]) -> None:
        norm = float(gradient_norms(calls, layer.geometry))
        self.sums[layer.name] = self.sums.get(layer.name, 0.0) + norm
