"""estimate_curvature: one pass over the data for S and A, one for λ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from eigendamage.batches import Batch, Batches, Data, call, device_of
from eigendamage.curvature._capture import (
    Capture,
    Sink,
    preserved_random_state,
    probe_layout,
    undisturbed,
)
from eigendamage.curvature._curvature import Curvature, EigenvalueKind, LayerCurvature
from eigendamage.curvature._head import Fisher, Head
from eigendamage.curvature._losses import Loss, head_of, loss_name
from eigendamage.curvature._sinks import EigenvalueSink, FactorSink, FactorSums
from eigendamage.errors import (
    EigenDamageError,
    LayerError,
    MismatchError,
    NonFiniteError,
    NothingToCompressError,
)
from eigendamage.layers import Layer, LayerTrace, Trace, find_layers, trace
from eigendamage.progress import track


def estimate_curvature(
    model: nn.Module,
    data: Data,
    *,
    loss: Loss = "cross_entropy",
    fisher: Fisher = "mc",
    eigenvalues: EigenvalueKind = "ekfac",
    basis: Curvature | None = None,
    ignore: Iterable[str] = (),
    max_examples: int | None = None,
    layers_per_pass: int | None = None,
    factor_device: torch.device | str | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    seed: int = 0,
    progress: bool = True,
) -> Curvature:
    """Estimate the Fisher's Kronecker factors of every layer, and λ in their eigenbasis.

    Two passes over the data, each a forward and a backward pass that computes no weight gradients:
    one for S and A (Martens & Grosse 2015; Grosse & Martens 2016), one for λ (George et al. 2018).
    The model runs in eval mode and is left as it was: weights, gradients, hooks, modes, random
    state. Accumulators are float32 (float64 for float64 models), eigendecompositions float64.

    Args:
        model: the network. Its output, ``.logits`` of it, or the first item of a tuple is what the
            loss is taken of; the first axis is the batch.
        data: an iterable of batches: tensors, (input, label) pairs or dicts of keyword arguments
            (with ``labels``). It is gone through twice; an iterator is kept in memory for that.
        loss: ``cross_entropy`` (summed over positions), ``mse`` or ``bce`` (averaged over an
            example's outputs), or a function of (output, target) for ``fisher="empirical"``.
        fisher: ``mc`` draws labels from the model's own prediction, ``exact`` takes the
            expectation over them (one backward pass a class and position), ``empirical`` uses the
            data's labels. The first two need no labels.
        eigenvalues: ``ekfac`` for λ, ``kfac`` for Λ_S Λ_A, which saves the second pass.
        basis: an earlier curvature of the model. S, A and the eigenbasis are taken from it and only
            λ is estimated here, so that several shards of data can share one basis and merge
            exactly.
        ignore: shell patterns over dotted paths of layers to leave alone.
        max_examples: stop after that many examples. A batch of several tensors is not cut.
        layers_per_pass: stream: handle only so many layers in one pass over the data, which bounds
            memory to their factors and kept inputs at the price of more passes. Finished factors
            move to ``factor_device``.
        factor_device: where factors and eigenvalues accumulate and stay; the layer's own by
            default, the CPU when streaming.
        reduction: what a ``loss`` function that returns one number has done over the batch.
        seed: of the label draws. They are one a position in data order, so that neither batch size
            nor device changes them.
        progress: whether to show progress.

    Returns:
        A mapping from dotted path to `LayerCurvature`, in order of execution.

    Raises:
        NothingToCompressError: if the model has no compressible layer, or none that the loss
            depends on.
        DataError: if there is no example or a batch has a form that is not known.
        NonFiniteError: if inputs, weights, outputs or gradients hold a NaN or an infinity.
        LossError: if loss, output, labels and Fisher do not fit together.
        LayerError: if a layer's tensors cannot be told apart by example.
        MismatchError: if ``basis`` is of another model.
    """
    if fisher not in ("mc", "exact", "empirical"):
        raise EigenDamageError(f"fisher '{fisher}' is unknown; known are mc, exact, empirical")
    if eigenvalues not in ("ekfac", "kfac"):
        raise EigenDamageError(f"eigenvalues '{eigenvalues}' is unknown; known are ekfac, kfac")
    if layers_per_pass is not None and layers_per_pass < 1:
        raise EigenDamageError(f"layers_per_pass is {layers_per_pass}; it must be at least 1")
    if layers_per_pass is not None and factor_device is None:
        factor_device = "cpu"
    home = None if factor_device is None else torch.device(factor_device)
    head = head_of(loss, reduction)

    with preserved_random_state():
        batches = Batches(data, device_of(model), max_examples)
        survey = _survey(model, batches.peek(), ignore, head)
    _refuse_broken_weights(survey.layers.values())
    if basis is not None:
        _refuse_other_model(basis, survey.layers)
    passes = _Passes(model, batches, head, fisher, seed, progress)

    groups = _groups(list(survey.layers.values()), layers_per_pass)
    done: dict[str, LayerCurvature] = {}
    for index, group in enumerate(groups):
        part = "" if len(groups) == 1 else f" (layers {index + 1} of {len(groups)})"
        if basis is None:
            sink = FactorSink(home)
            passes.run(group, sink, f"S and A{part}")
            done.update(_factors(group, sink.sums, passes.examples, survey.trace))
        else:
            done.update({layer.name: basis[layer.name] for layer in group})
        if eigenvalues == "ekfac":
            lam = _eigenvalues(group, done, passes, survey.trace, home, f"λ{part}")
            for layer in group:
                known = done[layer.name]
                done[layer.name] = replace(
                    known,
                    eigenvalues=lam[layer.name],
                    examples=passes.examples,
                    positions=round(known.positions / known.examples * passes.examples),
                )
    return Curvature(
        layers={name: done[name] for name in survey.trace.layers if name in done},
        left_alone=survey.left_alone,
        classifier=survey.classifier,
        macs=survey.trace.macs,
        parameters=sum(p.numel() for p in model.parameters()),
        examples=passes.examples,
        loss=loss_name(loss),
        fisher=fisher,
        kind=eigenvalues,
    )


@dataclass(frozen=True)
class Survey:
    """What is known of a model before any data has gone through it in earnest.

    Attributes:
        layers: the compressible layers that run and get gradients, in order of execution.
        left_alone: why the others are not.
        trace: sizes, order and cost.
        classifier: the layers whose output is the model's.
    """

    layers: Mapping[str, Layer]
    left_alone: Mapping[str, str]
    trace: Trace
    classifier: tuple[str, ...]


def _survey(model: nn.Module, batch: Batch, ignore: Iterable[str], head: Head) -> Survey:
    found = find_layers(model, ignore=ignore)
    if not found.compressible:
        raise NothingToCompressError(
            "the model has no layer that can be compressed. " + _reasons(found.left_alone)
        )
    traced = trace(model, found.compressible, batch, head.starts)
    reached, unclear = probe_layout(model, found.compressible, batch, head)
    left_alone = dict(found.left_alone)
    layers: dict[str, Layer] = {}
    for name in (*traced.layers, *(n for n in found.compressible if n not in traced.layers)):
        if name not in traced.layers:
            left_alone[name] = "it did not run on the data given"
        elif name not in reached:
            left_alone[name] = "no gradient of the loss reaches it"
        elif name in unclear:
            left_alone[name] = unclear[name]
        else:
            layers[name] = found.compressible[name]
    if not layers:
        raise NothingToCompressError(
            "no compressible layer of the model can be handled. " + _reasons(left_alone)
        )
    classifier = tuple(n for n in layers if n in traced.outputs)
    if not traced.outputs:  # something without parameters comes after it
        classifier = (list(layers)[-1],)
    return Survey(layers, left_alone, traced, classifier)


class _Passes:
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
                capture.expect(batch.size)
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


def _factors(
    layers: Sequence[Layer],
    sums: Mapping[str, FactorSums],
    examples: int,
    traced: Trace,
) -> dict[str, LayerCurvature]:
    found: dict[str, LayerCurvature] = {}
    for layer in layers:
        total = sums.get(layer.name)
        if total is None:
            raise LayerError(layer.name, "no gradient reached it, though one did in a first probe")
        patches = total.positions * layer.offsets
        S, A, mean = total.output / examples, total.input / patches, total.total / patches
        for what, tensor in (("output gradients", S), ("inputs", A)):
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"layer '{layer.name}': the second moment of its {what} is not finite; they "
                    f"overflow or hold NaN. Check the weights, or run the model in float32"
                )
        found[layer.name] = LayerCurvature.from_factors(
            S, A, mean, examples, total.positions, traced.layers[layer.name].shape
        )
    return found


def _eigenvalues(
    layers: Sequence[Layer],
    curvature: Mapping[str, LayerCurvature],
    passes: _Passes,
    traced: Trace,
    home: torch.device | None,
    what: str,
) -> dict[str, torch.Tensor]:
    bases = {y.name: (curvature[y.name].Q_S, curvature[y.name].Q_A) for y in layers}
    sink = EigenvalueSink(bases, _calls(traced.layers), home)
    passes.run(layers, sink, what, sink.end_of_backward)
    found = {name: total / passes.examples for name, total in sink.sums.items()}
    for layer in layers:
        if not bool(torch.isfinite(found[layer.name]).all()):
            raise NonFiniteError(
                f"layer '{layer.name}': λ is not finite; its gradients overflow or hold NaN"
            )
    return found


def _calls(layers: Mapping[str, LayerTrace]) -> dict[str, int]:
    return {name: layer.calls for name, layer in layers.items()}


def _groups(layers: list[Layer], size: int | None) -> list[list[Layer]]:
    step = size or len(layers)
    return [layers[k : k + step] for k in range(0, len(layers), step)]


def _refuse_broken_weights(layers: Iterable[Layer]) -> None:
    for layer in layers:
        weight = layer.weight()
        if not bool(torch.isfinite(weight).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise NonFiniteError(
                f"layer '{layer.name}': {bad} of {weight.numel()} weights are NaN or infinite; "
                f"the model cannot be compressed as it is"
            )


def _refuse_other_model(basis: Curvature, layers: Mapping[str, Layer]) -> None:
    for name, layer in layers.items():
        if name not in basis:
            raise MismatchError(f"layer '{name}' of the model is not in the curvature given")
        expected = (layer.outputs, layer.inputs, layer.offsets)
        if tuple(basis[name].eigenvalues.shape) != expected:
            raise MismatchError(
                f"layer '{name}' has a weight of shape {expected} (o, i, K), but the curvature "
                f"given is for {tuple(basis[name].eigenvalues.shape)}"
            )


def _reasons(left_alone: Mapping[str, str]) -> str:
    if not left_alone:
        return "It has no module with parameters at all."
    shown = "; ".join(f"'{n}': {r}" for n, r in list(left_alone.items())[:6])
    more = len(left_alone) - 6
    return f"Left alone are {shown}" + (f"; and {more} more." if more > 0 else ".")
