"""What training makes small: the loss of the labels, the divergence from the original, or both."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.calls import logits_of, tried_call
from eigendamage.curvature import Head, PredictiveHead
from eigendamage.errors import DataError, EigenDamageError, LossError, MismatchError


class Objective:
    """The training loss of a batch, a mean over examples and positions.

    With labels and without an original it is the labels' loss; without labels it is the
    distillation; with both a weighted mean of the two.

    Args:
        head: the loss.
        original: the network to distil, in eval mode; None for labels alone.
        temperature: that both networks' logits are divided by.
        label_share: of the labels' loss where there are both.
        features: dotted paths of modules whose outputs are to be like the original's.
        feature_weight: of that.
    """

    def __init__(
        self,
        head: Head,
        original: nn.Module | None,
        *,
        temperature: float = 1.0,
        label_share: float = 0.5,
        features: Sequence[str] = (),
        feature_weight: float = 1.0,
    ) -> None:
        if original is not None and not isinstance(head, PredictiveHead):
            raise LossError(
                "the original can only be distilled by a loss with a divergence, one of those that "
                "go by name; with a function as loss give labels and no original"
            )
        if features and original is None:
            raise EigenDamageError("features= are the original's; give original= too")
        self._head = head
        self._original = original
        self._temperature = temperature
        self._label_share = label_share
        self._features = tuple(features)
        self._feature_weight = feature_weight

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The loss, and how many positions count in it.

        ``model`` is run, and the original beside it.
        """
        self._check(batch)
        with _watched(model, self._features) as mine:
            output = tried_call(model, batch)
        return self._loss(output, batch, mine), self._head.counting(output, batch)

    def _loss(self, output: Any, batch: Batch, mine: dict[str, Tensor]) -> Tensor:
        by_labels = self._head.has_target(batch) and self._label_share == 1 and not self._features
        if self._original is None or by_labels:
            return self._labels(output, batch)
        with torch.no_grad(), _watched(self._original, self._features) as its:
            target = logits_of(tried_call(self._original, batch))
        loss = self._distillation(target, output, batch)
        if self._head.has_target(batch) and self._label_share > 0:
            share = self._label_share
            loss = share * self._labels(output, batch) + (1 - share) * loss
        if self._features:
            loss = loss + self._feature_weight * _unlikeness(
                self._features, mine, its, batch.counted
            )
        return loss

    def by_labels(self, batch: Batch) -> bool:
        """Whether the score of a batch is of its labels."""
        return self._head.has_target(batch) and (self._original is None or self._label_share > 0)

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """What a held-out batch says, summed, and over how many examples and positions.

        The labels' loss where there are labels, the divergence at temperature one otherwise. Where
        no position counts it is over none.
        """
        self._check(batch)
        output = tried_call(model, batch)
        if not self._head.counting(output, batch):
            return torch.zeros(()), 0
        if self.by_labels(batch):
            return self._head.per_example(output, batch).sum(), self._terms(output, batch)
        return self._divergence(output, batch, self.target(batch))

    def target(self, batch: Batch) -> Tensor:
        """What the original predicts."""
        assert self._original is not None
        with torch.no_grad():
            return logits_of(tried_call(self._original, batch))

    def divergence(self, model: nn.Module, judged: tuple[Batch, Tensor]) -> tuple[Tensor, int]:
        """The divergence from what the original predicts, summed, and over how many.

        Args:
            model: the smaller network.
            judged: a held-out batch and the original's `target` for it.
        """
        batch, target = judged
        return self._divergence(tried_call(model, batch), batch, target)

    def _divergence(self, output: Any, batch: Batch, target: Tensor) -> tuple[Tensor, int]:
        assert isinstance(self._head, PredictiveHead)
        divergence = self._head.divergence(target, logits_of(output), batch)
        return divergence.sum(), self._terms(output, batch)

    def _check(self, batch: Batch) -> None:
        if not self._head.has_target(batch) and self._original is None:
            raise DataError(
                "training without labels needs the original to learn from: give original=, or "
                "(input, label) batches"
            )

    def _labels(self, output: Any, batch: Batch) -> Tensor:
        return self._head.per_example(output, batch).sum() / self._terms(output, batch)

    def _distillation(self, target: Tensor, output: Any, batch: Batch) -> Tensor:
        """T² times the divergence of logits divided by T (Hinton et al. 2015, section 2).

        The factor keeps gradients of the same size at every temperature. The divergence of squared
        errors does not depend on T.
        """
        assert isinstance(self._head, PredictiveHead)
        t = self._temperature
        divergence = self._head.divergence(target / t, logits_of(output) / t, batch)
        return t**2 * divergence.sum() / self._terms(output, batch)

    def _terms(self, output: Any, batch: Batch) -> int:
        if isinstance(self._head, PredictiveHead):
            return self._head.terms(logits_of(output), batch)
        return batch.size


@contextmanager
def _watched(model: nn.Module, names: Sequence[str]) -> Generator[dict[str, Tensor]]:
    """What modules return while inside."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(first, Tensor):
                raise MismatchError(
                    f"features: '{name}' returns {type(output).__name__}, not a tensor"
                )
            found[name] = first

        return hook

    modules = dict(_unwrapped(model).named_modules())
    for name in names:
        if name not in modules:
            raise MismatchError(
                f"features: the model has no module '{name}'; some that it has are "
                f"{', '.join(list(modules)[1:9])}"
            )
    handles = [modules[name].register_forward_hook(watch(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _unlikeness(
    names: Sequence[str],
    mine: dict[str, Tensor],
    its: dict[str, Tensor],
    counted: Tensor | None,
) -> Tensor | float:
    """The mean over modules of ‖x − y‖² / ‖y‖², x of the smaller network, y of the original.

    Outputs of padded tokens are left out.
    """
    total: Tensor | float = 0.0
    for name in names:
        x, y = mine[name], its[name]
        if x.shape != y.shape:
            raise MismatchError(
                f"features: '{name}' returns {tuple(x.shape)} in the smaller model and "
                f"{tuple(y.shape)} in the original; name modules that lost no channels"
            )
        y = y.detach()
        if counted is not None and x.shape[:2] == counted.shape:
            x, y = x[counted], y[counted]
        size = y.float().square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        total = total + (x - y).float().square().sum() / size
    return total / len(names)
