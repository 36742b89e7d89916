"""One row of a comparison: compress, train, measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from eigendamage.batches import Data
from eigendamage.compare._competitor import Competitor
from eigendamage.compare._dealt import Dealt
from eigendamage.compress import compress
from eigendamage.curvature import Curvature, Fisher, preserved_random_state
from eigendamage.errors import EigenDamageError
from eigendamage.measure import Evaluation, evaluate
from eigendamage.plan import Budget, Unit, needs
from eigendamage.report import Measured, Report, Row
from eigendamage.training import FinetuneConfig, finetune


@dataclass(frozen=True, eq=False)
class Contest:
    """What every row starts from: one model, one curvature, the same images and training.

    Attributes:
        model: the trained network.
        data: inputs, as for `compress`.
        eval_data: what to measure on.
        curvature: with what all methods need.
        no_channels: why it has no groups of channels although they are needed.
        train_data: returns batches to train on; None for no training.
        config: of the training.
        fisher: which labels later rounds take.
        max_examples: the most examples of ``data``.
        seed: of draws.
        progress: whether to show progress.
    """

    model: nn.Module
    data: Data
    eval_data: Data
    curvature: Curvature
    no_channels: str | None
    train_data: Callable[[], Iterable[Any]] | None
    config: FinetuneConfig
    fisher: Fisher
    max_examples: int | None
    seed: int
    progress: bool

    def row(self, competitor: Competitor, fraction: float, unit: Unit) -> Row:
        """Compress, train and measure."""
        budget = competitor.budget(fraction, unit)
        if self.no_channels is not None and "channels" in needs(competitor.method):
            return Row(method=competitor.name, budget=fraction, refused=self.no_channels)
        try:
            # Dropout draws the same for every row, whichever came before, and not from the caller.
            with preserved_random_state():
                torch.manual_seed(self.seed)
                if competitor.rounds > 1:
                    return self._in_rounds(competitor, fraction, budget)
                return self._at_once(competitor, fraction, budget)
        except EigenDamageError as error:
            # One method that cannot do this model must not end what the others began.
            return Row(method=competitor.name, budget=fraction, refused=str(error))

    def _in_rounds(self, competitor: Competitor, fraction: float, budget: Budget) -> Row:
        start = time.perf_counter()
        rounds = competitor.rounds
        shares = None if self.train_data is None else Dealt(self.train_data(), rounds)
        result = compress(
            self.model,
            self.data,
            budget=budget,
            rounds=rounds,
            epochs=0 if shares is None else self.config.epochs,
            train_data=shares,
            finetuning=None if shares is None else self.config,
            method=competitor.method,
            variant=competitor.variant,
            eval_data=self.eval_data,
            curvature=self.curvature,
            fisher=self.fisher,
            max_examples=self.max_examples,
            calibration_examples=0,
            seed=self.seed,
            progress=self.progress,
        )
        report = result.report
        return Row(
            method=competitor.name,
            budget=fraction,
            macs=report.macs[1] / report.macs[0],
            parameters=_left(result.model, self.model),
            surgery=_untrained(report),
            recalibrated=report.recalibrated,
            tuned=report.finetuned,
            seconds={"rounds": time.perf_counter() - start},
            masks=competitor.masks,
        )

    def _at_once(self, competitor: Competitor, fraction: float, budget: Budget) -> Row:
        start = time.perf_counter()
        result = compress(
            self.model,
            self.data,
            budget=budget,
            method=competitor.method,
            variant=competitor.variant,
            eval_data=self.eval_data,
            curvature=self.curvature,
            max_examples=self.max_examples,
            calibration_examples=0,
            seed=self.seed,
            progress=self.progress,
        )
        seconds = {"compressing": time.perf_counter() - start}
        tuned = None
        if self.train_data is not None:
            start = time.perf_counter()
            finetune(result.model, self.train_data(), self.config, progress=self.progress)
            seconds["training"] = time.perf_counter() - start
            tuned = Measured.of(self._measured(result.model))
        report = result.report
        return Row(
            method=competitor.name,
            budget=fraction,
            macs=report.macs[1] / report.macs[0],
            parameters=_left(result.model, self.model),
            predicted=report.predicted,
            surgery=_untrained(report),
            recalibrated=report.recalibrated,
            tuned=tuned,
            seconds=seconds,
            masks=competitor.masks,
        )

    def _measured(self, model: nn.Module) -> Evaluation:
        return evaluate(model, self.eval_data, reference=self.model, progress=self.progress)


def _untrained(report: Report) -> Measured:
    """What a method gives before batch norm is measured anew: repaired on data, if it does that."""
    return report.compressed if report.repaired is None else report.repaired


def _left(model: nn.Module, original: nn.Module) -> float:
    """Parameters of a model that are not masked to zero, as a fraction of the original's."""
    buffers = dict(model.named_buffers())
    masked = sum(
        int((buffers[mask] == 0).sum())
        for name, _ in model.named_parameters()
        if name.endswith("_orig") and (mask := f"{name.removesuffix('_orig')}_mask") in buffers
    )
    return (_parameters(model) - masked) / _parameters(original)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
