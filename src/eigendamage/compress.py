"""compress: curvature, plan, surgery, batch norm, report, in one call."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import nn

from eigendamage.batches import Data, device_of
from eigendamage.curvature import (
    Curvature,
    EigenvalueKind,
    Fisher,
    Loss,
    calibration_table,
    estimate_curvature,
    loss_name,
)
from eigendamage.errors import MismatchError
from eigendamage.layers import copy_model
from eigendamage.measure import count, evaluate_together
from eigendamage.plan import (
    Budget,
    FormChoice,
    Plan,
    RankBy,
    check_options,
    make_plan,
    needs,
)
from eigendamage.report import (
    Environment,
    Measured,
    Report,
    calibration_by_layer,
    layer_reports,
)
from eigendamage.surgery import apply_plan, recalibrate_batchnorm


@dataclass(frozen=True, eq=False)
class Compressed:
    """What `compress` returns.

    Attributes:
        model: the smaller model, a plain module.
        plan: what was done to each layer.
        curvature: what it was decided by; another budget needs no new one.
        report: what was expected and what was measured.
    """

    model: nn.Module
    plan: Plan
    curvature: Curvature
    report: Report


def compress(
    model: nn.Module,
    data: Data,
    *,
    budget: Budget,
    method: str = "eigendamage",
    variant: str | None = None,
    eval_data: Data | None = None,
    curvature: Curvature | None = None,
    loss: Loss = "cross_entropy",
    fisher: Fisher = "mc",
    eigenvalues: EigenvalueKind = "ekfac",
    max_ratio: float = 0.95,
    form: FormChoice = "cheapest",
    damping: float = 1e-3,
    rank_by: RankBy | None = None,
    ignore: Iterable[str] = (),
    max_examples: int | None = None,
    recalibrate: bool = True,
    calibration_examples: int = 64,
    reduction: Literal["mean", "sum"] = "mean",
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Make a trained model smaller by its curvature. The model given is not changed.

    Args:
        model: the trained network.
        data: some of its inputs in batches; labels are not needed unless ``fisher="empirical"``.
        budget: how small the result has to be.
        method: see `make_plan`; likewise ``variant``, ``max_ratio``, ``form``, ``damping`` and
            ``rank_by``.
        variant: the form of the method.
        eval_data: held-out batches to measure on; ``data`` itself if there is none, which the
            report then says. Nothing is chosen by it.
        curvature: of this model, if it was estimated before; saves the passes over the data.
        loss: see `estimate_curvature`; likewise ``fisher``, ``eigenvalues``,
            ``max_examples``, ``reduction`` and ``seed``.
        fisher: which labels.
        eigenvalues: λ, or the paper's Λ_S Λ_A.
        max_ratio: the most of one side of a layer, or of a group of channels, that may go.
        form: how factored layers are laid out.
        damping: of S and A where they are inverted.
        rank_by: by price, or by price for what is saved.
        ignore: shell patterns over dotted paths of layers to leave alone.
        max_examples: the most examples of ``data`` to use.
        recalibrate: measure batch norm's statistics again on ``data``, without labels.
        calibration_examples: how many examples the calibration table is made of; 0 for none.
        reduction: what a loss function that returns one number has done over the batch.
        seed: of the label draws, and of the method ``random``.
        progress: whether to show progress.

    Returns:
        The smaller model with its plan, curvature and report. A budget that asks for no change
        returns a copy of the model, and the report's notes say so.

    Raises:
        EigenDamageError: one of its subclasses, as `estimate_curvature` and
            `make_plan` say.
    """
    check_options(
        budget,
        method=method,
        variant=variant,
        max_ratio=max_ratio,
        form=form,
        damping=damping,
        rank_by=rank_by,
    )
    clock = _Clock()
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    # One view of the data for all stages: a generator is used up by the first.
    data = list(data) if isinstance(data, Iterator) else data
    if eval_data is not None and isinstance(eval_data, Iterator):
        eval_data = list(eval_data)
    if curvature is None:
        with clock.stage("curvature"):
            curvature = estimate_curvature(
                model,
                data,
                loss=loss,
                fisher=fisher,
                eigenvalues=eigenvalues,
                ignore=ignored,
                max_examples=max_examples,
                also=needs(method),
                reduction=reduction,
                seed=seed,
                progress=progress,
            )
            ignored = ()
    elif curvature.loss != loss_name(loss):
        raise MismatchError(
            f"the curvature given is of the loss '{curvature.loss}', not of '{loss_name(loss)}'"
        )
    with clock.stage("plan"):
        plan = make_plan(
            model,
            curvature,
            budget,
            method=method,
            variant=variant,
            max_ratio=max_ratio,
            form=form,
            eigenvalues=eigenvalues if curvature.kind == "ekfac" else None,
            damping=damping,
            rank_by=rank_by,
            ignore=ignored,
            seed=seed,
        )
    with clock.stage("surgery"):
        compressed = apply_plan(model, plan, curvature)
    versions = [model, compressed]
    if recalibrate and plan.changed:
        with clock.stage("batch norm"):
            again = copy_model(compressed)
            if recalibrate_batchnorm(again, data, max_examples=max_examples, progress=progress):
                versions.append(again)
    small = versions[-1]
    with clock.stage("measurement"):
        measured = evaluate_together(
            versions,
            data if eval_data is None else eval_data,
            loss=loss,
            max_examples=max_examples if eval_data is None else None,
            reduction=reduction,
            progress=progress,
        )
    rows = []
    if calibration_examples:
        with clock.stage("calibration table"):
            rows = calibration_table(
                model,
                data,
                curvature,
                loss=loss,
                examples=calibration_examples,
                reduction=reduction,
                seed=seed,
            )
    before, after = count(model, data), count(small, data)
    report = Report(
        model=type(model).__name__,
        method=plan.title,
        budget=str(budget),
        ratio=plan.ratio,
        macs=(before.macs, after.macs),
        parameters=(before.parameters, after.parameters),
        examples=curvature.examples,
        predicted=plan.price,
        measured_on="data" if eval_data is None else "eval_data",
        measured_examples=measured[0].examples,
        original=Measured.of(measured[0]),
        compressed=Measured.of(measured[1]),
        recalibrated=Measured.of(measured[2]) if len(measured) > 2 else None,
        layers=layer_reports(plan),
        left_alone=plan.left_alone,
        calibration=calibration_by_layer(rows),
        seconds=clock.seconds,
        environment=Environment.here(device_of(model), seed),
        notes=plan.notes,
    )
    return Compressed(small, plan, curvature, report)


class _Clock:
    """Adds up wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
