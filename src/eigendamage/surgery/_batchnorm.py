"""Batch normalisation's statistics, measured again on the smaller model."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from eigendamage.batches import Batch, Batches, Data, call, device_of
from eigendamage.curvature import preserved_random_state
from eigendamage.errors import DataError
from eigendamage.layers import evaluating
from eigendamage.progress import track


def recalibrate_batchnorm(
    model: nn.Module, data: Data, *, max_examples: int | None = None, progress: bool = True
) -> int:
    """Replace the running statistics of every batch norm by those of the data, in place.

    Statistics are averaged over batches, each weighted by its examples. Only batch norms run in
    training mode; dropout stays off. No labels and no gradients are needed. If it fails, the old
    statistics are put back.

    Returns:
        How many batch norms were recalibrated; 0 if the model has none with running statistics.

    Raises:
        DataError: if the data has no example, or only batches too small to have a spread.
        NonFiniteError: if an input is not finite.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    before = [(m, m.momentum, {k: v.clone() for k, v in m.named_buffers()}) for m in norms]
    try:
        with preserved_random_state(), evaluating(model), torch.no_grad():
            batches = Batches(data, device_of(model), max_examples)
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
            seen = 0
            shown = track(batches, "batch norm", total=len(batches) or None, enabled=progress)
            for batch in shown:
                if batch.size == 1 and seen > 0:
                    continue  # a last batch of one has no spread to speak of
                seen += batch.size
                for norm in norms:
                    norm.momentum = batch.size / seen
                _run(model, batch)
    except BaseException:
        for norm, _, buffers in before:
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)
        raise
    finally:
        for norm, momentum, _ in before:
            norm.momentum = momentum
    return len(norms)


def _run(model: nn.Module, batch: Batch) -> None:
    try:
        call(model, batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DataError(
            f"batch norm's statistics cannot be measured on batches of {batch.size}: {error}. "
            f"Give batches of at least two examples, or skip it with recalibrate=False"
        ) from error
