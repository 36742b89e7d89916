"""Pieces of inline SVG, coloured by the page's style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eigendamage.report._page_html import Html, tag


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


def text(x: float, y: float, words: str, anchor: str, style: str = "tick") -> Html:
    """Words whose ``anchor`` (start, middle, end) is at a place."""
    at = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    return tag(f"text.{style}", words, attributes=at)


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Html:
    """A straight line."""
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return tag(f"line.{style}", attributes={k: f"{v:.1f}" for k, v in ends.items()})


def dot(x: float, y: float, style: str, radius: float, told: str) -> Html:
    """A round mark that says what it is when it is pointed at."""
    at = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{radius:g}"}
    return tag(f"circle.{style}", tag("title", told), attributes=at)


def path(points: Sequence[tuple[float, float]], style: str) -> Html:
    """A line through points."""
    words = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return tag(f"path.{style}", attributes={"d": f"M{words}"})
