"""Losses that are a mean over an example's outputs, each by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eigendamage.batch import Batch
from eigendamage.calls import logits_of
from eigendamage.curvature._head import PredictiveHead, checked, uniform_where, widened
from eigendamage.errors import LossError


class SquaredError(PredictiveHead):
    """Mean squared error over an example's outputs; the Hessian is 2/D times the identity.

    The outputs of padded tokens are not among them.
    """

    def per_example(self, output: Any, batch: Batch) -> Tensor:
        logits = widened(logits_of(output))
        error = logits - _same_shape(checked(batch.target), logits)
        return _mean(error.square(), batch)

    def _rise(self, reference: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        return _mean((logits.double() - reference.double()).square(), batch)

    def quadratic(self, logits: Tensor, tangent: Tensor, batch: Batch) -> Tensor:
        return _mean(tangent.double().square(), batch)

    def sampled(self, logits: Tensor, batch: Batch, random: torch.Generator) -> Tensor:
        shares = _shares(logits, batch)
        uniform = uniform_where(shares > 0, random)
        tiny = torch.finfo(torch.float64).tiny
        normal = torch.special.ndtri(uniform.clamp_min(tiny)).to(logits)
        return normal * (2 * shares).sqrt()

    def draws(self, logits: Tensor, batch: Batch) -> int:
        return int((_shares(logits, batch) > 0).sum())

    def observed(self, logits: Tensor, batch: Batch) -> Tensor:
        error = logits - _same_shape(checked(batch.target), logits)
        return error * 2 * _shares(logits, batch)

    def passes(self, logits: Tensor) -> int:
        return logits[0].numel()

    def expected(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        yield from _one_at_a_time((2 * _shares(logits, batch)).sqrt())


class BinaryCrossEntropy(PredictiveHead):
    """Independent Bernoulli outputs, averaged over an example's outputs but padded tokens'."""

    def per_example(self, output: Any, batch: Batch) -> Tensor:
        logits = widened(logits_of(output))
        target = _same_shape(checked(batch.target), logits).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return _mean(losses, batch)

    def _rise(self, reference: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        p, q = reference.double(), logits.double()
        positive = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
        negative = (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))
        return _mean(positive + negative, batch)

    def quadratic(self, logits: Tensor, tangent: Tensor, batch: Batch) -> Tensor:
        p = logits.double().sigmoid()
        variance = p * (1 - p) * tangent.double().square()
        return 0.5 * _mean(variance, batch)

    def sampled(self, logits: Tensor, batch: Batch, random: torch.Generator) -> Tensor:
        p = logits.sigmoid()
        shares = _shares(logits, batch)
        uniform = uniform_where(shares > 0, random)
        return (p - (uniform < p).to(p.dtype)) * shares.sqrt()

    def draws(self, logits: Tensor, batch: Batch) -> int:
        return int((_shares(logits, batch) > 0).sum())

    def observed(self, logits: Tensor, batch: Batch) -> Tensor:
        target = _same_shape(checked(batch.target), logits).to(logits.dtype)
        return (logits.sigmoid() - target) * _shares(logits, batch)

    def passes(self, logits: Tensor) -> int:
        return logits[0].numel()

    def expected(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        p = logits.sigmoid()
        yield from _one_at_a_time((p * (1 - p) * _shares(logits, batch)).sqrt())


def _shares(outputs: Tensor, batch: Batch) -> Tensor:
    """The weight of each output in its example's mean: 1/D, and 0 for those of padded tokens.

    Outputs are by token if they are (batch, tokens, …), of at least three axes.
    """
    counted = batch.counted
    if counted is None or outputs.ndim < 3 or outputs.shape[:2] != counted.shape:
        return torch.full_like(outputs, 1 / outputs[0].numel())
    by_token = outputs[0, 0].numel()
    share = counted.to(outputs) / (by_token * counted.sum(1, keepdim=True)).clamp_min(1)
    return share[(...,) + (None,) * (outputs.ndim - 2)].expand_as(outputs)


def _mean(values: Tensor, batch: Batch) -> Tensor:
    """Of each example's outputs, (n,)."""
    return (values * _shares(values, batch)).reshape(batch.size, -1).sum(1)


def _same_shape(target: Tensor, logits: Tensor) -> Tensor:
    if target.shape == logits.shape:
        return target
    if target.numel() == logits.numel() and target.shape[0] == logits.shape[0]:
        return target.reshape(logits.shape)
    raise LossError(
        f"targets have shape {tuple(target.shape)}, outputs {tuple(logits.shape)}; they must match"
    )


def _one_at_a_time(values: Tensor) -> Iterator[Tensor]:
    """For each output of an example, a tensor that is zero but for ``values`` there."""
    flat = values.reshape(values.shape[0], -1)
    for d in range(flat.shape[1]):
        v = torch.zeros_like(flat)
        v[:, d] = flat[:, d]
        yield v.reshape(values.shape)
