"""Batch normalisation's statistics, measured again on the smaller model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from eigendamage.batch import Batch
from eigendamage.batches import Batches, Data
from eigendamage.calls import device_of, require_gradients_possible, tried_call
from eigendamage.curvature import preserved_random_state
from eigendamage.errors import DataError
from eigendamage.layers import evaluating
from eigendamage.progress import track


@torch.inference_mode(False)
def recalibrate_batchnorm(
    model: nn.Module, data: Data, *, max_examples: int | None = None, progress: bool = True
) -> int:
    """Replace the running statistics of every batch norm by those of the data, in place.

    Mean and (unbiased) variance are averaged over the calls of a batch norm, each weighted by its
    batch's examples. Only batch norms run in training mode; dropout stays off. No labels and no
    gradients are needed. A batch norm that does not run keeps its statistics; if anything fails,
    all do.

    Returns:
        How many batch norms were recalibrated; 0 if none with running statistics ran.

    Raises:
        DataError: if the data has no example, or only batches too small to have a spread.
        NonFiniteError: if an input is not finite.
        EigenDamageError: if the model was made under ``torch.inference_mode()``.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    require_gradients_possible(model)
    before = [(m, {k: v.clone() for k, v in m.named_buffers()}) for m in norms]
    sums = {m: _Sums() for m in norms}
    handles = [m.register_forward_pre_hook(sums[m].enter) for m in norms]
    too_small: ValueError | None = None
    try:
        with preserved_random_state(), evaluating(model), torch.no_grad():
            batches = Batches(data, device_of(model), max_examples)
            for norm in norms:
                norm.train()
            shown = track(batches, "batch norm", total=len(batches) or None, enabled=progress)
            for batch in shown:
                too_small = _run(model, batch) or too_small
                for total in sums.values():
                    total.keep(batch.size)
        ran = [m for m in norms if sums[m].weight]
        if not ran and too_small is not None:
            raise DataError(
                f"batch norm's statistics cannot be measured on this data: {too_small}. Give "
                f"batches of at least two examples, or skip it with recalibrate=False"
            ) from too_small
    finally:
        for handle in handles:
            handle.remove()
        for norm, buffers in before:
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)
    for norm in ran:
        sums[norm].write(norm)
    return len(ran)


def _run(model: nn.Module, batch: Batch) -> ValueError | None:
    """Run a batch; what batch norm says if one example and one position have no spread."""
    try:
        tried_call(model, batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return error
    return None


class _Sums:
    """Weighted sums of the statistics of one batch norm's inputs, batch by batch."""

    def __init__(self) -> None:
        self.weight = 0
        self._batches = 0
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._mean: Tensor | None = None
        self._variance: Tensor | None = None

    def enter(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        flat = x.transpose(0, 1).flatten(1) if x.ndim > 1 else x.unsqueeze(1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        if flat.shape[1] > 1:
            variance, mean = torch.var_mean(flat, 1)
            self._pending.append((mean, variance))

    def keep(self, examples: int) -> None:
        for mean, variance in self._pending:
            self._mean = examples * mean + (0 if self._mean is None else self._mean)
            self._variance = examples * variance + (0 if self._variance is None else self._variance)
            self.weight += examples
        self._batches += bool(self._pending)
        self._pending.clear()

    def write(self, norm: _BatchNorm) -> None:
        assert self._mean is not None
        assert self._variance is not None
        norm.get_buffer("running_mean").copy_(self._mean / self.weight)
        norm.get_buffer("running_var").copy_(self._variance / self.weight)
        norm.get_buffer("num_batches_tracked").fill_(self._batches)
