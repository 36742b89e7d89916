"""What is made of each call's input and gradient together: λ, diagonals and traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigendamage.batch import Batch
from eigendamage.curvature._capture import gradients_by_example, inputs_by_example
from eigendamage.curvature._ekfac import eigenvalue_sum, gradient_moments, gradient_norms
from eigendamage.curvature._sinks import accumulated_like
from eigendamage.distributed import summed
from eigendamage.errors import LayerError
from eigendamage.layers import Layer


@dataclass
class _KeptInput:
    """An input that waits for its gradient, and its version, to notice if it is overwritten."""

    x: Tensor
    version: int


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
