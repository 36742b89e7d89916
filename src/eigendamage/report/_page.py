"""The report as one HTML file, which needs nothing beside it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from eigendamage.files import written_beside
from eigendamage.report import _page_layers as by_layer
from eigendamage.report import _page_sections as whole
from eigendamage.report._comparison import Comparison
from eigendamage.report._page_html import Html, tag
from eigendamage.report._page_opening import opening
from eigendamage.report._page_words import headline
from eigendamage.report._report import Report
from eigendamage.report._sweep import Sweep

# The page has neither scripts nor anything to fetch; a browser is told to allow none either.
_HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
"""  # noqa: E501


def report_page(
    report: Report, *, sweep: Sweep | None = None, comparison: Comparison | None = None
) -> str:
    """A report as an HTML page without scripts that opens offline, in dark and in light.

    Args:
        report: what to show; one that an older version wrote has no spectra and no budget line.
        sweep: other budgets of the same model, drawn beside it in accuracy against MACs.
        comparison: other methods, likewise.
    """
    style = files("eigendamage.report").joinpath("page.css").read_text(encoding="utf-8")
    body = tag(
        "main",
        opening(report),
        tag("div.pair", whole.against_macs(report, sweep, comparison), whole.truth(report)),
        whole.rounds(report),
        by_layer.layers(report),
        by_layer.spectra(report),
        by_layer.left_alone(report),
        whole.provenance(report),
    )
    title = tag("title", headline(report))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{_HEAD}{title.text}\n'
        f"{tag('style', Html(style)).text}\n</head>\n<body>\n{body.text}\n</body>\n</html>\n"
    )


def write_page(
    report: Report,
    path: str | Path,
    *,
    sweep: Sweep | None = None,
    comparison: Comparison | None = None,
) -> None:
    """Write `report_page` to a file, beside it first and then renamed.

    Raises:
        MissingFileError: if the folder does not exist.
    """
    with written_beside(path) as beside:
        beside.write_text(report_page(report, sweep=sweep, comparison=comparison), encoding="utf-8")
