"""Axes of the page's charts: where a value lies, and which values are named."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        place: from a value to its coordinate in the picture.
        ticks: values that are named, ascending.
    """

    place: Callable[[float], float]
    ticks: tuple[float, ...]


def linear(low: float, high: float, start: float, stop: float, steps: int = 5) -> Axis:
    """An axis with even steps of 1, 2 or 5 times a power of ten.

    Args:
        low: the value at ``start``.
        high: the value at ``stop``, above ``low``.
        start: the first coordinate.
        stop: the last one.
        steps: about how many ticks.
    """
    rough = (high - low) / steps
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(
        place=lambda value: start + (value - low) / (high - low) * (stop - start),
        ticks=tuple(round(k * step, 12) for k in range(first, last + 1)),
    )


def logarithmic(low: float, high: float, start: float, stop: float) -> Axis:
    """An axis with a tick at each power of ten, or fewer where they are many.

    ``low`` and ``high`` are as for `linear`, both positive.
    """
    bottom, top = math.log10(low), math.log10(high)
    powers = range(math.ceil(bottom - 1e-9), math.floor(top + 1e-9) + 1)
    every = max(1, math.ceil(len(powers) / 5))
    return Axis(
        place=lambda value: start + (math.log10(value) - bottom) / (top - bottom) * (stop - start),
        ticks=tuple(10.0**k for k in powers if k % every == 0),
    )


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Coordinates near those wanted, so far apart that labels there do not overlap.

    They keep their order. What does not fit between ``low`` and ``high`` at that distance is put
    as far apart as it does fit.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    if len(order) > 1:
        apart = min(apart, (high - low) / (len(order) - 1))
    placed = [0.0] * len(wanted)
    lowest = low
    for index in order:
        placed[index] = max(wanted[index], lowest)
        lowest = placed[index] + apart
    highest = high
    for index in reversed(order):
        placed[index] = min(placed[index], highest)
        highest = placed[index] - apart
    return placed
