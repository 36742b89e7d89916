"""A callback of Hugging Face's Trainer that compresses the model while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eigendamage.batches import Data, kept
from eigendamage.compress import compress
from eigendamage.integrations._live import (
    Compressor,
    LiveRounds,
    moments_of,
    require_one_process,
    some_batches,
)
from eigendamage.plan import Budget
from eigendamage.report import Report
from eigendamage.seeds import check_seed


class CompressionCallback(TrainerCallback):
    """Rounds of compression at chosen steps or epochs of a ``transformers.Trainer``.

    Each round takes curvature, plan, surgery and repair on a few batches, in place on the model;
    the optimizer and its schedule go on with the parameters that are left. A checkpoint that is
    saved after a round is one of the smaller model: to go on from it, build that model first.
    ``load_best_model_at_end`` cannot go back behind a round. A callback is for one training: a
    later one of the same model takes the rounds that are left, and is refused where none is.

    Attributes:
        reports: of the rounds so far, each relative to the model that it began with.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        at_steps: Sequence[int] = (),
        at_epochs: Sequence[int] = (),
        data: Data | None = None,
        batches: int = 8,
        compressor: Compressor = compress,
        seed: int = 0,
    ) -> None:
        """Plan the rounds.

        Args:
            budget: what is left after the last round; sizes shrink by the same factor in each.
            at_steps: after which steps of the optimizer, from 1 on.
            at_epochs: or after which epochs, from 1 on.
            data: inputs for the rounds; by default batches of the training data, drawn anew.
            batches: how many of these.
            compressor: how a round is done: a `functools.partial` of `compress` with options set,
                such as ``loss="causal_lm"`` for a language model.
            seed: of the draw of batches.

        Raises:
            EigenDamageError: if no round is asked for, if both steps and epochs are given, or if
                the seed is none.
        """
        check_seed(seed)
        self._rounds = LiveRounds(budget, moments_of(at_steps, at_epochs), compressor)
        self._by_steps = bool(at_steps)
        self._data, self._batches, self._seed = kept(data), batches, seed

    @property
    def reports(self) -> Sequence[Report]:
        """Of the rounds so far."""
        return self._rounds.reports

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuse a training that is shared out, or in which there would be no round."""
        alone = args.world_size == 1 and args.n_gpu <= 1 and not args.deepspeed
        require_one_process("this Trainer", alone=alone)
        self._rounds.begin(kwargs["model"])

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """A round, if one is due after this step."""
        while self._by_steps and self._rounds.due(state.global_step):
            self._take(**kwargs)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """A round, if one is due after this epoch."""
        while not self._by_steps and self._rounds.due(round(state.epoch or 0)):
            self._take(**kwargs)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Warn of rounds that did not come about."""
        self._rounds.end()

    def _take(self, *, model: Any, optimizer: Any, train_dataloader: Any, **_: Any) -> None:
        data = self._data
        if data is None:
            data = some_batches(train_dataloader, self._batches, self._seed)
        # accelerate wraps the optimizer; groups and state are those of the one within.
        inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._rounds.take(model, data, [inner])
