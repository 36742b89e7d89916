"""Numbers and sentences of the page."""

from __future__ import annotations

from eigendamage.report._measured import Measured
from eigendamage.report._report import LayerReport, Report
from eigendamage.report._truth import TRUST

_THIN = "\N{NO-BREAK SPACE}"
_SAME = 0.0005  # a change of size that a tenth of a percent does not show


def share(value: float | None) -> str:
    """A fraction as a percentage with one decimal, a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}{_THIN}%"


def short(value: float | None) -> str:
    """Three significant digits without a power of ten where they are few, a dash for None."""
    if value is None:
        return "–"
    return f"{value:.3g}" if value == 0 or 1e-4 <= abs(value) < 1e5 else f"{value:.2e}"


def tick(value: float) -> str:
    """A round number in as few signs as there can be."""
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def size(value: float) -> str:
    """A large count with a unit prefix, three digits."""
    for unit, least in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= least:
            return f"{value / least:#.3g}".removesuffix(".") + _THIN + unit
    return f"{value:.0f}"


def times(measured: float, predicted: float) -> str:
    """How many times the prediction was measured; a dash for a prediction of nothing."""
    return f"{measured / predicted:.2f}×" if predicted > 0 else "–"


def kind_of(layer: LayerReport) -> tuple[str, str]:
    """What is done to a layer, in a word or two, and the rest of the words."""
    kind, _, rest = layer.action.partition(":")
    return kind.strip(), rest.strip()


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    if value < 120:
        return f"{value:.1f}{_THIN}s"
    return f"{value / 60:.0f}{_THIN}min" if value < 7200 else f"{value / 3600:.1f}{_THIN}h"


def headline(report: Report) -> str:
    """What became of the model, in one sentence: what is left, then what was measured."""
    before, after = report.original, report.final
    left = report.macs[1] / report.macs[0] if report.macs[0] else 1.0
    fewer = report.parameters[1] / report.parameters[0] if report.parameters[0] else 1.0
    if abs(left - 1) >= _SAME:
        size_left = f"With {share(left)} of its MACs"
    elif abs(fewer - 1) >= _SAME:
        size_left = f"With {share(fewer)} of its parameters"
    else:
        size_left = "With its size as it was"
    return f"{size_left}, {report.model} {_outcome(before, after)}."


def _outcome(before: Measured, after: Measured) -> str:
    if before.accuracy is not None and after.accuracy is not None:
        if before.accuracy == after.accuracy:
            return f"keeps its {share(after.accuracy)} accuracy"
        return f"goes from {share(before.accuracy)} to {share(after.accuracy)} accuracy"
    if before.loss is not None and after.loss is not None:
        return f"goes from a loss of {short(before.loss)} to {short(after.loss)}"
    if after.divergence is not None:
        return f"diverges by {short(after.divergence)} from what it predicted before"
    return "was not measured: it has neither labels nor predictions to go by"


def standard_error(measured: Measured, examples: int) -> float:
    """How far chance moves an accuracy that was measured on so many examples.

    As it was measured, from example to example; where that is not known, as if each example had one
    prediction.
    """
    accuracy = measured.accuracy or 0.0
    if measured.accuracy_error is not None:
        return measured.accuracy_error
    return (accuracy * (1 - accuracy) / examples) ** 0.5


def chance(report: Report) -> str:
    """How far chance moves the accuracy of the result, in a sentence; empty without one."""
    final, examples = report.final, report.measured_examples
    if final.accuracy is None:
        return ""
    return (
        f" With {examples:,} examples an accuracy near {share(final.accuracy)} has a standard "
        f"error of {100 * standard_error(final, examples):.1f} points."
    )


def where_measured(report: Report) -> str:
    """What the versions were measured on."""
    if report.measured_on == "eval_data":
        return f"{report.measured_examples:,} examples of held-out data"
    return f"{report.measured_examples:,} examples of the data that the curvature is of"


def caveats(report: Report) -> tuple[str, ...]:
    """What a reader has to know before the numbers: the report's notes, and what it lacks."""
    found = list(report.notes)
    if report.rounds and report.truth is not None:
        found.append(
            "what was predicted, the layers' prices and their spectra are of the last round, "
            "against the model that it began with"
        )
    if report.measured_on == "data":
        found.append(
            "all versions were measured on the data that the result was made from: they look "
            "better here than elsewhere. Give eval_data to measure on other inputs"
        )
    if report.final.accuracy is None:
        found.append(
            "there were no labels to measure with: the divergence from the original takes the "
            "place of an accuracy"
        )
    if report.truth is None and report.final.divergence is not None:
        found.append(
            "predictions were not held against inputs that had no part in them; prices alone are "
            f"often too low by more than {TRUST:g} times"
        )
    return tuple(found)
