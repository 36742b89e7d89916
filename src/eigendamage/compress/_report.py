"""The report of what `compress` did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from torch import nn

from eigendamage.batches import Batches, Data
from eigendamage.calls import device_of
from eigendamage.compress._prepare import Preparation
from eigendamage.compress._steps import Built
from eigendamage.compress._truth import truth_of
from eigendamage.compress._unseen import other_outputs, padding, sizes_against
from eigendamage.curvature import Curvature, calibration_table
from eigendamage.measure import count, evaluate_together
from eigendamage.plan import Budget, Plan
from eigendamage.report import (
    Environment,
    Measured,
    Report,
    TrainingReport,
    calibration_by_layer,
    layer_reports,
    spectra_by_layer,
)


@dataclass(frozen=True, eq=False)
class Versions:
    """The models beside those that were built that a report tells of.

    Attributes:
        original: that results are measured against.
        plans: of earlier rounds, which began with it.
        anew: the result with batch norm's statistics measured again; None if they were not.
        polished: after the polish; None if there was none.
        polish: how that went.
    """

    original: nn.Module
    plans: tuple[Plan, ...]
    anew: nn.Module | None
    polished: nn.Module | None
    polish: TrainingReport | None


def report_of(
    model: nn.Module,
    chain: Sequence[Built],
    beside: Versions,
    eval_data: Data | None,
    curvature: Curvature,
    ready: Preparation,
    *,
    traces: int,
    budget: Budget,
) -> Report:
    """What was expected and what is measured now.

    Args:
        model: what the shots began with.
        chain: the shots that led to the result.
        beside: what else is measured.
        eval_data: what to measure on; the data itself if there is none.
        curvature: of the original.
        ready: the data and what the steps share.
        traces: examples for the table of Fisher traces.
        budget: what was asked for.
    """
    data, settings = ready.data, ready.settings
    last, clock = chain[-1], settings.clock
    plan = last.plan
    repaired = last.model if last.repairs is not None else None
    after = [m for m in (repaired, beside.anew, beside.polished) if m is not None]
    versions = [beside.original, last.cut, *after]
    with clock.stage("measurement"):
        measured = evaluate_together(
            versions,
            data if eval_data is None else eval_data,
            loss=settings.loss,
            max_examples=ready.options.max_examples if eval_data is None else None,
            reduction=settings.reduction,
            progress=settings.progress,
        )
    truth = truth_of(model, chain, settings)
    rows = []
    if traces:
        with clock.stage("calibration table"):
            rows = calibration_table(
                model,
                data,
                curvature,
                loss=settings.loss,
                examples=traces,
                reduction=settings.reduction,
                seed=settings.seed,
            )
    found = [Measured.of(m) for m in measured]
    results = dict(zip(map(id, versions), found, strict=True))
    first = (*beside.plans, *(shot.plan for shot in chain))[0]
    prices = [shot.plan.price for shot in chain]
    sizes = count(beside.original, data), count(versions[-1], data)
    doubt = () if truth is None or truth.note is None else (truth.note,)
    batch = Batches(data, device_of(model), ready.options.max_examples).peek()
    unseen = [*padding(versions[-1])]
    if all(layer.action.kind != "mask" for layer in plan.layers.values()):
        began = sizes[0] if model is beside.original else count(model, data)
        unseen += sizes_against(budget, began, sizes[1])
    changed = any(each.changed for each in (*beside.plans, *(shot.plan for shot in chain)))
    if changed and isinstance(settings.loss, str):  # a function is given all outputs
        unseen += other_outputs(beside.original, versions[-1], batch)
    return Report(
        model=type(beside.original).__name__,
        method=plan.title,
        budget=str(budget),
        asked=budget.given,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        ratio=plan.ratio,
        macs=(sizes[0].macs, sizes[1].macs),
        parameters=(sizes[0].parameters, sizes[1].parameters),
        examples=curvature.examples,
        predicted=None if None in prices else sum(p for p in prices if p is not None),
        measured_on="data" if eval_data is None else "eval_data",
        measured_examples=measured[0].examples,
        original=found[0],
        compressed=found[1],
        repaired=results.get(id(repaired)),
        recalibrated=results.get(id(beside.anew)),
        polished=results.get(id(beside.polished)),
        polish=beside.polish,
        layers=layer_reports(plan, first),
        left_alone=plan.left_alone,
        calibration=calibration_by_layer(rows),
        spectra=spectra_by_layer(curvature),
        truth=truth,
        latency=None if last.latency is None else _product(chain),
        gap=plan.gap,
        seconds=clock.seconds,
        environment=Environment.here(device_of(model), settings.seed),
        notes=(*plan.notes, *ready.notes, *last.notes, *doubt, *unseen),
    )


def _product(chain: Sequence[Built]) -> float:
    fraction = 1.0
    for shot in chain:
        fraction *= shot.latency or 1.0
    return fraction
