"""The report for a terminal."""

from __future__ import annotations

from collections import Counter

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from eigendamage.report._report import Measured, Report


def percent(value: float | None) -> str:
    """A fraction as a percentage, a dash for None."""
    return "–" if value is None else f"{100 * value:.2f} %"


def number(value: float | None) -> str:
    """Four significant digits, a dash for None."""
    return "–" if value is None else f"{value:.4g}"


def count_of(value: float) -> str:
    """A large count with a unit prefix."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def render(report: Report) -> RenderableType:
    """Headline, layers, calibration, and what was left alone, as rich renderables."""
    parts: list[RenderableType] = [_headline(report), _measured(report), _layers(report)]
    if report.calibration:
        parts.append(_calibration(report))
    if report.left_alone:
        parts.append(_left_alone(report))
    parts.extend(Text(f"Note: {note}") for note in report.notes)
    return Group(*parts)


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report; plain text where the console is not a terminal."""
    (console or Console()).print(render(report))


def _headline(report: Report) -> Table:
    table = Table(title=f"{report.model}: {report.method}, {report.budget}")
    table.add_column("")
    for column in ("before", "after", "left"):
        table.add_column(column, justify="right")
    for what, (before, after) in (
        ("MACs", report.macs),
        ("parameters", (float(report.parameters[0]), float(report.parameters[1]))),
    ):
        table.add_row(what, count_of(before), count_of(after), percent(after / before))
    return table


def _measured(report: Report) -> Table:
    where = (
        "held-out data" if report.measured_on == "eval_data" else "the data of the curvature itself"
    )
    table = Table(title=f"Measured on {report.measured_examples} examples of {where}")
    table.add_column("")
    for column in ("accuracy", "loss", "rise of loss", "divergence"):
        table.add_column(column, justify="right")
    rows: list[tuple[str, Measured | None]] = [
        ("original", report.original),
        ("right after surgery", report.compressed),
        ("batch norm recalibrated", report.recalibrated),
    ]
    for what, m in rows:
        if m is not None:
            table.add_row(
                what,
                percent(m.accuracy),
                number(m.loss),
                "" if m is report.original else number(report.rise(m)),
                "" if m is report.original else number(m.divergence),
            )
    table.add_section()
    table.add_row("predicted", "", "", number(report.predicted), number(report.predicted))
    return table


def _layers(report: Report) -> Table:
    table = Table(title="Layers")
    table.add_column("layer", overflow="fold")
    table.add_column("what is done", overflow="fold", ratio=1)
    for column in ("ranks", "price", "MACs", "left", "params", "left"):
        table.add_column(column, justify="right")
    for name, layer in report.layers.items():
        table.add_row(
            name or "(the model)",
            layer.action,
            "" if layer.ranks is None else f"{layer.ranks[0]}×{layer.ranks[1]}",
            "–" if layer.price is None else f"{layer.price:.1e}" if layer.price else "0",
            count_of(layer.macs[0]),
            f"{layer.macs[1] / layer.macs[0]:.0%}" if layer.macs[0] else "–",
            count_of(float(layer.parameters[0])),
            f"{layer.parameters[1] / layer.parameters[0]:.0%}",
        )
    return table


def _calibration(report: Report) -> Table:
    table = Table(title="Trace of each layer's Fisher block")
    table.add_column("layer")
    for column in ("exact, few examples", "K-FAC", "of exact", "λ", "of exact"):
        table.add_column(column, justify="right")
    for name, row in report.calibration.items():
        kfac, ekfac = (f"{x / row.exact:.2f}×" if row.exact else "–" for x in (row.kfac, row.ekfac))
        table.add_row(
            name or "(the model)",
            number(row.exact),
            number(row.kfac),
            kfac,
            number(row.ekfac),
            ekfac,
        )
    return table


def _left_alone(report: Report) -> Table:
    """Modules that are left alone; those that share a reason in one row."""
    table = Table(title="Left alone")
    table.add_column("modules", justify="right")
    table.add_column("for example")
    table.add_column("reason")
    counts = Counter(report.left_alone.values())
    for reason, times in counts.items():
        example = next(n for n, r in report.left_alone.items() if r == reason)
        table.add_row(str(times), example, reason)
    return table
