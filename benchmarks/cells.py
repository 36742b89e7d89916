"""What the tables of all pages share: how a table is written, and numbers in it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A Markdown table whose first ``words`` columns are text and the others numbers."""
    rule = [":--" if k < words else "--:" for k in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def rise(measured: Mapping[str, float] | None, original: Mapping[str, float]) -> float | None:
    """By how much the mean loss rose."""
    return None if measured is None else measured["loss"] - original["loss"]


def mean_of(values: Sequence[float]) -> str:
    """The mean, and the range where there are several."""
    mean = f"{100 * statistics.mean(values):.2f} %"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.2f} to {100 * max(values):.2f} %)"


def words_of(item: object) -> str:
    """A record of a machine or of versions as one phrase."""
    if isinstance(item, Mapping):
        return ", ".join(f"{str(k).replace('_', ' ')} {v}" for k, v in item.items())
    if isinstance(item, list | tuple):
        return ", ".join(map(str, item))
    return str(item)
