"""A comparison of methods as data: one row a method and budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from eigendamage.documents import Document, Frozen
from eigendamage.report._environment import Environment
from eigendamage.report._measured import Measured

COMPARISON_VERSION = 1


class Settings(Frozen):
    """What every row of a comparison shares; another run adds rows only to the same settings.

    Attributes:
        model: class name of the model.
        weights: SHA-256 of the model's parameters and buffers.
        data: SHA-256 of the first batch of the inputs; likewise ``train_data`` and ``eval_data``.
        unit: what budgets are fractions of.
        max_examples: the most examples of the curvature; None for all of the data.
        train_batches: batches of one epoch of training; 0 for none.
        train_data: SHA-256 of the first of them.
        epochs: of training after each compression, divided among the rounds where there are any.
        learning_rate: its peak.
        measured_on: what the models were measured on, in words.
        eval_data: SHA-256 of the first batch to measure on.
        fisher: which labels the curvature takes.
        seed: of label draws.
    """

    model: str
    weights: str
    data: str
    unit: Literal["macs", "params", "bytes"]
    max_examples: int | None
    train_batches: int
    train_data: str | None
    epochs: int
    learning_rate: float
    measured_on: str
    eval_data: str
    fisher: str
    seed: int


class Row(Frozen):
    """One method at one budget.

    Attributes:
        method: as it was named: ``METHOD[:VARIANT][@ROUNDS]``.
        budget: the fraction asked for.
        macs: left, as a fraction of the original's.
        parameters: left likewise, those that are not masked to zero.
        predicted: expected rise of the loss right after surgery; None where the method has none or
            where there are several rounds.
        surgery: right after (the last) surgery; after the repair on data where the method has one.
        recalibrated: with batch norm's statistics measured again; None if there is none.
        tuned: after training; None if there was none.
        seconds: of compressing (without the curvature that all share) and of training.
        masks: whether weights are masked to zero, which saves no MACs.
        refused: why the method could not do it; the rest is then None.
    """

    method: str
    budget: float
    macs: float | None = None
    parameters: float | None = None
    predicted: float | None = None
    surgery: Measured | None = None
    recalibrated: Measured | None = None
    tuned: Measured | None = None
    seconds: Mapping[str, float] = {}
    masks: bool = False
    refused: str | None = None

    @property
    def final(self) -> Measured | None:
        """The model at the end: tuned if it was, else recalibrated if it was."""
        return self.tuned or self.recalibrated or self.surgery


class Comparison(Document):
    """Several methods on one model at equal budgets.

    Attributes:
        version: of the file format.
        command: what made it.
        settings: what every row shares.
        original: the model as it was.
        measured_examples: how many examples all models were measured on.
        rows: a method at a budget each, in the order in which they were asked for.
        environment: versions, device, threads.
    """

    version: Literal[1] = COMPARISON_VERSION
    command: str
    settings: Settings
    original: Measured
    measured_examples: int
    rows: tuple[Row, ...]
    environment: Environment

    def find(self, method: str, budget: float) -> Row | None:
        """The row of a method and budget, if it is there."""
        found = (r for r in self.rows if (r.method, r.budget) == (method, budget))
        return next(found, None)
