"""The page's pictures as inline SVG, coloured by the page's style."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log10
from statistics import median

from eigendamage.report._page_axes import Axis, linear, logarithmic, spread
from eigendamage.report._page_html import Html, join, tag
from eigendamage.report._page_words import short
from eigendamage.report._spectra import Spectra, Spectrum
from eigendamage.report._truth import TRUST, Truth

_WIDTH, _HEIGHT = 440.0, 330.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 418.0, 36.0, 284.0
_LEAST = 0.05  # of an accuracy that an axis spans: less would show chance as if it were more
_LABEL = 15.0


@dataclass(frozen=True)
class Mark:
    """A model in the picture of size and quality.

    Attributes:
        label: its name; empty for one that is only part of a line.
        left: MACs left, as a fraction.
        value: accuracy, or whatever is drawn upwards.
        style: class of the mark: ``stage``, ``end`` or ``other``.
        error: standard error of the value; 0 for none.
    """

    label: str
    left: float
    value: float
    style: str
    error: float = 0.0


def svg(
    identity: str,
    title: str,
    told: str,
    box: tuple[float, float],
    *children: Html,
    attributes: Mapping[str, str] | None = None,
) -> Html:
    """A picture with a title and, for those who do not see it, what it tells.

    Its class is the identity without the number at its end.
    """
    names = f"{identity}-title", f"{identity}-told"
    return tag(
        f"svg.{identity.rstrip('-0123456789')}",
        tag("title", title, attributes={"id": names[0]}),
        tag("desc", told, attributes={"id": names[1]}),
        *children,
        attributes={
            "viewBox": f"0 0 {box[0]:g} {box[1]:g}",
            "role": "img",
            "aria-labelledby": " ".join(names),
            **(attributes or {}),
        },
    )


def _text(x: float, y: float, words: str, anchor: str, style: str = "tick") -> Html:
    at = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    return tag(f"text.{style}", words, attributes=at)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Html:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return tag(f"line.{style}", attributes={k: f"{v:.1f}" for k, v in ends.items()})


def _dot(x: float, y: float, style: str, radius: float, told: str) -> Html:
    at = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{radius:g}"}
    return tag(f"circle.{style}", tag("title", told), attributes=at)


def _path(points: Sequence[tuple[float, float]], style: str) -> Html:
    words = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return tag(f"path.{style}", attributes={"d": f"M{words}"})


def _frame(x: Axis, y: Axis, names: tuple[str, str], shown: tuple[Sequence[str], ...]) -> Html:
    """Ticks with their words, and what the axes are of."""
    return join(
        *(_line(_LEFT, y.place(v), _RIGHT, y.place(v), "grid") for v in y.ticks),
        *(
            _text(_LEFT - 8, y.place(v) + 4, words, "end")
            for v, words in zip(y.ticks, shown[1], strict=True)
        ),
        *(_line(x.place(v), _BOTTOM, x.place(v), _BOTTOM + 5, "axis") for v in x.ticks),
        *(
            _text(x.place(v), _BOTTOM + 20, words, "middle")
            for v, words in zip(x.ticks, shown[0], strict=True)
        ),
        _line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis"),
        _text((_LEFT + _RIGHT) / 2, _BOTTOM + 42, names[0], "middle", "name"),
        _text(0, 13, names[1], "start", "name"),
    )


def tradeoff(
    marks: Sequence[Mark],
    lines: Sequence[Sequence[tuple[float, float]]],
    budget: float | None,
    limit: float | None,
    what: str,
) -> Html:
    """Quality against the MACs left.

    Args:
        marks: models; those with a label get it beside them.
        lines: of points (MACs left, value) that belong together.
        budget: the fraction of MACs that was asked for, as an upright line; None for none.
        limit: the value that was asked for, as a level line; None for none.
        what: is drawn upwards: ``accuracy`` or ``divergence``.
    """
    values = [m.value + side * m.error for m in marks for side in (-1, 1)]
    values += [v for line in lines for _, v in line] + ([] if limit is None else [limit])
    low, high = _range(min(values), max(values), what)
    widest = max(1.0, *(m.left for m in marks))
    x = linear(0.0, widest, _LEFT, _RIGHT)
    y = linear(low, high, _BOTTOM, _TOP)
    as_share = what == "accuracy"
    shown = (
        [f"{100 * v:.0f} %" for v in x.ticks],
        [f"{100 * v:.0f} %" if as_share else short(v) for v in y.ticks],
    )
    drawn = [_frame(x, y, ("MACs left", what), shown)]
    if budget is not None:
        at = x.place(min(budget, widest))
        drawn.append(_line(at, _TOP, at, _BOTTOM, "budget"))
        words = f"budget {100 * budget:.4g} %"
        drawn.append(
            _text(min(max(at, 40.0), _RIGHT - 20), _TOP - 7, words, "middle", "budget-name")
        )
    if limit is not None:
        drawn.append(_line(_LEFT, y.place(limit), _RIGHT, y.place(limit), "budget"))
        words = f"budget {short(limit)}"
        drawn.append(_text(_LEFT + 6, y.place(limit) - 6, words, "start", "budget-name"))
    drawn += [_path([(x.place(a), y.place(b)) for a, b in line], "trail") for line in lines]
    drawn += _labelled(marks, x, y, as_share)
    told = "; ".join(
        f"{m.label or 'another budget'}: {_value(m.value, as_share)} with {100 * m.left:.1f} % "
        f"of the MACs"
        for m in marks
    )
    return svg("tradeoff", f"{what} against the MACs left", told, (_WIDTH, _HEIGHT), *drawn)


def _range(low: float, high: float, what: str) -> tuple[float, float]:
    """The ends of the axis: a divergence starts at 0, an accuracy spans no less than `_LEAST`."""
    if what == "divergence":
        return 0.0, 1.08 * high or 0.01
    room = max(0.06 * (high - low), (_LEAST - (high - low)) / 2)
    low, high = low - room, high + room
    if high > 1.0:
        low, high = low - (high - 1.0), 1.0
    return max(0.0, low), high


def _value(value: float, as_share: bool) -> str:
    return f"{100 * value:.1f} %" if as_share else short(value)


def _labelled(marks: Sequence[Mark], x: Axis, y: Axis, as_share: bool) -> list[Html]:
    """Marks, and labels beside them that do not overlap, on the side where there is room."""
    drawn: list[Html] = []
    named = [m for m in marks if m.label]
    heights = spread([y.place(m.value) for m in named], _LABEL, _TOP + 6, _BOTTOM - 8)
    for mark, height in zip(named, heights, strict=True):
        anchor, nudge = ("start", 14.0) if mark.left <= 0.55 else ("end", -14.0)
        at, level = x.place(mark.left), y.place(mark.value)
        drawn.append(_line(at, level, at + 0.8 * nudge, height, "leader"))
        words = f"{mark.label} {_value(mark.value, as_share)}"
        drawn.append(_text(at + nudge, height + 4, words, anchor, f"label.{mark.style}"))
    drawn += [
        _line(
            x.place(m.left),
            y.place(m.value - m.error),
            x.place(m.left),
            y.place(m.value + m.error),
            "error",
        )
        for m in marks
        if m.error
    ]
    drawn += [
        _dot(
            x.place(m.left),
            y.place(m.value),
            f"mark.{m.style}",
            {"other": 3.5, "end": 6.5}.get(m.style, 5),
            f"{m.label}: {_value(m.value, as_share)} at {100 * m.left:.1f} % of the MACs",
        )
        for m in marks
    ]
    return drawn


def agreement(truth: Truth) -> Html | None:
    """What each change was measured to cost alone, and all together, against the prediction.

    None where fewer than two pairs are positive, which a logarithm needs.
    """
    alone: list[tuple[str, float, float, str]] = []
    for name, layer in truth.layers.items():
        if layer.measured is not None:
            alone.append((name, layer.price, layer.measured, "priced"))
            if layer.calibrated is not None:
                alone.append((name, layer.calibrated, layer.measured, "calibrated"))
    whole = ("all together", truth.predicted, truth.measured, "whole")
    pairs = [pair for pair in (*alone, whole) if pair[1] > 0 and pair[2] > 0]
    if len(pairs) < 2:
        return None
    values = [v for _, predicted, measured, _ in pairs for v in (predicted, measured)]
    low, high = min(values) / 2, max(values) * 2
    x = logarithmic(low, high, _LEFT, _RIGHT)
    y = logarithmic(low, high, _BOTTOM, _TOP)
    shown = [f"{v:.0e}".replace("e-0", "e-").replace("e+0", "e+") for v in x.ticks]
    frame = _frame(x, y, ("predicted", "measured"), (shown, shown))
    corners = [(low, low * TRUST), (high / TRUST, high), (high, high), (high, high / TRUST)]
    corners += [(low * TRUST, low), (low, low)]
    band = _path([(x.place(a), y.place(b)) for a, b in corners], "band")
    equal = _line(x.place(low), y.place(low), x.place(high), y.place(high), "equal")
    dots = [
        _dot(
            x.place(predicted),
            y.place(measured),
            f"pair.{style}",
            7 if style == "whole" else 4,
            f"{name}, {style}: predicted {short(predicted)}, measured {short(measured)}",
        )
        for name, predicted, measured, style in pairs
    ]
    told = (
        f"{len(truth.layers)} layers alone and all together: predicted {short(truth.predicted)}, "
        f"measured {short(truth.measured)}. Each layer's numbers are in the table of layers."
    )
    title = "measured against predicted divergence"
    return svg("agreement", title, told, (_WIDTH, _HEIGHT), frame, band, equal, *dots)


_DEEPEST = 6  # powers of ten below the greatest eigenvalue that are drawn at most


def depth_of(spectra: Iterable[Spectra]) -> int:
    """How many powers of ten show at least half of the curves to their end: 2 to `_DEEPEST`."""
    ends = [s.values[-1] for layer in spectra for s in (layer.outputs, layer.inputs)]
    middle = median(ends) if ends else 0.0
    return _DEEPEST if middle <= 0 else min(_DEEPEST, max(2, ceil(-log10(middle))))


def falloff(index: int, name: str, spectra: Spectra, depth: int) -> Html:
    """How the eigenvalues of a layer's two factors fall, on a logarithmic scale.

    Args:
        index: that tells the picture from others on the page.
        name: of the layer.
        spectra: of it.
        depth: powers of ten from the top to the bottom.
    """
    box = 160.0, 64.0
    told = f"90 % of S is in {_ninety(spectra.outputs)} outputs, of A in {_ninety(spectra.inputs)}"
    y = logarithmic(10.0**-depth, 1.0, box[1] - 1, 1.0)
    return svg(
        f"falloff-{index}",
        f"spectra of {name}",
        f"{told} inputs",
        box,
        *(_line(0, y.place(10.0**-k), box[0], y.place(10.0**-k), "grid") for k in range(depth + 1)),
        _path(_curve(spectra.outputs, box[0], y, 10.0**-depth), "outputs"),
        _path(_curve(spectra.inputs, box[0], y, 10.0**-depth), "inputs"),
    )


def _ninety(spectrum: Spectrum) -> str:
    return f"{spectrum.ninety} of {spectrum.size}"


def _curve(spectrum: Spectrum, width: float, y: Axis, least: float) -> list[tuple[float, float]]:
    last = max(1, spectrum.size - 1)
    points = [
        (width * rank / last, y.place(max(least, value)))
        for rank, value in zip(spectrum.ranks, spectrum.values, strict=True)
    ]
    return points if len(points) > 1 else [*points, (width, points[0][1])]


def skyline(
    bars: Sequence[tuple[str, str, float, float]], name: str, title: str, told: str
) -> Html:
    """One bar a layer in network order: all of it pale, the part that is left in its colour.

    Args:
        bars: (words, class of the colour, before, after) of each layer.
        name: class of the picture.
        title: of the picture.
        told: what it tells.
    """
    most = max((max(before, after) for _, _, before, after in bars), default=0.0) or 1.0

    def bar(x: float, value: float, style: str) -> Html:
        height = 100 * value / most
        where = {"x": x + 0.1, "y": 100 - height, "width": 0.8, "height": height}
        return tag(f"rect.{style}", attributes={k: f"{v:.2f}" for k, v in where.items()})

    drawn = [
        tag("g", tag("title", words), bar(i, before, "before"), bar(i, after, style))
        for i, (words, style, before, after) in enumerate(bars)
    ]
    fill = {"preserveAspectRatio": "none"}
    return svg(name, title, told, (float(max(1, len(bars))), 100.0), *drawn, attributes=fill)
