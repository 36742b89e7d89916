"""The report for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from eigendamage.report._measured import Measured
from eigendamage.report._report import LayerReport, Report
from eigendamage.report._truth import TRUST, Truth


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
    """Headline, truth, layers, calibration, and what was left alone, as rich renderables."""
    parts: list[RenderableType] = [_headline(report), _measured(report)]
    if report.rounds:
        parts.append(_rounds(report))
    if report.truth is not None:
        parts.append(_together(report.truth))
    parts.append(layer_table(report.layers, report.gap))
    if report.truth is not None and report.truth.layers:
        parts.append(_alone(report.truth))
    if report.calibration:
        parts.append(_calibration(report))
    if report.left_alone:
        parts.append(left_alone_table(report.left_alone))
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
    if report.latency is not None:
        table.add_row("latency, measured", "", "", percent(report.latency))
    return table


def _measured(report: Report) -> Table:
    where = (
        "held-out data" if report.measured_on == "eval_data" else "the data of the curvature itself"
    )
    table = Table(title=f"Measured on {report.measured_examples} examples of {where}")
    table.add_column("")
    by_token = report.original.perplexity is not None
    columns = ("accuracy", "loss", "rise of loss", "divergence", *(["perplexity"] * by_token))
    for column in columns:
        table.add_column(column, justify="right")
    for what, m in report.versions:
        spent = f", {report.seconds.get('polish', 0.0):.0f} s" if m is report.polished else ""
        table.add_row(
            what + spent,
            percent(m.accuracy),
            number(m.loss),
            "" if m is report.original else number(report.rise(m)),
            "" if m is report.original else number(m.divergence),
            *([number(m.perplexity)] * by_token),
        )
    table.add_section()
    table.add_row("sum of prices", "", "", number(report.predicted), number(report.predicted))
    return table


def _rounds(report: Report) -> Table:
    """What each round left, and what its training gave back."""
    table = Table(title="Rounds, all relative to the original")
    for column in ("round", "MACs", "left", "params", "left", "divergence", "trained"):
        table.add_column(column, justify="right")
    for column in ("accuracy", "trained"):
        table.add_column(column, justify="right")
    for index, one in enumerate(report.rounds, start=1):
        after = one.finetuned or Measured()
        table.add_row(
            str(index),
            count_of(one.macs),
            percent(one.macs / report.macs[0]),
            count_of(float(one.parameters)),
            percent(one.parameters / report.parameters[0]),
            number(one.untrained.divergence),
            number(after.divergence),
            percent(one.untrained.accuracy),
            percent(after.accuracy),
        )
    return table


def _together(truth: Truth) -> Table:
    """What was predicted of all changes together, above what was measured."""
    table = Table(
        title="Predicted and measured, all layers together",
        caption=f"Divergence from the original on {truth.examples} held-out inputs. What is "
        f"measured may be {TRUST:g} times the prediction for that to be trusted.",
    )
    table.add_column("")
    table.add_column("divergence", justify="right")
    table.add_column("measured / it", justify="right")
    for what, predicted, measured in truth.predictions:
        table.add_row(what, number(predicted), _times(measured, predicted))
    table.add_section()
    table.add_row("measured before repair", number(truth.before_repair), "")
    if truth.after_repair is not None:
        table.add_row("measured after repair", number(truth.after_repair), "")
    table.add_section()
    table.add_row(
        "prediction trusted",
        "yes" if truth.trusted else "no",
        _times(truth.measured, truth.predicted),
    )
    return table


def _alone(truth: Truth) -> Table:
    """What was predicted of every change by itself, beside what was measured."""
    table = Table(title="Predicted and measured, each layer alone")
    table.add_column("layer", overflow="fold")
    for column in ("price", "calibrated", "measured", "measured / calibrated"):
        table.add_column(column, justify="right")
    for name, layer in truth.layers.items():
        table.add_row(
            name or "(the model)",
            number(layer.price),
            number(layer.calibrated),
            number(layer.measured),
            _times(layer.measured, layer.calibrated),
        )
    return table


def _times(measured: float | None, predicted: float | None) -> str:
    """How many times the prediction was measured; a dash where either is not known."""
    return "–" if measured is None or not predicted else f"{measured / predicted:.2f}×"


def layer_table(layers: Mapping[str, LayerReport], gap: float | None) -> Table:
    """What is done to each layer; ``gap`` is that of the plan."""
    table = Table(title="Layers", caption=_gap(gap))
    table.add_column("layer", overflow="fold")
    table.add_column("what is done", overflow="fold", ratio=1)
    for column in ("ranks", "price", "MACs", "left", "params", "left"):
        table.add_column(column, justify="right")
    for name, layer in layers.items():
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


def _gap(gap: float | None) -> str | None:
    """How far the plan may be from the best one, in words."""
    if gap is None:
        return None
    if gap == 0:
        return "No other plan of the same menus has a lower price."
    return f"No other plan of the same menus has a price lower by more than {number(gap)}."


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


def left_alone_table(left_alone: Mapping[str, str]) -> Table:
    """Modules that are left alone, by the reason; those that share one in one row."""
    table = Table(title="Left alone")
    table.add_column("modules", justify="right")
    table.add_column("for example")
    table.add_column("reason")
    counts = Counter(left_alone.values())
    for reason, times in counts.items():
        example = next(n for n, r in left_alone.items() if r == reason)
        table.add_row(str(times), example, reason)
    return table
