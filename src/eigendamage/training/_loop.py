"""The training loop: steps, the best weights so far, and going on after a stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.distributed import from_first, summed, with_first_state
from eigendamage.errors import DataError, NonFiniteError
from eigendamage.progress import track
from eigendamage.training._accelerator import accelerator_of
from eigendamage.training._checkpoint import Checkpoint, random_state, restore_random_state
from eigendamage.training._config import FinetuneConfig
from eigendamage.training._feed import Feed
from eigendamage.training._layout import narrow_shortcuts_in_rows
from eigendamage.training._optimizer import optimizer_of, schedule_of


@dataclass(frozen=True)
class Training:
    """What a training run did.

    Attributes:
        losses: the mean training loss of each epoch.
        scores: on what was held out, before the first epoch and after each; empty if nothing was.
        best: how many epochs the weights that were kept have seen. With labels at least one: the
            original has mostly seen the data that is held out, which favours what it was before.
    """

    losses: tuple[float, ...]
    scores: tuple[float, ...]
    best: int


def train(
    model: nn.Module,
    feed: Feed,
    objective: Callable[[nn.Module, Batch], tuple[Tensor, int]],
    config: FinetuneConfig,
    *,
    score: Callable[[nn.Module], float] | None,
    checkpoint: Checkpoint | None,
    device: torch.device,
    what: str,
    progress: bool,
    least: int = 1,
    processes: int = 1,
) -> Training:
    """Train a model in place; its modules' modes are those that it comes with.

    Args:
        model: the model. Parameters that require no gradient stay as they are.
        feed: what to train on.
        objective: the loss of a batch, and how many of its positions count.
        config: how to train.
        score: what says how good a state is, lower is better; None keeps the last state.
        checkpoint: where the state is kept and taken up again; None keeps none.
        device: of the model.
        what: it is called in the progress.
        progress: whether to show progress.
        least: how many epochs the weights that are kept must have seen; 0 lets those that the model
            came with compete.
        processes: how many share the batches out; each of them makes this call.

    Raises:
        DataError: if no position counts in a whole pass; before anything of it is kept.
        NonFiniteError: if the loss, a weight or a score becomes NaN or infinite.
    """
    with narrow_shortcuts_in_rows(model), accelerator_of(config, device) as accelerator:
        run = _Run(model, feed, objective, config, accelerator, score, checkpoint, least)
        if processes > 1:
            run.share_out()
        run.start()
        total = config.epochs * len(feed)
        steps = track(run.steps(), what, total=total - run.done, enabled=progress)
        for _ in steps:
            pass
        return run.finished()


class _Run:
    """The state of a run, which a checkpoint keeps, and the steps that change it."""

    def __init__(
        self,
        model: nn.Module,
        feed: Feed,
        objective: Callable[[nn.Module, Batch], tuple[Tensor, int]],
        config: FinetuneConfig,
        accelerator: Accelerator,
        score: Callable[[nn.Module], float] | None,
        checkpoint: Checkpoint | None,
        least: int,
    ) -> None:
        self._model = model
        self._feed = feed
        self._objective = objective
        self._config = config
        self._accelerator = accelerator
        self._score = score
        self._checkpoint = checkpoint
        self._least = least
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer: Any = accelerator.prepare_optimizer(optimizer_of(self._trained, config))
        self._schedule = schedule_of(self._optimizer.optimizer, config, self._updates)
        self._wrapped: nn.Module = model
        self._average = [p.detach().clone() for p in self._trained] if config.average else []
        self._epoch = 0
        self._step = 0  # batches of the epoch that were trained on
        self._total = 0.0
        self._counted = 0
        self._losses: list[float] = []
        self._scores: list[float] = []
        self._best = 0
        self._best_state: dict[str, Tensor] = {}
        self._random: dict[str, Any] | None = None
        # What an earlier backward pass of the caller left is no gradient of this loss.
        self._optimizer.zero_grad(set_to_none=True)

    def share_out(self) -> None:
        """Average gradients over the processes from here on."""
        self._wrapped = nn.parallel.DistributedDataParallel(
            self._model, find_unused_parameters=True
        )

    @property
    def _shared(self) -> bool:
        return self._wrapped is not self._model

    @property
    def _updates(self) -> int:
        return self._config.epochs * math.ceil(len(self._feed) / self._config.accumulate)

    @property
    def done(self) -> int:
        """Batches that were trained on."""
        return self._epoch * len(self._feed) + self._step

    def start(self) -> None:
        """Take up the state of the checkpoint, or measure where the model stands."""
        found = None if self._checkpoint is None else self._checkpoint.load()
        if found is not None:
            self._take_up(found)
        elif self._score is not None:
            self._judge(0)

    def steps(self) -> Iterator[None]:
        """Train to the end; one item a batch."""
        while self._epoch < self._config.epochs:
            batches = self._feed.batches(self._epoch)
            # A pass that was begun is gone through again, so that loaders draw what they drew.
            for _ in islice(batches, self._step):
                pass
            if self._random is not None:
                restore_random_state(self._random)
                self._random = None
            while group := list(islice(batches, self._config.accumulate)):
                self._update(group)
                self._step += len(group)
                yield from (None for _ in group)
                if self._checkpoint is not None and self._due(self._checkpoint):
                    self._save()
            self._epoch_done()

    def finished(self) -> Training:
        """Leave the best weights in the model."""
        self._optimizer.zero_grad(set_to_none=True)
        if self._score is not None:
            self._model.load_state_dict(self._best_state)
        elif self._average:
            self._put(self._average)
        best = self._best if self._score is not None else self._config.epochs
        return Training(tuple(self._losses), tuple(self._scores), best)

    def _update(self, group: list[Batch]) -> None:
        for index, batch in enumerate(group):
            last = index + 1 == len(group)
            with nullcontext() if last else self._unreduced():
                with self._accelerator.autocast():
                    loss, counted = self._objective(self._wrapped, batch)
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteError(
                        f"the loss became {loss.item()} in epoch {self._epoch + 1}, batch "
                        f"{self._step + index}; lower the learning rate (it is "
                        f"{self._config.peak}), or set clip"
                    )
                self._accelerator.backward(loss / len(group))
            self._total += loss.item()
            self._counted += counted
        if self._config.clip is not None:
            self._accelerator.clip_grad_norm_(self._trained, self._config.clip)
        self._optimizer.step()
        if not self._optimizer.step_was_skipped:
            self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for mean, parameter in zip(self._average, self._trained, strict=False):
                mean.lerp_(parameter, 1 - self._config.average)

    def _unreduced(self) -> AbstractContextManager[None]:
        """Gradients of a batch that is not the last of its step stay in this process."""
        if isinstance(self._wrapped, nn.parallel.DistributedDataParallel):
            return cast("AbstractContextManager[None]", self._wrapped.no_sync())
        return nullcontext()

    def _epoch_done(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self._trained):
            raise NonFiniteError(
                f"weights became NaN or infinite in epoch {self._epoch + 1}; lower the learning "
                f"rate (it is {self._config.peak}), or set clip"
            )
        self._losses.append(self._mean_loss())
        self._total, self._counted = 0.0, 0
        self._epoch, self._step = self._epoch + 1, 0
        if self._score is not None:
            self._judge(self._epoch)
        if self._checkpoint is not None:
            self._save()

    def _mean_loss(self) -> float:
        sums = torch.tensor([self._total, float(self._step), float(self._counted)])
        if self._shared:
            # Batch norms' statistics are those of each process's own batches: the first's count.
            with_first_state(self._model)
            sums = summed([sums])[0]
        if not sums[2]:
            raise DataError(
                f"no position of the training data counts for the loss in epoch "
                f"{self._epoch + 1}: its labels are all -100 (ignored), or its attention_mask "
                f"excludes every token. Give data in which some count, or inputs alone and "
                f"original= to learn what that predicts"
            )
        return float(sums[0] / sums[1].clamp_min(1))

    def _judge(self, epochs: int) -> None:
        assert self._score is not None
        current = [p.detach().clone() for p in self._trained] if self._average else []
        self._put(self._average)
        score = self._score(self._model)
        score = from_first(score) if self._shared else score
        if not math.isfinite(score):
            raise NonFiniteError(
                f"the score on held-out data became {score} after {epochs} epochs; lower the "
                f"learning rate (it is {self._config.peak}), or set clip"
            )
        self._scores.append(score)
        if epochs >= self._least and score <= min(self._scores[self._least :]):
            self._best = epochs
            self._best_state = {k: v.clone() for k, v in self._model.state_dict().items()}
        self._put(current)

    def _put(self, weights: list[Tensor]) -> None:
        """Give the trained parameters these values; none change nothing."""
        with torch.no_grad():
            for parameter, value in zip(self._trained, weights, strict=False):
                parameter.copy_(value)

    def _due(self, checkpoint: Checkpoint) -> bool:
        return from_first(checkpoint.due) if self._shared else checkpoint.due

    def _save(self) -> None:
        assert self._checkpoint is not None
        scaler = self._accelerator.scaler
        self._checkpoint.save(
            {
                "epoch": self._epoch,
                "step": self._step,
                "total": self._total,
                "counted": self._counted,
                "losses": self._losses,
                "scores": self._scores,
                "best": self._best,
                "best_state": self._best_state,
                "average": self._average,
                "model": self._model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "random": random_state(),
            }
        )

    def _take_up(self, state: dict[str, Any]) -> None:
        self._epoch, self._step = state["epoch"], state["step"]
        self._total, self._counted = state["total"], state["counted"]
        self._losses, self._scores = list(state["losses"]), list(state["scores"])
        self._best, self._best_state = state["best"], state["best_state"]
        self._average = state["average"]
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if state["scaler"] is not None and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self._random = state["random"]
