"""Loss, accuracy and divergence on data that had no part in the choice."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from eigendamage.batches import Batches, Data, call, device_of, logits_of
from eigendamage.curvature import (
    CrossEntropy,
    CustomLoss,
    Loss,
    head_of,
    preserved_random_state,
)
from eigendamage.errors import NonFiniteError
from eigendamage.layers import evaluating
from eigendamage.progress import track


@dataclass(frozen=True)
class Evaluation:
    """What was measured; what could not be is None.

    Attributes:
        examples: how many examples it was measured on.
        loss: mean loss per example, where there are labels.
        accuracy: fraction of right predictions (of all positions with a label), for cross-entropy
            with class labels.
        divergence: mean over examples of the loss's rise if the reference told the truth, where a
            reference was given; KL(reference ‖ model) in nats for cross-entropy.
    """

    examples: int
    loss: float | None
    accuracy: float | None
    divergence: float | None


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    loss: Loss = "cross_entropy",
    reference: nn.Module | None = None,
    max_examples: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Run a model in eval mode over data, with labels or without.

    Args:
        model: the model to measure.
        data: batches; labels are used if every batch has them.
        loss: as in :func:`estimate_curvature`.
        reference: the original model, to measure the divergence from.
        max_examples: stop after that many examples.
        progress: whether to show progress.

    Raises:
        DataError: if there is no example.
        NonFiniteError: if an input or the model's output holds a NaN or an infinity.
    """
    head = head_of(loss)
    classes = isinstance(head, CrossEntropy)
    compares = reference is not None and not isinstance(head, CustomLoss)
    examples = right = judged = 0
    losses = divergence = 0.0
    labelled = True
    models = [model] if reference is None else [model, reference]
    with ExitStack() as stack:
        stack.enter_context(preserved_random_state())
        stack.enter_context(torch.no_grad())
        for each in models:
            stack.enter_context(evaluating(each))
        batches = Batches(data, device_of(model), max_examples)
        shown = track(batches, "measuring", total=len(batches) or None, enabled=progress)
        for batch in shown:
            outputs = [call(m, batch) for m in models]
            logits = logits_of(outputs[0])
            if not bool(torch.isfinite(logits).all()):
                raise NonFiniteError(
                    "the model's output holds NaN or infinite values although its input is finite"
                )
            examples += batch.size
            labelled = labelled and batch.target is not None
            if labelled and batch.target is not None:
                losses += float(head.per_example(outputs[0], batch).double().sum())
                if classes and not batch.target.is_floating_point():
                    kept = batch.target >= 0
                    predicted = logits.argmax(1 if logits.ndim > 3 else -1)
                    right += int(((predicted == batch.target) & kept).sum())
                    judged += int(kept.sum())
            if compares:
                against = logits_of(outputs[1])
                divergence += float(head.divergence(against, logits, batch).sum())
    return Evaluation(
        examples=examples,
        loss=losses / examples if labelled else None,
        accuracy=right / judged if labelled and judged else None,
        divergence=divergence / examples if compares else None,
    )
