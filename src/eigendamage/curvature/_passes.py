"""Passes over the data, and what each adds to the layers' curvature."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.batches import Batches
from eigendamage.calls import require_finite, tried_call
from eigendamage.curvature._capture import Capture, Sink, undisturbed
from eigendamage.curvature._factors import Eigenbasis
from eigendamage.curvature._head import Fisher, Head, PredictiveHead, Seed
from eigendamage.curvature._layer import LayerCurvature, factor_bases
from eigendamage.curvature._pair_sinks import EigenvalueSink, GradientSink
from eigendamage.curvature._patches import advance
from eigendamage.curvature._sinks import FactorSink, PatchWish
from eigendamage.distributed import dealt, from_rank, gathered, rank, shared_out
from eigendamage.errors import DataError, LayerError, MismatchError, NonFiniteError
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
        before_batch: Callable[[int], None] | None = None,
    ) -> None:
        """One pass; of several processes each takes its share of the batches.

        Args:
            layers: to capture.
            sink: what is made of them.
            what: said of the pass while it runs.
            after_backward: called after each backward pass.
            before_batch: called before each batch with the number of examples before it.

        Raises:
            DataError: if no position of the data counts.
            MismatchError: if the data is not that of the pass before.
        """
        random = torch.Generator().manual_seed(self._seed)
        examples = counted = 0
        shown = track(self._batches, what, total=len(self._batches) or None, enabled=self._progress)
        with undisturbed(self._model), Capture(layers, sink) as capture:
            for step in dealt(shown):
                mine = step[rank()] if rank() < len(step) else None
                if before_batch is not None:
                    before_batch(examples + sum(batch.size for batch in step[: rank()]))
                if mine is not None:
                    capture.expect(mine)
                output = None if mine is None else tried_call(self._model, mine)
                if mine is not None and isinstance(self._head, PredictiveHead):
                    require_finite(self._model, mine, self._head.starts(output))
                with self._own_turn(random, mine, output):
                    for seed in self._seeds(random, mine, output):
                        capture.backward(seed)
                        if after_backward is not None:
                            after_backward()
                counted += 0 if mine is None else self._head.counting(output, mine)
                examples += sum(batch.size for batch in step)
        if self.examples and examples != self.examples:
            raise MismatchError(
                f"the first pass over the data saw {self.examples} examples, the next one "
                f"{examples}; give data that can be gone through more than once, such as a list"
            )
        self.examples = examples
        if not sum(gathered(counted)):
            raise DataError(
                f"no position of the {examples} examples counts for the loss: their labels are all "
                f"-100 (ignored), their attention_mask excludes every token, or they have one "
                f"token each, which for loss='causal_lm' has no next one. Give data in which some "
                f"count; fisher='mc' (the default) and 'exact' need no labels"
            )

    def _seeds(self, random: torch.Generator, batch: Batch | None, output: Any) -> Iterator[Seed]:
        if batch is not None:
            yield from self._head.seeds(output, batch, self._fisher, random)

    @contextmanager
    def _own_turn(
        self, random: torch.Generator, batch: Batch | None, output: Any
    ) -> Generator[None]:
        """Inside, ``random`` is where it would be in one process that had come to this batch."""
        drawn = 0 if batch is None else self._head.numbers_drawn(output, batch, self._fisher)
        of_all = gathered(drawn)
        advance(random, sum(of_all[: rank()]))
        yield
        advance(random, sum(of_all[rank() + 1 :]))


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
    passes.run(layers, sink, what, before_batch=sink.start_at)
    sums, examples = sink.reduced(layers), passes.examples
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        total = sums.get(layer.name)
        if total is None:
            raise LayerError(layer.name, "no gradient reached it, though one did in a first probe")
        S, A = total.output / examples, total.input / (total.positions * layer.offsets)
        for side, tensor in (("output gradients", S), ("inputs", A)):
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"layer '{layer.name}': the second moment of its {side} is not finite; they "
                    f"overflow or hold NaN. Check the weights, or run the model in float32"
                )
        moments[layer.name] = S, A
    bases = eigenbases(layers, moments)
    found: dict[str, LayerCurvature] = {}
    for layer in layers:
        total = sums[layer.name]
        known = LayerCurvature.from_bases(
            *moments[layer.name],
            total.total / (total.positions * layer.offsets),
            examples,
            total.positions,
            traced.layers[layer.name].shape,
            layer.spans(),
            bases[layer.name],
        )
        if total.patches is not None and total.patch_total is not None:
            known = replace(
                known,
                patches=total.patches / total.positions,
                patch_mean=total.patch_total / total.positions,
            )
        found[layer.name] = known
    return found


def eigenbases(
    layers: Sequence[Layer], moments: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Eigenbasis, Eigenbasis]]:
    """The eigenbases of each layer's (S, A), each computed by one process for all of them."""
    owners = shared_out([float(layer.outputs**3 + layer.inputs**3) for layer in layers])
    mine = {
        layer.name: factor_bases(*moments[layer.name], layer.spans())
        for layer, owner in zip(layers, owners, strict=True)
        if owner == rank()
    }
    return {
        layer.name: _from_owner(mine.get(layer.name), moments[layer.name], owner)
        for layer, owner in zip(layers, owners, strict=True)
    }


def _from_owner(
    bases: tuple[Eigenbasis, Eigenbasis] | None, moments: tuple[Tensor, Tensor], owner: int
) -> tuple[Eigenbasis, Eigenbasis]:
    parts = [
        (m.new_empty(len(m), dtype=torch.float64), m.new_empty(m.shape, dtype=torch.float64))
        for m in moments
    ]
    of_S, S_vectors, of_A, A_vectors = from_rank(
        [tensor for part in bases or parts for tensor in part], owner
    )
    return Eigenbasis(of_S, S_vectors), Eigenbasis(of_A, A_vectors)


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
    sums = sink.reduced(layers)
    found: dict[str, LayerCurvature] = {}
    for layer in layers:
        known, lam = curvature[layer.name], sums[layer.name] / passes.examples
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
    of_all, examples = sink.reduced(layers), passes.examples
    found: dict[str, LayerCurvature] = {}
    for layer in layers:
        sums = of_all[layer.name]
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
