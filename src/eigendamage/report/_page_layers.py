"""The parts of the page that go layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

from eigendamage.report._page_bars import depth_of, falloff, skyline
from eigendamage.report._page_html import Html, join, section, tag
from eigendamage.report._page_words import kind_of, share, short, size
from eigendamage.report._report import LayerReport, Report

_STYLES = {"low rank": "a", "factored": "b", "channels": "c", "masked": "d", "kept": "kept"}
_OPEN = 40  # so many spectra are shown at once; of more, the reader asks for them


def _style(layer: LayerReport) -> str:
    return _STYLES.get(kind_of(layer)[0], "d")


def _priced(layer: LayerReport) -> float | None:
    """The best price there is of a layer."""
    return layer.price if layer.calibrated is None else layer.calibrated


def layers(report: Report) -> Html:
    """A bar a layer: what it costs now, and what changing it is expected to cost."""
    if not report.layers:
        return join()
    found = list(report.layers.items())
    sizes = [
        (f"{name}: {layer.action}, {_left(layer)}", _style(layer), *layer.macs)
        for name, layer in found
    ]
    prices = [
        (f"{name}: price {short(_priced(layer))}", _style(layer), 0.0, _priced(layer) or 0.0)
        for name, layer in found
    ]
    changed = sum(_style(layer) != "kept" for _, layer in found)
    told = f"{changed} of {len(found)} layers are changed; the table below has their numbers"
    kinds = list(dict.fromkeys(kind_of(layer)[0] for _, layer in found))
    reading = (
        f"A bar a layer, from the input to the output. {changed} of {len(found)} layers are "
        f"changed. Pale is what a layer cost, full colour what is left; below it is what that is "
        f"expected to cost in loss."
    )
    charts = [tag("h3", "MACs"), skyline(sizes, "skyline", "MACs of each layer", told)]
    if any(value for *_, value in prices):
        charts += [
            tag("h3", "price, calibrated where it was"),
            skyline(prices, "prices", "price of each layer", told),
        ]
    return section(
        "layers",
        "Layers",
        f"{reading} {_gap(report.gap)}".rstrip(),
        tag("p.key", *(tag("span", tag(f"i.{_STYLES.get(k, 'd')}"), k) for k in kinds)),
        tag("figure.bars", *charts),
        _table(report),
    )


def _left(layer: LayerReport) -> str:
    before, after = layer.macs
    return f"{share(after / before if before else None)} of {size(before)} MACs left"


def _gap(gap: float | None) -> str:
    if gap is None:
        return ""
    if gap == 0:
        return "No other plan of the same menus has a lower price."
    return f"No other plan of the same menus has a price lower by more than {short(gap)}."


def _table(report: Report) -> Html:
    """The layers as a table; columns in which nothing is known are left out."""
    found = report.layers
    alone = {} if report.truth is None else report.truth.layers
    most = max((layer.macs[0] for layer in found.values()), default=0.0) or 1.0
    dearest = max((layer.price or 0.0 for layer in found.values()), default=0.0) or 1.0
    columns: list[tuple[str, str, list[Html | None]]] = [
        ("what is done", "words", [_action(layer) for layer in found.values()]),
        ("ranks", "figure", [_ranks(layer) for layer in found.values()]),
        (
            "MACs",
            "main",
            [join(_bar(v.macs, most, _style(v)), _of(*v.macs)) for v in found.values()],
        ),
        ("parameters", "figure", [_of(*map(float, v.parameters)) for v in found.values()]),
        ("price", "main", [_price(layer, dearest) for layer in found.values()]),
        ("calibrated", "figure", [_known(layer.calibrated) for layer in found.values()]),
        (
            "measured alone",
            "figure",
            [_known(alone[name].measured if name in alone else None) for name in found],
        ),
    ]
    columns = [column for column in columns if any(cell is not None for cell in column[2])]
    # Narrow screens lay rows out as cards; without these roles that would end the table.
    rows = [
        tag(
            "tr",
            tag("th", name or "(the model)", attributes={"scope": "row", "role": "rowheader"}),
            *(
                tag(
                    f"td.{kind}",
                    cells[index] or "–",
                    attributes={"role": "cell", "data-name": head},
                )
                for head, kind, cells in columns
            ),
            attributes={"role": "row"},
        )
        for index, name in enumerate(found)
    ]
    top = [
        tag(f"th.{kind}", head, attributes={"scope": "col", "role": "columnheader"})
        for head, kind, _ in (("layer", "words", ()), *columns)
    ]
    caption = "Each layer: what is left of its size, its price, what it was measured to cost alone"
    return tag(
        "div.scroll.tall",
        tag(
            "table.layers",
            tag("caption", caption),
            tag(
                "thead",
                tag("tr", *top, attributes={"role": "row"}),
                attributes={"role": "rowgroup"},
            ),
            tag("tbody", *rows, attributes={"role": "rowgroup"}),
            attributes={"role": "table"},
        ),
        attributes={"role": "region", "tabindex": "0", "aria-label": caption},
    )


def _action(layer: LayerReport) -> Html:
    return join(tag(f"i.{_style(layer)}"), layer.action)


def _ranks(layer: LayerReport) -> Html | None:
    return None if layer.ranks is None else join(f"{layer.ranks[0]} × {layer.ranks[1]}")


def _price(layer: LayerReport, dearest: float) -> Html | None:
    if layer.price is None:
        return None
    bar = _bar((0.0, layer.price), dearest, _style(layer))
    return join(bar, tag("b", short(layer.price)))


def _known(value: float | None) -> Html | None:
    return None if value is None else join(short(value))


def _of(before: float, after: float) -> Html:
    left = share(after / before) if before else "–"
    return join(tag("b", left), tag("small", f" of {size(before)}"))


def _bar(sizes: tuple[float, float], most: float, style: str) -> Html:
    before, after = (f"width:{100 * min(1.0, value / most):.2f}%" for value in sizes)
    return tag(
        "span.bar",
        tag("span.before", attributes={"style": before}),
        tag(f"span.{style}", attributes={"style": after}),
        attributes={"aria-hidden": "true"},
    )


def spectra(report: Report) -> Html:
    """How the curvature of each layer falls off."""
    if not report.spectra:
        return join()
    depth = depth_of(report.spectra.values())
    pictures = [
        tag(
            "figure",
            tag("figcaption", tag("b", name or "(the model)")),
            falloff(index, name, found, depth),
            tag(
                "p",
                tag("span.outputs", f"{found.outputs.ninety} of {found.outputs.size} out"),
                " · ",
                tag("span.inputs", f"{found.inputs.ninety} of {found.inputs.size} in"),
            ),
        )
        for index, (name, found) in enumerate(report.spectra.items())
    ]
    grid = tag("div.spectra", *pictures)
    if len(pictures) > _OPEN:
        grid = tag("details", tag("summary", f"All {len(pictures)} layers"), grid)
    return section(
        "spectra",
        "Spectra",
        f"Eigenvalues of the curvature, the greatest first; a line is a power of ten, {depth} in "
        "all. The sooner a curve falls, the fewer directions matter; below it, how many hold 90 %.",
        tag(
            "p.key",
            tag("span", tag("i.outputs"), "outputs (S)"),
            tag("span", tag("i.inputs"), "inputs (A)"),
        ),
        grid,
    )


def left_alone(report: Report) -> Html:
    """Modules that were not touched, by the reason."""
    kept = {
        name: kind_of(layer)[1] or "kept"
        for name, layer in report.layers.items()
        if kind_of(layer)[0] == "kept"
    }
    groups = [*_grouped(kept), *_grouped(report.left_alone)]
    if not groups:
        return join()
    return section(
        "left-alone",
        "Left alone, and why",
        "Every module with parameters that is as it was; those that share a reason are together.",
        tag("div.reasons", *groups),
    )


def _grouped(reasons: Mapping[str, str]) -> list[Html]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name or "(the model)")
    return [
        tag(
            "details",
            tag("summary", tag("b", str(len(names))), f" {reason}"),
            tag("p", *(join(tag("code", name), " ") for name in names)),
        )
        for reason, names in by_reason.items()
    ]
