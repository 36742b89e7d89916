"""A sweep over budgets as data: one row a budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from eigendamage.documents import Document, Frozen
from eigendamage.report._environment import Environment
from eigendamage.report._measured import Measured

SWEEP_VERSION = 1


class SweepRow(Frozen):
    """One budget.

    Attributes:
        budget: what was asked for, in words.
        macs: left, as a fraction of the original's.
        parameters: left likewise.
        latency: left likewise; None where it was not measured.
        priced: expected rise of the loss, by the prices as they are.
        calibrated: by prices corrected by measurements; None if they were not.
        gap: the most that a better allocation of the same menus could save of the price.
        measured: the model that `compress` would hand back; None where it was not built.
        seconds: of planning, and of building and measuring where that was asked for.
        error: why the budget cannot be met; None if it can, and otherwise the rest is None.
        notes: what a user should know of the model that was built.
    """

    budget: str
    macs: float | None = None
    parameters: float | None = None
    latency: float | None = None
    priced: float | None = None
    calibrated: float | None = None
    gap: float | None = None
    measured: Measured | None = None
    seconds: float
    error: str | None = None
    notes: tuple[str, ...] = ()


class Sweep(Document):
    """One model at many budgets, all by one curvature and one set of menus.

    Attributes:
        version: of the file format.
        model: class name of the model.
        examples: of the curvature.
        measured_on: ``eval_data``; or the part of the data that was ``held_out`` from curvature and
            repair; or all of the ``data``, where nothing was held out.
        measured_examples: how many examples all models were measured on.
        original: the model as it was.
        rows: a budget each, in the order in which they were asked for.
        left_alone: why other modules with parameters are in no plan.
        seconds: of what all rows share, by stage.
        environment: versions, device, threads, seed.
        notes: what a user should know.
    """

    version: Literal[1] = SWEEP_VERSION
    model: str
    examples: int
    measured_on: Literal["eval_data", "held_out", "data"]
    measured_examples: int
    original: Measured
    rows: tuple[SweepRow, ...]
    left_alone: Mapping[str, str]
    seconds: Mapping[str, float]
    environment: Environment
    notes: tuple[str, ...] = ()
