"""The page's pictures that have a part for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, log10
from statistics import median

from eigendamage.report._page_axes import Axis, logarithmic
from eigendamage.report._page_html import Html, tag
from eigendamage.report._page_svg import line, path, svg
from eigendamage.report._spectra import Spectra, Spectrum

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
        *(
            line(0.0, y.place(10.0**-k), box[0], y.place(10.0**-k), "grid")
            for k in range(depth + 1)
        ),
        path(_curve(spectra.outputs, box[0], y, 10.0**-depth), "outputs"),
        path(_curve(spectra.inputs, box[0], y, 10.0**-depth), "inputs"),
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
        tag("g", tag("title", words), bar(float(i), before, "before"), bar(float(i), after, style))
        for i, (words, style, before, after) in enumerate(bars)
    ]
    fill = {"preserveAspectRatio": "none"}
    return svg(name, title, told, (float(max(1, len(bars))), 100.0), *drawn, attributes=fill)
