"""A sweep over budgets as a table for a terminal, and as a plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eigendamage.errors import NothingToCompressError
from eigendamage.files import written_beside
from eigendamage.report._sweep import Sweep, SweepRow
from eigendamage.report._terminal import number, percent

_WHERE = {
    "eval_data": "held-out data",
    "held_out": "the data, held out from curvature and repair",
    "data": "the data of the curvature itself",
}


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


_COLUMNS: tuple[tuple[str, Callable[[SweepRow], str]], ...] = (
    ("MACs", lambda row: _share(row.macs)),
    ("params", lambda row: _share(row.parameters)),
    ("latency", lambda row: _share(row.latency)),
    ("divergence\npriced", lambda row: _short(row.priced)),
    ("\ncalibrated", lambda row: _short(row.calibrated)),
    ("\nmeasured", lambda row: _short(row.measured and row.measured.divergence)),
    ("\naccuracy", lambda row: _share(row.measured and row.measured.accuracy)),
    ("\nloss", lambda row: _short(row.measured and row.measured.loss)),
)
"""Those that are empty for all rows are left out."""

Rows = list[tuple[float, SweepRow]]
"""What is left and the row."""


def print_sweep(sweep: Sweep, console: Console | None = None) -> None:
    """Print one table, a row a budget, with notes, and why budgets cannot be met."""
    console = console or Console()
    original = sweep.original
    console.print(
        f"{sweep.model}: accuracy {percent(original.accuracy)}, loss {number(original.loss)} on "
        f"{sweep.measured_examples} examples of {_WHERE[sweep.measured_on]}"
    )
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("budget", overflow="fold")
    shown = [(header, cell) for header, cell in _COLUMNS if any(cell(row) for row in sweep.rows)]
    for header, _ in shown:
        table.add_column(header, justify="right", no_wrap=True)
    for row in sweep.rows:
        table.add_row(row.budget, *(cell(row) or "–" for _, cell in shown))
    console.print(table)
    for row in sweep.rows:
        if row.error is not None:
            console.print(f"{row.budget}: {row.error}", highlight=False, markup=False)
        for note in row.notes:
            console.print(f"Note: {row.budget}: {note}", highlight=False, markup=False)
    for note in sweep.notes:
        console.print(f"Note: {note}", highlight=False, markup=False)


def plot_sweep(sweep: Sweep, path: str | Path) -> None:
    """Draw accuracy (where it was measured) and divergence against the MACs left.

    Where all rows have a latency, that takes the place of the MACs; where some have, it is not
    drawn. Predictions are lines, measurements points; the divergence has a logarithmic axis.

    Args:
        sweep: what to draw.
        path: an image file; its suffix says of what kind (``.png``, ``.svg``, ``.pdf``).

    Raises:
        NothingToCompressError: if no budget could be met.
    """
    # matplotlib takes a second to import, which only those who draw should spend.
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415

    met = [row for row in sweep.rows if row.macs is not None]
    timed = all(row.latency is not None for row in met)
    rows = sorted(((_left(row, timed), row) for row in met), key=lambda pair: pair[0])
    if not rows:
        raise NothingToCompressError(
            "there is nothing to draw: no budget of the sweep could be met"
        )
    accuracy = _points(rows, "accuracy")
    panels = 2 if accuracy else 1
    figure = Figure(figsize=(4.6 * panels + 0.4, 4.0), layout="constrained")
    axes: Any = figure.subplots(1, panels, squeeze=False)[0]
    if accuracy:
        axes[0].plot(*zip(*accuracy, strict=True), color="C2", marker="o", label="measured")
        axes[0].yaxis.set_major_formatter(PercentFormatter(1))
        axes[0].set_ylabel("accuracy")
        if sweep.original.accuracy is not None:
            axes[0].axhline(
                sweep.original.accuracy, color="0.5", linestyle=":", linewidth=1, label="original"
            )
    _draw_divergence(axes[-1], rows)
    for axis in axes:
        axis.set_xlabel("latency left" if timed else "MACs left")
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.grid(color="0.92")
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"{sweep.model}, {sweep.measured_examples} examples of {_WHERE[sweep.measured_on]}",
        fontsize=10,
    )
    with written_beside(path) as beside:
        figure.savefig(beside, format=Path(path).suffix.removeprefix(".") or "png", dpi=100)


def _draw_divergence(axis: Any, rows: Rows) -> None:
    """Lines for what was predicted and points for what was measured; zeros have no logarithm."""
    for label, style, points in (
        ("priced", {"color": "C0", "linestyle": "--"}, _points(rows, "priced")),
        ("calibrated", {"color": "C1"}, _points(rows, "calibrated")),
        ("measured", {"color": "C2", "linestyle": "", "marker": "o"}, _points(rows, "divergence")),
    ):
        positive = [(x, y) for x, y in points if y > 0]
        if positive:
            axis.plot(*zip(*positive, strict=True), label=label, **style)
    axis.set_yscale("log")
    axis.set_ylabel("divergence from the original")


def _left(row: SweepRow, timed: bool) -> float:
    return (row.latency if timed else row.macs) or 0.0


def _points(rows: Rows, what: str) -> list[tuple[float, float]]:
    """(Fraction left, value) where there is the value, a field of a row or of its `Measured`."""
    found = (
        (x, getattr(row if what in SweepRow.model_fields else row.measured, what, None))
        for x, row in rows
    )
    return [(x, y) for x, y in found if y is not None]
