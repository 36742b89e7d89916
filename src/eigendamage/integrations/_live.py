"""Rounds of compression on a model that is being trained by somebody else's loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, cast, runtime_checkable
from weakref import ref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from eigendamage.batches import Data
from eigendamage.compress import Compressed
from eigendamage.distributed import world
from eigendamage.errors import DataError, EigenDamageError, warn
from eigendamage.integrations._adopt import adopt
from eigendamage.plan import Budget
from eigendamage.report import Report


@runtime_checkable
class Compressor(Protocol):
    """`compress`, or a `functools.partial` of it with some of its options set."""

    def __call__(self, model: nn.Module, data: Data, *, budget: Budget) -> Compressed:
        """Make a model smaller; the one given is not changed."""
        ...


class LiveRounds:
    """A budget that is reached in several rounds, each in place on a model in training.

    Sizes shrink by the same factor in every round, as for ``compress(rounds=…)``.

    Attributes:
        reports: of the rounds so far, each relative to the model that it began with.
        left: the fraction of the first model's sizes that is left, by the budget's units.
    """

    def __init__(self, budget: Budget, moments: Sequence[int], compressor: Compressor) -> None:
        """Plan the rounds.

        Args:
            budget: what is left after the last round, as a fraction of the model before the first.
            moments: when there is to be a round: steps or epochs, from 1 on.
            compressor: how a round is done.

        Raises:
            EigenDamageError: if no round is asked for, or one at no step.
        """
        if not moments or min(moments) < 1 or len(set(moments)) != len(moments):
            raise EigenDamageError(
                f"rounds are asked for at {list(moments)}; give different steps or epochs, from 1 "
                f"on, as at_steps= or at_epochs="
            )
        self.reports: list[Report] = []
        self.left: dict[str, float] = {}
        self._budget = budget
        self._moments = tuple(sorted(moments))
        self._compressor = compressor
        self._model: ref[nn.Module] | None = None

    def begin(self, model: nn.Module) -> None:
        """Before a training: refuse one in which there would be no round, or none of this model.

        Raises:
            EigenDamageError: if all rounds were in an earlier training, or those that were changed
                another model.
        """
        done, planned = len(self.reports), len(self._moments)
        if done == planned:
            raise EigenDamageError(
                f"all {planned} rounds of this callback were in an earlier training, so that there "
                f"would be none in this; make a new callback for it, or leave it out"
            )
        if self._model is not None and self._model() is not model:
            raise EigenDamageError(
                f"{done} of {planned} rounds of this callback were of another model, in an earlier "
                f"training; make a new callback for this one"
            )

    def due(self, moment: int) -> bool:
        """Whether the step or epoch of the next round is reached, or was passed over."""
        done = len(self.reports)
        return done < len(self._moments) and self._moments[done] <= moment

    def take(self, model: nn.Module, data: Data, optimizers: Iterable[Optimizer]) -> Report:
        """The next round.

        Args:
            model: the network, which becomes smaller in place.
            data: some batches for the curvature and the repair.
            optimizers: that train it; they go on with the new parameters.

        Raises:
            EigenDamageError: as `compress` and `adopt` do. The model is then as it was.
        """
        goal = (len(self.reports) + 1) / len(self._moments)
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.enable_grad():
                step = self._budget.step(goal, self.left)
                result = self._compressor(model, data, budget=step)
        finally:
            for module, training in modes:
                module.training = training
        for unit, fraction in _left(model, result).items():
            self.left[unit] = self.left.get(unit, 1.0) * fraction
        adopt(model, result, optimizers)
        self._model = ref(model)
        self.reports.append(result.report)
        return result.report

    def end(self) -> None:
        """Warn of rounds that the training ended before."""
        if missed := self._moments[len(self.reports) :]:
            warn(
                f"the training ended before {len(missed)} of {len(self._moments)} rounds, which "
                f"were to be at {list(missed)}: the budget of {self._budget} is not reached"
            )


def moments_of(at_steps: Sequence[int], at_epochs: Sequence[int]) -> Sequence[int]:
    """When there are rounds, where only one of the two is given.

    Raises:
        EigenDamageError: if both are.
    """
    if at_steps and at_epochs:
        raise EigenDamageError("give at_steps or at_epochs, not both")
    return at_steps or at_epochs


def require_one_process(what: str, *, alone: bool) -> None:
    """Refuse a training that is shared out: the other copies of the model would stay as they are.

    Raises:
        EigenDamageError: if it is.
    """
    if not alone or world() > 1:
        raise EigenDamageError(
            f"{what} shares the training out (DDP, FSDP, DeepSpeed or DataParallel); a round "
            f"changes the model of one process on one device. Train on one device, or compress "
            f"afterwards"
        )


def some_batches(loader: object, count: int, seed: int) -> list[Any]:
    """A few batches of a training loader, drawn anew: the training's own pass goes on undisturbed.

    Args:
        loader: a DataLoader; of anything else the first batches are taken.
        count: how many.
        seed: of the draw of examples.

    Raises:
        DataError: if it is nothing to go through, has no batch, or is several loaders.
    """
    if count < 1:
        raise DataError(f"batches is {count}; a round needs at least one")
    if names := _several(loader):
        raise DataError(
            f"the training data is a {type(loader).__name__} of loaders ({', '.join(names)}), and "
            f"which of their batches the network takes is not known; give the callback data=, such "
            f"as one of the loaders"
        )
    if isinstance(loader, DataLoader):
        found = list(islice(_drawn(cast("DataLoader[Any]", loader), count, seed), count))
    elif isinstance(loader, Iterable) and not isinstance(loader, Iterator):
        found = list(islice(cast("Iterable[Any]", loader), count))
    else:
        raise DataError(
            f"the training data is {type(loader).__name__}, which cannot be gone through beside "
            f"the training; give the callback data="
        )
    if not found:
        raise DataError("the training loader has no batch; give the callback data=")
    return found


def _several(loader: object) -> list[str]:
    """What several loaders in a container are called there; nothing of all else."""
    if isinstance(loader, Mapping):
        return [repr(key) for key in cast("Mapping[object, object]", loader)]
    if isinstance(loader, list | tuple):
        items = cast("list[object] | tuple[object, ...]", loader)
        if any(isinstance(item, DataLoader) or _several(item) for item in items):
            return [f"number {index}" for index in range(len(items))]
    return []


def _drawn(loader: DataLoader[Any], count: int, seed: int) -> Iterator[Any]:
    dataset, sampler = loader.dataset, loader.batch_sampler
    # A loader without a generator draws from the global one, which the training goes on with.
    generator = torch.Generator().manual_seed(seed)
    size = loader.batch_size or getattr(sampler, "batch_size", None)
    collate = loader.collate_fn
    if isinstance(dataset, IterableDataset) or (size is None and sampler is None):
        return iter(DataLoader(dataset, size, collate_fn=collate, generator=generator))
    if size is None:
        chosen = list(islice(cast("Iterable[list[int]]", sampler), count))
    else:
        order = torch.randperm(len(cast("Any", dataset)), generator=generator).tolist()
        chosen = [order[n : n + size] for n in range(0, min(len(order), count * size), size)]
    return iter(DataLoader(dataset, batch_sampler=chosen, collate_fn=collate, generator=generator))


def _left(model: nn.Module, result: Compressed) -> dict[str, float]:
    """What a round left of the model that it began with, by unit."""
    report = result.report
    left = {
        "macs": report.macs[1] / report.macs[0],
        "params": report.parameters[1] / report.parameters[0],
        "bytes": _bytes(result.model) / _bytes(model),
    }
    return left if report.latency is None else {**left, "latency": report.latency}


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
