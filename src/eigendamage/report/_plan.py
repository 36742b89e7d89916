"""A plan in words: what would be done to each layer, at what price, before anything is done."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from eigendamage.documents import Frozen
from eigendamage.plan import Plan
from eigendamage.report._report import LayerReport, layer_reports
from eigendamage.report._terminal import count_of, layer_table, left_alone_table, number, percent


class PlanReport(Frozen):
    """What a plan would do.

    Attributes:
        method: name of the method.
        budget: what was asked for, in words; of the first of several steps.
        macs: of one example in the whole model, before and after.
        parameters: before and after.
        price: expected rise of the mean loss per example; None where the method's measure is none.
        calibrated: the same by calibrated prices; None if they were not calibrated.
        gap: the most that a better allocation could save of the price; see `Plan`.
        layers: each layer.
        left_alone: every other module with parameters, with the reason.
        notes: what a user should know.
    """

    method: str
    budget: str
    macs: tuple[float, float]
    parameters: tuple[int, int]
    price: float | None
    calibrated: float | None
    gap: float | None
    layers: Mapping[str, LayerReport]
    left_alone: Mapping[str, str]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, plan: Plan) -> PlanReport:
        """A plan in words."""
        return cls(
            method=plan.title,
            budget=str(plan.budget),
            macs=plan.macs,
            parameters=plan.parameters,
            price=plan.price,
            calibrated=plan.calibrated,
            gap=plan.gap,
            layers=layer_reports(plan),
            left_alone=plan.left_alone,
            notes=plan.notes,
        )


def print_plan(plan: PlanReport, console: Console | None = None) -> None:
    """Print what a plan would do; plain text where the console is not a terminal."""
    parts = [_whole(plan), layer_table(plan.layers, plan.gap)]
    if plan.left_alone:
        parts.append(left_alone_table(plan.left_alone))
    notes = (Text(f"Note: {note}") for note in plan.notes)
    (console or Console()).print(Group(*parts, *notes))


def _whole(plan: PlanReport) -> Table:
    table = Table(title=f"Planned: {plan.method}, {plan.budget}")
    table.add_column("")
    for column in ("before", "after", "left"):
        table.add_column(column, justify="right")
    for what, (before, after) in (("MACs", plan.macs), ("parameters", plan.parameters)):
        table.add_row(
            what, count_of(float(before)), count_of(float(after)), percent(after / before)
        )
    table.add_section()
    table.add_row("expected rise of the loss", "", number(plan.price), "")
    if plan.calibrated is not None:
        table.add_row("the same, calibrated", "", number(plan.calibrated), "")
    return table
