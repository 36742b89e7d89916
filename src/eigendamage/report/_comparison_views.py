"""A comparison as a table for a terminal, and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eigendamage.errors import NothingToCompressError
from eigendamage.files import written_beside
from eigendamage.report._comparison import Comparison, Row
from eigendamage.report._measured import Measured
from eigendamage.report._terminal import number, percent

_MARKERS = "osD^v<>Phd*X"


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print one table a budget, best first by what was measured at the end."""
    console = console or Console()
    settings, original = comparison.settings, comparison.original
    console.print(
        f"{settings.model}: accuracy {percent(original.accuracy)}, loss {number(original.loss)} on "
        f"{comparison.measured_examples} examples of {settings.measured_on}"
    )
    for budget in sorted({row.budget for row in comparison.rows}, reverse=True):
        console.print(_table(comparison, budget))


def _table(comparison: Comparison, budget: float) -> Table:
    settings = comparison.settings
    table = Table(
        title=f"{100 * budget:g}% of the {'MACs' if settings.unit == 'macs' else 'parameters'}",
        box=None,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", no_wrap=True)
    for column in (
        "MACs",
        "params",
        "rise\npredicted",
        "after cut\ncorrect",
        "\nloss",
        "BN anew\ncorrect",
        "\nloss",
        *(("tuned\ncorrect", "\nloss") if settings.epochs else ()),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in ranked(comparison, budget):
        if row.refused is not None:
            table.add_row(row.method, "refused")
            continue
        shown = [row.surgery, row.recalibrated, *([row.tuned] if settings.epochs else [])]
        table.add_row(
            row.method,
            "–" if row.macs is None else f"{row.macs:.0%}",
            "–" if row.parameters is None else f"{row.parameters:.0%}",
            "–" if row.predicted is None else f"{row.predicted:.1e}",
            *(cell for measured in shown for cell in _cells(measured)),
        )
    return table


def _cells(measured: Measured | None) -> tuple[str, str]:
    if measured is None:
        return "–", "–"
    correct = "–" if measured.accuracy is None else f"{measured.accuracy:.1%}"
    return correct, "–" if measured.loss is None else f"{measured.loss:.2f}"


def ranked(comparison: Comparison, budget: float) -> list[Row]:
    """The rows of a budget, lowest loss at the end first; masks, which save nothing, then refusals.

    Where there are no labels the divergence from the original ranks them.
    """

    def key(row: Row) -> tuple[bool, bool, float]:
        final = row.final
        measured = None if final is None else (final.loss, final.divergence)
        worth = next((m for m in measured or () if m is not None), float("inf"))
        return row.refused is not None, row.masks, worth

    return sorted((row for row in comparison.rows if row.budget == budget), key=key)


def plot_comparison(comparison: Comparison, path: str | Path) -> None:
    """Draw accuracy and loss against MACs, one line a method, right after surgery and at the end.

    Methods that mask weights leave the MACs as they are and are not drawn.

    Args:
        comparison: what to draw.
        path: an image file; its suffix says of what kind (``.png``, ``.svg``, ``.pdf``).

    Raises:
        NothingToCompressError: if no method removed anything.
    """
    # matplotlib takes a second to import, which only those who draw should spend.
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import (  # noqa: PLC0415
        LogLocator,
        NullLocator,
        PercentFormatter,
        StrMethodFormatter,
    )

    settings = comparison.settings
    stages = [("right after surgery", "surgery"), ("with batch norm anew", "recalibrated")]
    if settings.epochs:
        epochs = "1 epoch" if settings.epochs == 1 else f"{settings.epochs} epochs"
        stages.append((f"after {epochs} of training", "tuned"))
    if not any(row.final is not None and not row.masks for row in comparison.rows):
        raise NothingToCompressError(
            "there is nothing to draw: no method of the comparison removed anything"
        )
    stages = [s for s in stages if any(getattr(r, s[1]) for r in comparison.rows)]
    drawn = [r for r in comparison.rows if r.macs is not None and not r.masks]
    methods = list(dict.fromkeys(row.method for row in drawn))
    figure = Figure(figsize=(4.2 * len(stages) + 1.8, 6.4), layout="constrained")
    axes: Any = figure.subplots(2, len(stages), sharex=True, sharey="row", squeeze=False)
    colors = _colors(len(methods))
    for column, (title, stage) in enumerate(stages):
        for index, method in enumerate(methods):
            points = _points(drawn, method, stage)
            for line, what in ((0, "accuracy"), (1, "loss")):
                known = [(x, getattr(m, what)) for x, m in points if getattr(m, what) is not None]
                if known:
                    axes[line, column].plot(
                        [x for x, _ in known],
                        [y for _, y in known],
                        color=colors[index],
                        marker=_MARKERS[index % len(_MARKERS)],
                        markersize=5,
                        linewidth=2.2 if method.startswith("eigendamage") else 1.2,
                        label=method,
                    )
        axes[0, column].set_title(title, fontsize=10)
        axes[1, column].set_xlabel("MACs left")
        axes[1, column].set_yscale("log")
        axes[1, column].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes[0, column].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes[1, column].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes[1, column].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes[1, column].yaxis.set_minor_locator(NullLocator())
        for line, value in ((0, comparison.original.accuracy), (1, comparison.original.loss)):
            if value is not None:
                axes[line, column].axhline(value, color="0.5", linestyle=":", linewidth=1)
            axes[line, column].grid(color="0.92")
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("loss")
    handles, labels = axes[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(
        f"{settings.model}, {comparison.measured_examples} examples of {settings.measured_on}; "
        f"dotted: the original",
        fontsize=10,
    )
    with written_beside(path) as beside:
        figure.savefig(beside, format=Path(path).suffix.removeprefix(".") or "png", dpi=100)


def _points(rows: list[Row], method: str, stage: str) -> list[tuple[float, Measured]]:
    found = [
        (row.macs, measured)
        for row in rows
        if row.method == method
        and row.macs is not None
        and (measured := getattr(row, stage)) is not None
    ]
    return sorted(found, key=lambda point: point[0])


def _colors(count: int) -> list[Any]:
    """That many colours, told apart by lightness too."""
    from matplotlib import colormaps  # noqa: PLC0415

    wheel = colormaps["turbo"]
    return [wheel(0.05 + 0.9 * index / max(1, count - 1)) for index in range(count)]
