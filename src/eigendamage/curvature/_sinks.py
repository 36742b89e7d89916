"""What is made of captured calls: sums that become S, A and λ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eigendamage.curvature._capture import gradients_by_example, inputs_by_example
from eigendamage.curvature._ekfac import eigenvalue_sum, gradient_norms
from eigendamage.curvature._factors import gram, input_moments
from eigendamage.errors import LayerError
from eigendamage.layers import Layer


@dataclass
class _InputPart:
    """What one call adds to the input side, until a gradient shows that the call counts."""

    moment: Tensor | None
    total: Tensor | None
    positions: int = 0


@dataclass
class FactorSums:
    """Running sums of one layer, on the device the factors live on."""

    output: Tensor
    input: Tensor
    total: Tensor
    positions: int = 0


class FactorSink:
    """Sums for S, A_c and the mean.

    The input side is reduced to (i × i) while the input is at hand, so that no activation is kept
    for it, and counted once the call's gradient arrives.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.sums: dict[str, FactorSums] = {}
        self._device = device

    def entered(self, layer: Layer, x: Tensor, examples: int) -> _InputPart:
        inputs = inputs_by_example(layer, x, examples)
        moment, total = input_moments(inputs, layer.geometry, name=layer.name)
        return _InputPart(moment, total)

    def left(self, layer: Layer, record: _InputPart, g: Tensor, examples: int) -> None:
        gradient = gradients_by_example(layer, g, examples)
        sums = self.sums.get(layer.name)
        if sums is None:
            home = self._device or g.device
            zeros = gradient.new_zeros
            sums = FactorSums(
                zeros((layer.outputs, layer.outputs), device=home),
                zeros((layer.inputs, layer.inputs), device=home),
                zeros((layer.inputs,), device=home),
            )
            self.sums[layer.name] = sums
        sums.output += gram(gradient).to(sums.output)
        if record.moment is not None and record.total is not None:
            sums.input += record.moment.to(sums.input)
            sums.total += record.total.to(sums.total)
            sums.positions += examples * gradient.shape[2]
            record.moment = record.total = None


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

    def entered(self, layer: Layer, x: Tensor, examples: int) -> _KeptInput:
        return _KeptInput(x, x._version)

    def left(self, layer: Layer, record: _KeptInput, g: Tensor, examples: int) -> None:
        if record.x._version != record.version:
            raise LayerError(
                layer.name,
                "its input was overwritten in place after the layer read it, so its gradient is "
                "lost; use an out-of-place operation there, or eigenvalues='kfac'",
            )
        pair = (
            inputs_by_example(layer, record.x, examples),
            gradients_by_example(layer, g, examples),
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


class TraceSink(_PairSink):
    """Sums of squared norms of the per-example weight gradients: the exact trace of each block."""

    def __init__(self, calls: Mapping[str, int]) -> None:
        super().__init__(calls)
        self.sums: dict[str, float] = {}

    def take(self, layer: Layer, calls: list[tuple[Tensor, Tensor]]) -> None:
        norm = float(gradient_norms(calls, layer.geometry))
        self.sums[layer.name] = self.sums.get(layer.name, 0.0) + norm
