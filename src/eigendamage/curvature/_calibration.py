"""How well K-FAC and λ know the size of each layer's Fisher block: the calibration table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from eigendamage.batches import Batches, Data
from eigendamage.calls import device_of, tried_call
from eigendamage.curvature._capture import Capture, preserved_random_state, undisturbed
from eigendamage.curvature._curvature import Curvature
from eigendamage.curvature._head import Fisher
from eigendamage.curvature._losses import Loss, head_of
from eigendamage.curvature._pair_sinks import TraceSink
from eigendamage.errors import MismatchError
from eigendamage.layers import find_layers, trace
from eigendamage.seeds import check_seed

_EXACT_UP_TO = 128


@dataclass(frozen=True)
class CalibrationRow:
    """The trace of one layer's Fisher block, three ways, in nats per unit weight squared.

    Attributes:
        layer: dotted path.
        exact: 1/N Σ_n ‖G[n]‖² on the examples of the table.
        kfac: tr S · tr A · K of the curvature: what K-FAC says.
        ekfac: Σ λ of the curvature; equal to ``kfac`` where it was estimated without λ.
    """

    layer: str
    exact: float
    kfac: float
    ekfac: float


def calibration_table(
    model: nn.Module,
    data: Data,
    curvature: Curvature,
    *,
    loss: Loss = "cross_entropy",
    examples: int = 64,
    reduction: Literal["mean", "sum"] = "mean",
    seed: int = 0,
) -> list[CalibrationRow]:
    """Compare the trace of every Fisher block with what the curvature says, on a few examples.

    K-FAC is off by a factor that differs from layer to layer; λ is not, up to the sampling of
    examples and labels (math: Σ λ = tr F in any orthonormal basis). The exact trace takes the
    expectation over the labels where the model has at most 128 outputs, and draws them otherwise;
    it uses the data's labels where the curvature did.

    Raises:
        MismatchError: if the curvature is of another model.
        DataError, LossError, NonFiniteError: as `estimate_curvature`.
    """
    check_seed(seed)
    head = head_of(loss, reduction)
    found = find_layers(model).compressible
    for name in curvature:
        if name not in found:
            raise MismatchError(f"layer '{name}' of the curvature is not in the model")
    layers = {name: found[name] for name in curvature}
    with preserved_random_state():
        batches = list(Batches(data, device_of(model), examples))
        calls = {n: t.calls for n, t in trace(model, layers, batches[0]).layers.items()}
    sink = TraceSink(calls)
    random = torch.Generator().manual_seed(seed)
    total = 0
    with undisturbed(model), Capture(layers.values(), sink) as capture:
        for batch in batches:
            capture.expect(batch)
            output = tried_call(model, batch)
            for start in head.seeds(output, batch, _affordable(curvature, output), random):
                capture.backward(start)
                sink.end_of_backward()
            total += batch.size
    return [
        CalibrationRow(
            name,
            sink.sums.get(name, 0.0) / total,
            float(c.kfac_eigenvalues().sum()),
            float(c.eigenvalues.sum()),
        )
        for name, c in curvature.items()
    ]


def _affordable(curvature: Curvature, output: object) -> Fisher:
    if curvature.fisher == "empirical":
        return "empirical"
    few = isinstance(output, torch.Tensor) and output[0].numel() <= _EXACT_UP_TO
    return "exact" if few else "mc"
