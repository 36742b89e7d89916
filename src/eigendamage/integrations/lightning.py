"""A callback of Lightning that compresses the model while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from eigendamage.batches import Data, kept
from eigendamage.compress import compress
from eigendamage.errors import MismatchError
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


class CompressionCallback(Callback):
    """Rounds of compression at chosen steps or epochs of a ``lightning.pytorch.Trainer``.

    Each round takes curvature, plan, surgery and repair on a few batches, in place on the network;
    optimizers and their schedules go on with the parameters that are left. A checkpoint that is
    saved after a round is one of the smaller network: to go on from it, build that network first.
    A callback is for one training: a later one of the same network takes the rounds that are left,
    and is refused where none is.

    Attributes:
        reports: of the rounds so far, each relative to the network that it began with.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        at_steps: Sequence[int] = (),
        at_epochs: Sequence[int] = (),
        network: str = "",
        data: Data | None = None,
        batches: int = 8,
        compressor: Compressor = compress,
        seed: int = 0,
    ) -> None:
        """Plan the rounds.

        Args:
            budget: what is left after the last round; sizes shrink by the same factor in each.
            at_steps: after which steps of the optimizer (``trainer.global_step``), from 1 on; with
                several optimizers after the batch in which a step is reached or passed.
            at_epochs: or after which epochs, from 1 on.
            network: dotted path of the network within the LightningModule, such as ``"model"``; it
                is called with the inputs of a batch. By default the LightningModule itself is.
            data: inputs for the rounds; by default batches of the training data, drawn anew. With
                several loaders of training data it has to be given.
            batches: how many of these.
            compressor: how a round is done: a `functools.partial` of `compress` with options set.
            seed: of the draw of batches.

        Raises:
            EigenDamageError: if no round is asked for, if both steps and epochs are given, or if
                the seed is none.
        """
        super().__init__()
        check_seed(seed)
        self._rounds = LiveRounds(budget, moments_of(at_steps, at_epochs), compressor)
        self._by_steps = bool(at_steps)
        self._network = network
        self._data, self._batches, self._seed = kept(data), batches, seed

    @property
    def reports(self) -> Sequence[Report]:
        """Of the rounds so far."""
        return self._rounds.reports

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a training that is shared out, or in which there would be no round.

        Raises:
            EigenDamageError: if it is one.
            MismatchError: if the LightningModule has no module at the path of the network, or one
                without a forward.
        """
        alone = isinstance(trainer.strategy, SingleDeviceStrategy)
        require_one_process(f"{type(trainer.strategy).__name__} of this Trainer", alone=alone)
        self._rounds.begin(self._network_of(pl_module))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """A round, if one is due after this step.

        All that are due: several optimizers make several steps of a batch.
        """
        while self._by_steps and self._rounds.due(trainer.global_step):
            self._take(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A round, if one is due after this epoch."""
        while not self._by_steps and self._rounds.due(trainer.current_epoch + 1):
            self._take(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of rounds that did not come about."""
        self._rounds.end()

    def _take(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = self._data
        if data is None:
            data = some_batches(trainer.train_dataloader, self._batches, self._seed)
        self._rounds.take(self._network_of(pl_module), data, trainer.optimizers)

    def _network_of(self, pl_module: LightningModule) -> nn.Module:
        what = type(pl_module).__name__
        try:
            network = pl_module.get_submodule(self._network)
        except AttributeError as error:
            raise MismatchError(
                f"network='{self._network}': the {what} has no module of that path; some that it "
                f"has are {_some(pl_module)}"
            ) from error
        if not _can_be_called(network):
            where = f"network='{self._network}': that {type(network).__name__}"
            where = where if self._network else f"the {what}"
            raise MismatchError(
                f"{where} has no forward, so it cannot be called with a batch; give the path of "
                f"the network within the {what} as network=, some are {_some(pl_module)}"
            )
        return network


def _can_be_called(module: nn.Module) -> bool:
    own = getattr(module.forward, "__func__", module.forward)
    return own not in (nn.Module.forward, LightningModule.forward)


def _some(module: nn.Module) -> str:
    found = [name for name, inner in module.named_modules() if name and _can_be_called(inner)]
    return ", ".join(found[:8]) or "none"
