"""Slow and obvious: Fisher blocks by autograd, one example and one class at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eigendamage.layers import ConvGeometry


def example_gradients(
    model: nn.Module, weight: Tensor, x: Tensor, y: Tensor | None = None
) -> Iterator[Tensor]:
    """Weight gradients of single examples, scaled so that Σ vec G vecᵀG / N is the Fisher block.

    With labels the empirical one (cross-entropy summed over positions), without them the exact
    one: for every position and class, √p times the gradient of −log p.
    """
    for n in range(x.shape[0]):
        logits = model(x[n : n + 1])[0]
        rows = logits.reshape(-1, logits.shape[-1])
        if y is not None:
            loss = F.cross_entropy(rows, y[n].reshape(-1), reduction="sum")
            yield torch.autograd.grad(loss, weight)[0]
            continue
        for row in rows:
            log_p = row.log_softmax(0)
            for c in range(len(row)):
                (g,) = torch.autograd.grad(-log_p[c], weight, retain_graph=True)
                yield g * log_p[c].exp().sqrt().detach()


def fisher_block(model: nn.Module, weight: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
    """The dense Fisher block of one weight, (numel, numel)."""
    gradients = torch.stack([g.flatten() for g in example_gradients(model, weight, x, y)])
    return gradients.T @ gradients / x.shape[0]


def fisher_trace(model: nn.Module, weight: Tensor, x: Tensor, y: Tensor | None = None) -> float:
    """Its trace, without building it."""
    total = sum(float(g.square().sum()) for g in example_gradients(model, weight, x, y))
    return total / x.shape[0]


def patches_by_unfold(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What torch's own unfold sees, (n, i, K, t)."""
    geometry = ConvGeometry.of(conv)
    padded = geometry.pad(x)
    columns = F.unfold(padded, geometry.kernel, dilation=geometry.dilation, stride=geometry.stride)
    return columns.reshape(x.shape[0], x.shape[1], geometry.offsets, -1)
