"""A minimal fine-tuning loop: SGD, one cycle, cross-entropy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from eigendamage.batches import as_batch, call, device_of
from eigendamage.curvature import IGNORED_LABEL, CrossEntropy
from eigendamage.errors import DataError, EigenDamageError, NonFiniteError
from eigendamage.progress import track


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    Attributes:
        epochs: passes over the data.
        learning_rate: the peak of the one-cycle schedule.
        momentum: of SGD, with Nesterov's step.
        weight_decay: of SGD.
    """

    epochs: int = 1
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4


def finetune(
    model: nn.Module,
    data: Iterable[Any],
    config: FinetuneConfig | None = None,
    *,
    progress: bool = True,
) -> float:
    """Train a model in place on (input, label) batches; each module's mode is put back at the end.

    Args:
        model: the model to train, compressed or not.
        data: labelled batches, gone through once an epoch; its length has to be known.
        config: how to train.
        progress: whether to show progress.

    Returns:
        The mean training loss of the last epoch.

    Raises:
        DataError: if the data is empty, has no labels or no length.
        NonFiniteError: if the loss becomes NaN or infinite.
    """
    config = config or FinetuneConfig()
    if config.epochs < 1:
        raise EigenDamageError(f"epochs is {config.epochs}; it must be at least 1")
    steps = _length(data)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise EigenDamageError("no parameter of the model is trainable; set requires_grad first")
    optimizer = torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        config.learning_rate,
        total_steps=config.epochs * steps,
        cycle_momentum=False,
    )
    modes = [(m, m.training) for m in model.modules()]
    device = device_of(model)
    head = CrossEntropy()
    mean = 0.0
    try:
        model.train()
        for epoch in range(config.epochs):
            total = examples = 0
            what = f"fine-tuning, epoch {epoch + 1} of {config.epochs}"
            for index, raw in enumerate(track(data, what, total=steps, enabled=progress)):
                batch = as_batch(raw, index, device)
                if batch.target is None:
                    raise DataError(f"fine-tuning needs labels, but batch {index} has none")
                counted = (batch.target != IGNORED_LABEL).sum().clamp_min(1)
                loss = head.per_example(call(model, batch), batch).sum() / counted
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteError(
                        f"the loss became {loss.item()} in epoch {epoch + 1}, batch {index}; "
                        f"lower the learning rate (it is {config.learning_rate})"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * batch.size
                examples += batch.size
            mean = total / examples
    finally:
        for module, mode in modes:
            module.training = mode
    return mean


def _length(data: Iterable[Any]) -> int:
    try:
        steps = len(data)  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        raise DataError("fine-tuning needs data of known length, such as a DataLoader") from error
    if steps == 0:
        raise DataError("the data for fine-tuning has no batch")
    return steps
