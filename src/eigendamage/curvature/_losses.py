"""The losses that the curvature knows by name, and a user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from eigendamage.batch import Batch
from eigendamage.curvature._by_output import BinaryCrossEntropy, SquaredError
from eigendamage.curvature._cross_entropy import CrossEntropy, NextToken
from eigendamage.curvature._head import Fisher, Head, Seed, checked
from eigendamage.errors import LossError, NonFiniteError

LossFunction = Callable[[Any, Tensor], Tensor]
Loss = Literal["cross_entropy", "causal_lm", "mse", "bce"] | LossFunction


class CustomLoss(Head):
    """A user's own function of (output, target). Only its gradients are known, so only empirical.

    It returns the losses of the examples, (n,), or one number: their mean or sum, as told.
    """

    def __init__(self, function: LossFunction, reduction: Literal["mean", "sum"]) -> None:
        self.function = function
        self.reduction = reduction

    def seeds(
        self, output: Any, batch: Batch, fisher: Fisher, random: torch.Generator
    ) -> Iterator[Seed]:
        if fisher != "empirical":
            raise LossError(
                f"fisher='{fisher}' needs a predictive distribution, which a function does not "
                f"give; use loss='cross_entropy', 'causal_lm', 'mse' or 'bce', or "
                f"fisher='empirical'"
            )
        total = self.per_example(output, batch).sum()
        if not bool(torch.isfinite(total)):
            raise NonFiniteError("the loss is NaN or infinite; check the weights and the labels")
        if not total.requires_grad:
            raise LossError("the loss does not depend on any layer that can be compressed")
        yield Seed(total, torch.ones_like(total), more=False)

    def per_example(self, output: Any, batch: Batch) -> Tensor:
        losses = self.function(output, checked(batch.target))
        if losses.ndim == 0:
            scale = batch.size if self.reduction == "mean" else 1
            return (losses * scale / batch.size).expand(batch.size)
        if losses.shape[0] != batch.size:
            raise LossError(
                f"the loss function returned shape {tuple(losses.shape)} for {batch.size} "
                f"examples; return one loss an example, or one number"
            )
        return losses.reshape(batch.size, -1).sum(1)


def loss_name(loss: Loss) -> str:
    """The name of a loss, or of the function or class that it is."""
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def head_of(loss: Loss, reduction: Literal["mean", "sum"] = "mean") -> Head:
    """The head for what a user names as loss.

    Raises:
        LossError: if the name or the reduction is unknown.
    """
    if reduction not in ("mean", "sum"):
        raise LossError(f"reduction is {reduction!r}; expected 'mean' or 'sum'")
    if isinstance(loss, str):
        heads = {
            "cross_entropy": CrossEntropy,
            "causal_lm": NextToken,
            "mse": SquaredError,
            "bce": BinaryCrossEntropy,
        }
        if loss not in heads:
            raise LossError(f"loss '{loss}' is unknown; known are {', '.join(heads)} or a function")
        return heads[loss]()
    declared = getattr(loss, "reduction", reduction)
    if declared not in ("mean", "sum", "none"):
        raise LossError(f"the loss has reduction '{declared}'; expected mean, sum or none")
    if not callable(loss):
        raise LossError(f"loss must be a name or a function, found {type(loss).__name__}")
    return CustomLoss(loss, "sum" if declared == "sum" else "mean")
