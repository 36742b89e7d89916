"""HTML as values: text is escaped unless it was made here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Html:
    """A piece of a page, escaped already."""

    text: str


def tag(name: str, *children: str | Html, attributes: Mapping[str, str] | None = None) -> Html:
    """An element; strings among its children are text and get escaped, as attributes do.

    Args:
        name: of the element, with its classes after dots: ``p.note``.
        children: what is in it.
        attributes: beside the classes.
    """
    element, *classes = name.split(".")
    given = dict(attributes or {})
    if classes:
        given["class"] = " ".join(classes)
    words = "".join(f' {key}="{escape(value)}"' for key, value in given.items())
    return Html(f"<{element}{words}>{join(*children).text}</{element}>")


def join(*children: str | Html) -> Html:
    """Pieces one after another."""
    return Html("".join(c.text if isinstance(c, Html) else escape(c) for c in children))


def section(identity: str, title: str, reading: str, *children: str | Html) -> Html:
    """A part of the page: its title, how to read it, and what there is to see."""
    return tag(
        "section",
        tag("h2", title, attributes={"id": identity}),
        tag("p.reading", reading),
        *children,
        attributes={"aria-labelledby": identity},
    )


def table(caption: str, head: tuple[str, ...], rows: list[tuple[str | Html, ...]]) -> Html:
    """A table of numbers, the first column in words, in a box that scrolls if it has to."""
    return tag(
        "div.scroll",
        tag(
            "table.numbers",
            tag("caption", caption),
            tag("thead", tag("tr", *(tag("th", h, attributes={"scope": "col"}) for h in head))),
            tag(
                "tbody",
                *(
                    tag(
                        "tr",
                        tag("th", row[0], attributes={"scope": "row"}),
                        *(tag("td", cell) for cell in row[1:]),
                    )
                    for row in rows
                ),
            ),
        ),
        attributes={"role": "region", "tabindex": "0", "aria-label": caption},
    )


def meter(left: float) -> Html:
    """A bar that is filled to a fraction."""
    width = {"style": f"width:{100 * min(1.0, left):.1f}%"}
    return tag("span.meter", tag("span", attributes=width), attributes={"aria-hidden": "true"})
