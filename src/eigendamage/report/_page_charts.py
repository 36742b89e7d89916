"""The page's two plots: size and quality, predicted and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eigendamage.report._page_axes import Axis, linear, logarithmic, spread
from eigendamage.report._page_html import Html, join
from eigendamage.report._page_svg import dot, line, path, svg, text
from eigendamage.report._page_words import short, tick
from eigendamage.report._truth import TRUST, Truth

_WIDTH, _HEIGHT = 440.0, 330.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 418.0, 36.0, 284.0
_LEAST = 0.05  # of an accuracy that an axis spans: less would show chance as if it were more
_LABEL = 15.0
_LETTER = 6.5  # about the width of one
_ORDER = ("other", "stage", "end")  # what is drawn later lies on top
_TOO_SMALL = 1e-4  # of the greatest: what is less would only stretch the axes


@dataclass(frozen=True)
class Mark:
    """A model in the picture of size and quality.

    Attributes:
        label: its name; empty for one that is only part of a line.
        left: MACs left, as a fraction.
        value: accuracy, or whatever is drawn upwards.
        style: class of the mark: ``stage``, ``end`` or ``other``.
        error: standard error of the value; 0 for none.
        of: the method that made it, where it is not the report's; told, and drawn where it is the
            label too.
    """

    label: str
    left: float
    value: float
    style: str
    error: float = 0.0
    of: str = ""

    @property
    def told(self) -> str:
        """What it is called where there is room for a name."""
        return self.label or self.of or "another budget"


def _frame(x: Axis, y: Axis, names: tuple[str, str], shown: tuple[Sequence[str], ...]) -> Html:
    """Ticks with their words, and what the axes are of."""
    return join(
        *(line(_LEFT, y.place(v), _RIGHT, y.place(v), "grid") for v in y.ticks),
        *(
            text(_LEFT - 8, y.place(v) + 4, words, "end")
            for v, words in zip(y.ticks, shown[1], strict=True)
        ),
        *(line(x.place(v), _BOTTOM, x.place(v), _BOTTOM + 5, "axis") for v in x.ticks),
        *(
            text(x.place(v), _BOTTOM + 20, words, "middle")
            for v, words in zip(x.ticks, shown[0], strict=True)
        ),
        line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis"),
        text((_LEFT + _RIGHT) / 2, _BOTTOM + 42, names[0], "middle", "name"),
        text(0.0, 13.0, names[1], "start", "name"),
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
        [f"{100 * v:.0f} %" if as_share else tick(v) for v in y.ticks],
    )
    drawn = [_frame(x, y, ("MACs left", what), shown)]
    if budget is not None:
        at = x.place(min(budget, widest))
        drawn.append(line(at, _TOP, at, _BOTTOM, "budget"))
        words = f"budget {100 * budget:.4g} %"
        drawn.append(
            text(min(max(at, 40.0), _RIGHT - 20), _TOP - 7, words, "middle", "budget-name")
        )
    if limit is not None:
        drawn.append(line(_LEFT, y.place(limit), _RIGHT, y.place(limit), "budget"))
        words = f"budget {short(limit)}"
        drawn.append(text(_LEFT + 6, y.place(limit) - 6, words, "start", "budget-name"))
    drawn += [path([(x.place(a), y.place(b)) for a, b in line], "trail") for line in lines]
    drawn += _labelled(marks, x, y, as_share)
    told = "; ".join(
        f"{m.told}: {_value(m.value, as_share)} with {100 * m.left:.1f} % of the MACs"
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
        at, level = x.place(mark.left), y.place(mark.value)
        words = f"{mark.label} {_value(mark.value, as_share)}"
        # A line begins at the mark that names it, and goes to the right.
        fits = mark.style == "other" and at - 14.0 - _LETTER * len(words) > _LEFT
        anchor, nudge = ("start", 14.0) if mark.left <= 0.55 and not fits else ("end", -14.0)
        drawn.append(line(at, level, at + 0.8 * nudge, height, "leader"))
        drawn.append(text(at + nudge, height + 4, words, anchor, f"label.{mark.style}"))
    drawn += [
        line(
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
        dot(
            x.place(m.left),
            y.place(m.value),
            f"mark.{m.style}",
            {"other": 3.5, "end": 6.5}.get(m.style, 5.0),
            f"{m.told}: {_value(m.value, as_share)} at {100 * m.left:.1f} % of the MACs",
        )
        for m in sorted(marks, key=lambda mark: _ORDER.index(mark.style))
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
    high = max(values) * 2
    low = max(min(values) / 2, high * _TOO_SMALL)
    drawn = [pair for pair in pairs if min(pair[1:3]) >= low]
    x = logarithmic(low, high, _LEFT, _RIGHT)
    y = logarithmic(low, high, _BOTTOM, _TOP)
    shown = [tick(v) for v in x.ticks]
    frame = _frame(x, y, ("predicted", "measured"), (shown, shown))
    corners = [(low, low * TRUST), (high / TRUST, high), (high, high), (high, high / TRUST)]
    corners += [(low * TRUST, low), (low, low)]
    band = path([(x.place(a), y.place(b)) for a, b in corners], "band")
    equal = line(x.place(low), y.place(low), x.place(high), y.place(high), "equal")
    dots = [
        dot(
            x.place(predicted),
            y.place(measured),
            f"pair.{style}",
            7.0 if style == "whole" else 4.0,
            f"{name}, {style}: predicted {short(predicted)}, measured {short(measured)}",
        )
        for name, predicted, measured, style in drawn
    ]
    if len(drawn) < len(pairs):
        words = f"{len(pairs) - len(drawn)} further down not drawn"
        dots.append(text(_RIGHT, _BOTTOM - 8, words, "end"))
    told = (
        f"{len(truth.layers)} layers alone and all together: predicted {short(truth.predicted)}, "
        f"measured {short(truth.measured)}. Each layer's numbers are in the table of layers."
    )
    title = "measured against predicted divergence"
    return svg("agreement", title, told, (_WIDTH, _HEIGHT), frame, band, equal, *dots)
