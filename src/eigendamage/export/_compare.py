"""What an exported model computes, set beside what the model computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.calls import tried_call
from eigendamage.errors import DataError, ExportError
from eigendamage.export._values import named_outputs, plain_output, with_size
from eigendamage.layers import evaluating

Outputs = Mapping[str, Tensor]
"""Outputs by name, on the CPU."""

Run = Callable[[Batch], Outputs]
"""What runs something that was written."""


def references(model: nn.Module, batch: Batch, sizes: tuple[int, ...]) -> dict[int, Outputs]:
    """The model's outputs by name, in eval mode, at the batch's size and others.

    Raises:
        DataError: if the model cannot run on the batch.
        ExportError: if it cannot at another size.
    """
    with evaluating(model), torch.no_grad():
        # The example first: a model that cannot run on it is another error than one of other sizes.
        found = {batch.size: _outputs(model, batch)}
        for size in sizes:
            try:
                found[size] = found.get(size) or _outputs(model, with_size(batch, size))
            except DataError as error:
                raise ExportError(
                    f"the model runs at a batch of {batch.size} but not of {size}, so that its "
                    f"batch size cannot be left open; give dynamic_batch=False"
                ) from error
    return found


def _outputs(model: nn.Module, batch: Batch) -> Outputs:
    outputs = named_outputs(plain_output(tried_call(model, batch)))
    return {name: value.cpu() for name, value in outputs.items()}


def largest_difference(
    run: Run,
    batch: Batch,
    expected: Mapping[int, Outputs],
    tolerance: float,
) -> float:
    """The largest absolute difference between any two values, over all outputs and sizes.

    Equal infinities differ by 0, and so do NaNs at the same place.

    Raises:
        ExportError: if an output differs by more than ``tolerance`` times the larger of 1 and its
            largest absolute value, or has another shape.
    """
    largest = 0.0
    for size, outputs in expected.items():
        found = run(with_size(batch, size))
        for name, value in outputs.items():
            difference = _difference(name, size, value, found[name])
            allowed = tolerance * max(1.0, _scale(value))
            if not difference <= allowed:
                raise ExportError(
                    f"output '{name}' of the exported model differs by {difference:.3g} at a batch "
                    f"of {size}; at most {allowed:.3g} is allowed (tolerance {tolerance:g} at "
                    f"values up to {_scale(value):.3g}). Nothing was written. A larger tolerance "
                    f"accepts it; fold=False tells whether folding is the cause"
                )
            largest = max(largest, difference)
    return largest


def _scale(value: Tensor) -> float:
    finite = value.double()[value.double().isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _difference(name: str, size: int, expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        raise ExportError(
            f"output '{name}' of the exported model has shape {tuple(found.shape)} at a batch of "
            f"{size}, that of the model {tuple(expected.shape)}. Nothing was written"
        )
    a, b = expected.double(), found.double()
    same = (a == b) | (a.isnan() & b.isnan())
    away = torch.where(same, 0.0, (a - b).abs())
    away = torch.where(away.isnan(), torch.inf, away)
    return float(away.max()) if away.numel() else 0.0
