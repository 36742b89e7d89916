"""What a change costs when everything else stays: the measured divergence, no labels."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.batches import Batches, Data
from eigendamage.calls import device_of, logits_of, tried_call
from eigendamage.curvature import Loss, preserved_random_state
from eigendamage.errors import NonFiniteError
from eigendamage.layers import Layer, Layers, evaluating, find_layers
from eigendamage.measure._change import (
    Change,
    changed_layers,
    predictive_head,
    response,
    rewritten_outputs,
)
from eigendamage.progress import track

Function = Callable[[Tensor], Tensor]

# Of the outputs that are kept for one batch: layers beyond it are computed again.
_MOST_BYTES = 2**30


def divergences_alone(
    model: nn.Module,
    replaced: Mapping[str, Sequence[Mapping[str, Change]]],
    data: Data,
    *,
    loss: Loss = "cross_entropy",
    max_examples: int | None = None,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Measure what each of several changes costs in the otherwise original model.

    Cost: one pass over the data. Each batch runs once for the original and once for each variant,
    where layers that run before the first changed one are not computed again: their outputs for
    one batch are kept, up to a gibibyte.

    Args:
        model: the original; its weights are not touched.
        replaced: by a name of the caller's (a layer, a group of channels), the variants to
            measure one at a time. A variant is a set of changes that are made together, by the
            dotted paths of their layers.
        data: batches; labels serve only to tell which positions are ignored.
        loss: as in `estimate_curvature`, but a name.
        max_examples: stop after that many examples.
        progress: whether to show progress.

    Returns:
        For each name and variant the divergence as `evaluate` measures it: the mean over examples
        of KL(original ‖ variant) in nats for cross-entropy.

    Raises:
        MismatchError: if a changed layer is none of those that can be compressed.
        ShapeError: if a new weight or bias has another shape than the layer's.
        LossError: if the loss is a function.
        DataError: if there is no example.
        NonFiniteError: if an input or an output, of the model or of a variant, is not finite.
    """
    head = predictive_head(loss)
    found = find_layers(model)
    layers = list(found.compressible.values())
    variants = {
        name: [_functions(found, changes) for changes in several]
        for name, several in replaced.items()
    }
    totals = {name: [0.0] * len(several) for name, several in replaced.items()}
    examples = dict.fromkeys(replaced, 0)
    with torch.inference_mode(False), preserved_random_state(), evaluating(model), torch.no_grad():
        batches = Batches(data, device_of(model), max_examples)
        steps = ((run, name) for run in _originals(model, layers, batches) for name in variants)
        total = len(batches) * len(variants) or None
        for run, name in track(steps, "each change alone", total=total, enabled=progress):
            examples[name] += run.batch.size
            for index, functions in enumerate(variants[name]):
                with _replayed(layers, _Replay(run.outputs, functions)):
                    output = f"the output with variant {index} of '{name}'"
                    logits = _finite_logits(model, run.batch, output)
                rise = head.divergence(run.logits, logits, run.batch)
                totals[name][index] += float(rise.sum())
    return {name: [t / examples[name] for t in sums] for name, sums in totals.items()}


@dataclass(frozen=True, eq=False)
class _Run:
    """What the original did on one batch.

    Attributes:
        batch: the batch.
        logits: of the original.
        outputs: what its layers returned, call by call; None where there was no room.
    """

    batch: Batch
    logits: Tensor
    outputs: Sequence[Tensor | None]


def _originals(
    model: nn.Module, layers: Sequence[Layer], batches: Iterable[Batch]
) -> Iterator[_Run]:
    """Run the original on every batch."""
    for batch in batches:
        outputs: list[Tensor | None] = []
        with rewritten_outputs([(layer, partial(_record, outputs)) for layer in layers]):
            logits = _finite_logits(model, batch, "the model's output")
        yield _Run(batch, logits, outputs)


def _record(outputs: list[Tensor | None], _x: Tensor, output: Tensor) -> Tensor:
    """The rule that notes a copy of an output: what follows may work on it in place."""
    kept = sum(o.nbytes for o in outputs if o is not None)
    outputs.append(output.clone() if kept + output.nbytes <= _MOST_BYTES else None)
    return output


def _functions(found: Layers, changes: Mapping[str, Change]) -> dict[str, Function]:
    """What each changed layer computes, by its dotted path."""
    functions: dict[str, Function] = {}
    for layer in changed_layers(found, changes):
        change, old = changes[layer.name], layer.weight()
        bias = layer.bias() if change.bias is None else change.bias.to(old)
        functions[layer.name] = partial(response, layer, weight=change.weight.to(old), bias=bias)
    return functions


class _Replay:
    """The calls of the layers in one pass in which some of them compute other functions.

    Until the first of these is called, everything is as it was in the original: the layers return
    what they did there.
    """

    def __init__(self, outputs: Sequence[Tensor | None], functions: Mapping[str, Function]) -> None:
        self._outputs = iter(outputs)
        self._functions = functions
        self._changed = False

    def call(self, name: str, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """What a layer returns, given its own ``forward``."""
        function = self._functions.get(name)
        if function is not None:
            self._changed = True
            return function(args[0] if args else kwargs["input"])
        known = None if self._changed else next(self._outputs, None)
        return forward(*args, **kwargs) if known is None else known.clone()


@contextmanager
def _replayed(layers: Sequence[Layer], replay: _Replay) -> Generator[None]:
    """While active, the layers' calls go through ``replay``."""
    # An attribute of the instance comes before the method of its class, and goes without a trace.
    shadowed = [(layer.module, vars(layer.module).get("forward")) for layer in layers]
    try:
        for layer in layers:
            layer.module.forward = partial(replay.call, layer.name, layer.module.forward)
        yield
    finally:
        for module, own in shadowed:
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


def _finite_logits(model: nn.Module, batch: Batch, what: str) -> Tensor:
    logits = logits_of(tried_call(model, batch))
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(f"{what} holds NaN or infinite values although its input is finite")
    return logits
