"""The top of the page: the headline, what to know first, the numbers that matter most."""

from __future__ import annotations

from eigendamage.report._page_html import Html, meter, tag
from eigendamage.report._page_words import (
    caveats,
    chance,
    headline,
    share,
    short,
    size,
    times,
    where_measured,
)
from eigendamage.report._report import Report


def opening(report: Report) -> Html:
    """The headline, what to know before the numbers, and the numbers."""
    notes = caveats(report)
    known = [tag("ul", *(tag("li", note) for note in notes))] if notes else []
    return tag(
        "header",
        tag("p.kicker", f"eigendamage · {report.method} · budget: {report.budget}"),
        tag("h1", headline(report)),
        tag("p.reading", f"Measured on {where_measured(report)}.{chance(report)}"),
        *(
            tag("aside.notes", tag("h2", "Read this first"), *known, attributes={"role": "note"})
            for _ in notes[:1]
        ),
        tag("div.tiles", *_tiles(report)),
    )


def _tiles(report: Report) -> list[Html]:
    before, after = report.original, report.final
    tiles = [
        _size_tile("MACs", *report.macs),
        _size_tile("parameters", *map(float, report.parameters)),
    ]
    if report.latency is not None:
        tiles.append(_tile("latency left, measured", share(report.latency), "on this device"))
    if before.accuracy is not None and after.accuracy is not None:
        points = 100 * (after.accuracy - before.accuracy)
        change = f"from {share(before.accuracy)}, {points:+.1f} points"
        tiles.append(_tile("accuracy", share(after.accuracy), change))
    if before.perplexity is not None and after.perplexity is not None:
        change = f"from {short(before.perplexity)}"
        tiles.append(_tile("perplexity", short(after.perplexity), change))
    rise = report.measured_rise
    if rise is not None and before.loss is not None:
        tiles.append(_tile("rise of the loss", short(rise), f"from {short(before.loss)}"))
    tiles.append(_divergence_tile(report))
    return tiles


def _tile(what: str, value: str, beside: str, left: float | None = None) -> Html:
    bar = [] if left is None else [meter(left)]
    children = (tag("span.what", what), tag("strong", value), tag("span.beside", beside))
    return tag("div.tile", *children, *bar)


def _size_tile(what: str, before: float, after: float) -> Html:
    left = after / before if before else 1.0
    return _tile(f"{what} left", share(left), f"{size(before)} → {size(after)}", left)


def _divergence_tile(report: Report) -> Html:
    """The prediction, and the measurement that it is of."""
    truth = report.truth
    if truth is not None:
        said = "trusted" if truth.trusted else "not trusted"
        factor = times(truth.measured, truth.predicted)
        return _tile(
            "divergence predicted → measured",
            f"{short(truth.predicted)} → {short(truth.measured)}",
            f"{factor}, {said}; on {truth.examples:,} held-out inputs",
        )
    if report.predicted is None:
        beside = "measured; the method predicts none"
        return _tile("divergence", short(report.final.divergence), beside)
    return _tile(
        "divergence predicted → measured",
        f"{short(report.predicted)} → {short(report.compressed.divergence)}",
        f"right after surgery; {short(report.final.divergence)} in the end",
    )
