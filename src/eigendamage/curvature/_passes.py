"""Passes over the data, and what each adds to the layers' curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from eigendamage.batches import Batches, call
from eigendamage.curvature._capture import Capture, Sink, undisturbed
from eigendamage.curvature._head import Fisher, Head
from eigendamage.curvature._layer import LayerCurvature
from eigendamage.curvature._sinks import EigenvalueSink, FactorSink, GradientSink, PatchWish
from eigendamage.errors import LayerError, MismatchError, NonFiniteError
from eigendamage.layers import Layer, Trace
from eigendamage.progress import track


class Passes:
    """Goes over the data once for each sink, always with the same label draws."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        head: Head,
        fisher: Fisher,
        seed: int,
        progress: bool,
    ) -> None:
        self._model = model
        self._batches = batches
        self._head = head
        self._fisher: Fisher = fisher
        self._seed = seed
        self._progress = progress
        self.examples = 0

    def run(
        self,
        layers: Sequence[Layer],
        sink: Sink[Any],
        what: str,
        after_backward: Callable[[], None] | None = None,
    ) -> None:
        random = torch.Generator().manual_seed(self._seed)
        examples = 0
        shown = track(self._batches, what, total=len(self._batches) or None, enabled=self._progress)
        with undisturbed(self._model), Capture(layers, sink) as capture:
            for batch in shown:
                capture.expect(batch)
                output = call(self._model, batch)
                for seed in self._head.seeds(output, batch, self._fisher, random):
                    capture.backward(seed)
                    if after_backward is not None:
                        after_backward()
                examples += batch.size
        if self.examples and examples != self.examples:
            raise MismatchError(
                f"the first pass over the data saw {self.examples} examples, the next one "
                f"{examples}; give data that can be gone through more than once, such as a list"
            )
        self.examples = examples


def factors(
    layers: Sequence[Layer],
    passes: Passes,
    traced: Trace,
    home: torch.device | None,
    patches: PatchWish | None,
    what: str,
) -> dict[str, LayerCurvature]:
    """S, A, the mean, and A over whole patches if wished for, with their eigenbasis."""
    sink = FactorSink(home, patches)
    passes.run(layers, sink, what)
    examples = passes.examples
    found: dict[str, LayerCurvature] = {}
    for layer in layers:
        total = sink.sums.get(layer.name)
        if total is None:
            raise LayerError(layer.name, "no gradient reached it, though one did in a first probe")
        taps = total.positions * layer.offsets
        S, A, mean = total.output / examples, total.input / taps, total.total / taps
        for side, tensor in (("output gradients", S), ("inputs", A)):
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"layer '{layer.name}': the second moment of its {side} is not finite; they "
                    f"overflow or hold NaN. Check the weights, or run the model in float32"
                )
        shape = traced.layers[layer.name].shape
        known = LayerCurvature.from_factors(
            S, A, mean, examples, total.positions, shape, layer.spans()
        )
        if total.patches is not None and total.patch_total is not None:
            known = replace(
                known,
                patches=total.patches / total.positions,
                patch_mean=total.patch_total / total.positions,
            )
        found[layer.name] = known
    return found


def with_eigenvalues(
    layers: Sequence[Layer],
    curvature: Mapping[str, LayerCurvature],
    passes: Passes,
    traced: Trace,
    home: torch.device | None,
    what: str,
) -> dict[str, LayerCurvature]:
    """The layers with λ, and with the counts of the examples that it is of."""
    bases = {y.name: (curvature[y.name].Q_S, curvature[y.name].Q_A) for y in layers}
    sink = EigenvalueSink(bases, calls_of(traced), home)
    passes.run(layers, sink, what, sink.end_of_backward)
    found: dict[str, LayerCurvature] = {}
    for layer in layers:
        known, lam = curvature[layer.name], sink.sums[layer.name] / passes.examples
        if not bool(torch.isfinite(lam).all()):
            raise NonFiniteError(
                f"layer '{layer.name}': λ is not finite; its gradients overflow or hold NaN"
            )
        found[layer.name] = replace(
            known,
            eigenvalues=lam,
            examples=passes.examples,
            positions=round(known.positions / known.examples * passes.examples),
        )
    return found


def with_gradients(
    layers: Sequence[Layer],
    curvature: Mapping[str, LayerCurvature],
    passes: Passes,
    traced: Trace,
    home: torch.device | None,
    what: str,
) -> dict[str, LayerCurvature]:
    """The layers with the Fisher's diagonal and the first-order changes of their outputs."""
    sink = GradientSink(calls_of(traced), home)
    passes.run(layers, sink, what, sink.end_of_backward)
    found: dict[str, LayerCurvature] = {}
    for layer in layers:
        sums, examples = sink.sums[layer.name], passes.examples
        if not bool(torch.isfinite(sums.squares).all()):
            raise NonFiniteError(
                f"layer '{layer.name}': its squared gradients are not finite; they overflow or "
                f"hold NaN"
            )
        found[layer.name] = replace(
            curvature[layer.name],
            diagonal=sums.squares / examples,
            bias_diagonal=sums.bias_squares / examples,
            gates=sums.gates / examples,
        )
    return found


def calls_of(traced: Trace) -> dict[str, int]:
    """How often each layer runs."""
    return {name: layer.calls for name, layer in traced.layers.items()}
