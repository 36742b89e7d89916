"""Loss, accuracy and divergence on data that had no part in the choice."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.batches import Batches, Data
from eigendamage.calls import call, cannot_run, device_of, logits_of, require_finite, require_module
from eigendamage.curvature import (
    CrossEntropy,
    Head,
    Loss,
    PredictiveHead,
    head_of,
    preserved_random_state,
)
from eigendamage.errors import DataError
from eigendamage.layers import evaluating
from eigendamage.progress import track

_LARGEST = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Evaluation:
    """What was measured; what could not be is None.

    Attributes:
        examples: how many examples it was measured on.
        loss: mean loss per example, where there are labels.
        accuracy: fraction of right predictions (of all positions with a label), for cross-entropy
            with class labels.
        accuracy_error: standard error of the accuracy, for examples drawn at random, of which each
            brings all its positions along: √Σ(r − p·c)² / Σc over examples with r of c positions
            right (Cochran 1977, chapter 3: clusters). With one position each it
            is √(p(1 − p)/n).
        positions: how many positions (tokens, pixels) of all examples count, for cross-entropy.
        divergence: mean over examples of the loss's rise if the reference told the truth, where a
            reference was given; KL(reference ‖ model) in nats for cross-entropy.
    """

    examples: int
    loss: float | None
    accuracy: float | None
    divergence: float | None
    positions: int | None = None
    accuracy_error: float | None = None

    @property
    def loss_per_position(self) -> float | None:
        """The mean loss of a position: of a token, for a language model."""
        if self.loss is None or not self.positions:
            return None
        return self.loss * self.examples / self.positions

    @property
    def perplexity(self) -> float | None:
        """The exponential of the mean loss of a position; infinite from about 709 nats on."""
        loss = self.loss_per_position
        if loss is None:
            return None
        return math.inf if loss > _LARGEST else math.exp(loss)


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    loss: Loss = "cross_entropy",
    reference: nn.Module | None = None,
    max_examples: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    progress: bool = True,
) -> Evaluation:
    """Run a model in eval mode over data, with labels or without.

    Args:
        model: the model to measure.
        data: batches; labels are used if every batch has them.
        loss: as in `estimate_curvature`.
        reference: the original model, to measure the divergence from.
        max_examples: stop after that many examples.
        reduction: what a loss function that returns one number has done over the batch.
        progress: whether to show progress.

    Raises:
        DataError: if there is no example, or none of which a position counts.
        NonFiniteError: if an input or the model's output holds a NaN or an infinity.
        LayerError: if the model fails on a batch.
        MismatchError: if the reference's output has another shape.
    """
    models = [model] if reference is None else [reference, model]
    return evaluate_together(
        models,
        data,
        loss=loss,
        max_examples=max_examples,
        reduction=reduction,
        progress=progress,
    )[-1]


def evaluate_together(
    models: Sequence[nn.Module],
    data: Data,
    *,
    loss: Loss = "cross_entropy",
    max_examples: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    progress: bool = True,
) -> list[Evaluation]:
    """Measure several models in one pass over the data; the first is the others' reference.

    Args and errors are those of `evaluate`.
    """
    for model in models:
        require_module(model)
    head = head_of(loss, reduction)
    tallies = [_Tally(head) for _ in models]
    with ExitStack() as stack:
        stack.enter_context(preserved_random_state())
        stack.enter_context(torch.no_grad())
        for model in models:
            stack.enter_context(evaluating(model))
        batches = Batches(data, device_of(models[0]), max_examples)
        for batch in track(batches, "measuring", total=len(batches) or None, enabled=progress):
            reference: Any = None
            for model, tally in zip(models, tallies, strict=True):
                output = _output(model, batch)
                require_finite(model, batch, head.starts(output))
                tally.add(output, batch, reference)
                reference = output if reference is None else reference
    return [tally.result() for tally in tallies]


def _output(model: nn.Module, batch: Batch) -> Any:
    try:
        return call(model, batch)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise cannot_run(model, batch, error) from error


class _Tally:
    """Running sums of one model's losses, right predictions and divergences."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._examples = self._positions = 0
        self._accuracy = _Ratio()
        self._loss = self._divergence = 0.0
        self._labelled = True
        self._compared = False

    def add(self, output: Any, batch: Batch, reference: Any) -> None:
        self._examples += batch.size
        self._labelled = self._labelled and self._head.has_target(batch)
        if self._labelled:
            self._loss += float(self._head.per_example(output, batch).double().sum())
        if isinstance(self._head, CrossEntropy):
            counted, right = self._head.predictions(output, batch)
            self._positions += int(counted.sum())
            if right is not None:
                self._accuracy.add(right, counted)
        if reference is not None and isinstance(self._head, PredictiveHead):
            self._compared = True
            self._divergence += float(
                self._head.divergence(logits_of(reference), logits_of(output), batch).sum()
            )

    def result(self) -> Evaluation:
        n = self._examples
        if isinstance(self._head, CrossEntropy) and not self._positions:
            raise DataError(
                f"no position of the {n} examples counts for the loss: their labels are all -100 "
                f"(ignored), or their attention_mask excludes every token. Give data in which some "
                f"count"
            )
        judged = self._labelled and self._accuracy.total
        return Evaluation(
            examples=n,
            loss=self._loss / n if self._labelled else None,
            accuracy=self._accuracy.value if judged else None,
            accuracy_error=self._accuracy.error if judged else None,
            divergence=self._divergence / n if self._compared else None,
            positions=self._positions if isinstance(self._head, CrossEntropy) else None,
        )


class _Ratio:
    """A sum of parts over a sum of wholes, of examples that have both, and its standard error."""

    def __init__(self) -> None:
        self._part = self.total = 0
        self._squares = (0, 0, 0)  # of parts, of parts times wholes, of wholes

    def add(self, parts: Int[Tensor, " n"], wholes: Int[Tensor, " n"]) -> None:
        self._part += int(parts.sum())
        self.total += int(wholes.sum())
        products = (parts * parts, parts * wholes, wholes * wholes)
        known = zip(self._squares, products, strict=True)
        pp, pw, ww = (before + int(product.sum()) for before, product in known)
        self._squares = (pp, pw, ww)

    @property
    def value(self) -> float:
        return self._part / self.total

    @property
    def error(self) -> float:
        """By the spread of examples about the ratio: positions of one are not independent."""
        pp, pw, ww = self._squares
        ratio = self.value
        return math.sqrt(max(0.0, pp - 2 * ratio * pw + ratio * ratio * ww)) / self.total
