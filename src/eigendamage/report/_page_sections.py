"""The parts of the page below the top that tell of the run as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from eigendamage.report._comparison import Comparison
from eigendamage.report._measured import Measured
from eigendamage.report._page_charts import Mark, agreement, tradeoff
from eigendamage.report._page_html import Html, join, meter, section, table, tag
from eigendamage.report._page_words import (
    seconds,
    share,
    short,
    standard_error,
    times,
    where_measured,
)
from eigendamage.report._report import Report
from eigendamage.report._sweep import Sweep
from eigendamage.report._truth import TRUST


def against_macs(report: Report, sweep: Sweep | None, comparison: Comparison | None) -> Html:
    """The picture of size and quality, and the table of what is in it."""
    labeled = report.original.accuracy is not None and report.final.accuracy is not None
    what = "accuracy" if labeled else "divergence"
    left = report.macs[1] / report.macs[0] if report.macs[0] else 1.0

    def value(measured: Measured | None) -> float | None:
        return None if measured is None else getattr(measured, what)

    marks: list[Mark] = []
    for words, measured in report.versions:
        if (found := value(measured)) is not None:
            style = "end" if measured is report.final else "stage"
            where = 1.0 if measured is report.original else left
            error = standard_error(measured, report.measured_examples) if labeled else 0.0
            marks.append(Mark(words, where, found, style, error))
    if not labeled:
        marks.insert(0, Mark("original", 1.0, 0.0, "stage"))
    rounds = [
        (one.macs / report.macs[0], found)
        for one in report.rounds[:-1]
        if (found := value(one.finetuned or one.untrained)) is not None
    ]
    lines = [[(marks[0].left, marks[0].value), *rounds, (marks[-1].left, marks[-1].value)]]
    marks += [Mark(f"round {k}", *point, "stage") for k, point in enumerate(rounds, start=1)]
    lines = lines if rounds else []
    beside = _others(sweep, comparison, what)
    marks += [mark for line in beside for mark in line]
    lines += [[(m.left, m.value) for m in line] for line in beside]
    if len(marks) < 2:
        return join()
    drawn = tradeoff(
        marks,
        lines,
        report.asked.get("macs"),
        report.asked.get("loss") if what == "divergence" else None,
        what,
    )
    reading = (
        f"Left is smaller, {'up' if labeled else 'down'} is better. The large mark is the model "
        f"that is handed back, small ones are the steps to it. {_budget(report, what)}"
    )
    if labeled:
        reading += " Bars are one standard error up and down."
    if beside:
        reading += (
            " Small marks on lines are other budgets or methods, each named at its smallest model."
        )
    if comparison is not None:
        epochs, where = comparison.settings.epochs, comparison.settings.measured_on
        trained = f"after {epochs} epochs of training" if epochs else "without training"
        reading += f" Methods of the comparison are {trained}, measured on {where}."
    return section(
        "against-macs",
        f"{what.capitalize()} against MACs",
        reading,
        tag("figure", drawn),
        _versions(report),
    )


def _budget(report: Report, what: str) -> str:
    if "macs" in report.asked or ("loss" in report.asked and what == "divergence"):
        return "The dashed line is the budget."
    return f"The budget, {report.budget}, is no line in this picture."


def _others(sweep: Sweep | None, comparison: Comparison | None, what: str) -> list[list[Mark]]:
    """The models of a sweep and a comparison: a line each method, by size."""
    lines: dict[str, list[Mark]] = {}
    for row in () if sweep is None else sweep.rows:
        found = None if row.measured is None else getattr(row.measured, what)
        if row.macs is not None and found is not None:
            lines.setdefault("", []).append(Mark("", row.macs, found, "other"))
    for row in () if comparison is None else comparison.rows:
        found = None if row.final is None or row.masks else getattr(row.final, what)
        if row.macs is not None and found is not None:
            mark = Mark("", row.macs, found, "other", of=row.method)
            lines.setdefault(row.method, []).append(mark)
    ordered = [sorted(line, key=lambda mark: mark.left) for line in lines.values()]
    # The smallest model of a method carries its name: there the lines lie apart.
    return [[replace(line[0], label=line[0].of), *line[1:]] for line in ordered]


def _versions(report: Report) -> Html:
    """Everything that was measured, a version a row; what none of them has is left out."""
    found = report.versions
    later = [None, *(m for _, m in found[1:])]
    columns = {
        "accuracy": [share(m.accuracy) for _, m in found],
        "loss": [short(m.loss) for _, m in found],
        "rise of loss": [short(m and report.rise(m)) for m in later],
        "divergence": [short(m.divergence) for _, m in found],
        "perplexity": [short(m.perplexity) for _, m in found],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
    rows: list[tuple[str | Html, ...]] = [
        (words, *(cells[index] for cells in columns.values()))
        for index, (words, _) in enumerate(found)
    ]
    return table(f"Measured on {where_measured(report)}", ("version", *columns), rows)


def truth(report: Report) -> Html:
    """Predictions beside what was measured, together and each layer alone."""
    found = report.truth
    if found is None:
        predicted, surgery = report.predicted, report.compressed.divergence
        if predicted is None:
            return join()
        rows: list[tuple[str | Html, ...]] = [
            ("predicted right after surgery, the sum of the prices", short(predicted)),
            ("divergence measured right after surgery", short(surgery)),
            (
                "rise of the loss measured right after surgery",
                short(report.rise(report.compressed)),
            ),
        ]
        return section(
            "truth",
            "Predicted against measured",
            "The price is the expected rise of the loss; the divergence is what it stands for.",
            table("All layers together", ("", "value"), rows),
        )
    rows = [
        (what, short(predicted), short(measured), times(measured, predicted))
        for what, predicted, measured in found.predictions
    ]
    picture = agreement(found)
    caption = f"All layers together, divergence on {found.examples:,} inputs that were held out"
    return section(
        "truth",
        "Predicted against measured",
        f"On the line a prediction is right; above it more was lost than predicted. In the band "
        f"the two differ by at most {TRUST:g} times. Predictions are trusted while no more is lost "
        f"than the band allows: here they are{'' if found.trusted else ' not'}. Small marks are "
        f"layers changed alone, the large one is the whole.",
        *([] if picture is None else [tag("figure", picture, _key())]),
        table(caption, ("", "predicted", "measured", "ratio"), rows),
    )


def _key() -> Html:
    return tag(
        "figcaption.key",
        *(
            tag("span", tag(f"i.{style}"), words)
            for style, words in (
                ("priced", "price of a layer"),
                ("calibrated", "calibrated (on these measurements, so close to the line)"),
                ("whole", "all layers together"),
            )
        ),
    )


def rounds(report: Report) -> Html:
    """What each round left, and what its training gave back."""
    if not report.rounds:
        return join()
    rows: list[tuple[str | Html, ...]] = []
    for index, one in enumerate(report.rounds, start=1):
        after = one.finetuned or Measured()
        rows.append(
            (
                str(index),
                share(one.macs / report.macs[0] if report.macs[0] else None),
                share(one.parameters / report.parameters[0] if report.parameters[0] else None),
                *(short(m.divergence) for m in (one.untrained, after)),
                *(share(m.accuracy) for m in (one.untrained, after)),
            )
        )
    head = ("round", "MACs left", "parameters left", "divergence", "trained", "accuracy", "trained")
    return section(
        "rounds",
        "Rounds",
        "Each round starts from the model that the one before it left; everything is relative to "
        "the original.",
        table("Each round, before and after its training", head, rows),
    )


def provenance(report: Report) -> Html:
    """What made the result: enough to make it again."""
    here = report.environment
    facts: Mapping[str, str] = {
        "made": report.made or "not recorded",
        "method": report.method,
        "budget": report.budget,
        "seed": str(here.seed),
        "curvature of": f"{report.examples:,} examples",
        "eigendamage": here.eigendamage,
        "torch": here.torch,
        "Python": here.python,
        "machine": f"{here.platform}, {here.device}, {here.threads} threads",
        "time": f"{seconds(sum(report.seconds.values()))} in all",
    }
    longest = max(report.seconds.values(), default=0.0) or 1.0
    stages = [
        tag(
            "li",
            tag("span", stage),
            meter(spent / longest),
            tag("span.figure", seconds(spent)),
        )
        for stage, spent in report.seconds.items()
    ]
    pairs = [join(tag("dt", what), tag("dd", value)) for what, value in facts.items()]
    return section(
        "provenance",
        "How it was made",
        "The same command with the same data, versions and seed gives the same result; bars are "
        "the wall time of each stage.",
        tag("pre", tag("code", report.command or "The command was not recorded.")),
        tag("div.pair", tag("dl", *pairs), tag("ol.stages", *stages)),
    )
