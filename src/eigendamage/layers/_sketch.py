"""A few numbers of a weight that tell it from another one, and how far it has moved since."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, FiniteFloat
from torch import Tensor

from eigendamage.errors import MismatchError
from eigendamage.layers._find import Layer

_SUMS = 16
Sketch = Annotated[tuple[FiniteFloat, ...], Field(min_length=_SUMS + 1, max_length=_SUMS + 1)]
"""A weight's norm, and its sums over every sixteenth of its numbers from the first, second, …"""
_STRANGER = 0.6
_LEAST = 0.1
_FEW = 256  # numbers whose mean is one of chance


def sketch_of(weight: Float[Tensor, "o i K"]) -> Sketch | None:
    """The sketch of a weight, in the order of (o, i, K); None if its norm overflows."""
    flat = weight.detach().reshape(-1)
    wide = torch.promote_types(flat.dtype, torch.float32)
    whole = len(flat) // _SUMS * _SUMS
    sums = flat[:whole].view(-1, _SUMS).sum(0, dtype=wide)
    sums[: len(flat) - whole] += flat[whole:].to(wide)
    norm = torch.linalg.vector_norm(flat, dtype=wide)
    numbers = torch.cat([norm[None], sums])
    return tuple(numbers.tolist()) if bool(torch.isfinite(numbers).all()) else None


def moved(before: Sequence[float], now: Sequence[float], count: int) -> tuple[float, float]:
    """How far apart two weights are, by their sketches.

    A sum over numbers whose signs are as good as random has the square of their norm, in the mean.
    What all of them lean to one side is told apart from that first, by their common mean.

    Args:
        before: the sketch of one.
        now: that of the other.
        count: of numbers in either.

    Returns:
        About ‖W₁ - W₀‖ / ‖W₀‖; and the same of what is left of both without their means, near √2
        for weights that have nothing to do with each other.
    """
    one, other = (_without_mean(sketch, count) for sketch in (before, now))
    apart = math.dist(one.sums, other.sums)
    whole = math.hypot(apart, one.mean - other.mean)
    # Weights that are all but alike have nothing left of their own to be told by.
    own = max(one.norm, _LEAST * before[0])
    return _ratio(whole, before[0]), _ratio(apart, own)


class _Centred(NamedTuple):
    """A sketch without the mean: the sums, the norm that is left, and the norm of the mean."""

    sums: tuple[float, ...]
    norm: float
    mean: float


def _without_mean(sketch: Sequence[float], count: int) -> _Centred:
    norm, *sums = sketch
    if count < _FEW:
        return _Centred(tuple(sums), norm, 0.0)
    middle = sum(sums) / len(sums)
    unbiased = math.sqrt(len(sums) / (len(sums) - 1))
    mean = sum(sums) / math.sqrt(count)
    left = math.sqrt(max(0.0, norm * norm - mean * mean))
    return _Centred(tuple(unbiased * (each - middle) for each in sums), left, mean)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.inf if part > 0 else 0.0


def require_known(layer: Layer, sketch: Sketch | None, where: str) -> float:
    """Refuse a layer with weights of another model; return how far its own have moved.

    Args:
        layer: of the model at hand.
        sketch: of the layer that is meant; None, which is near to all, where there is none.
        where: what the sketch is from.

    Raises:
        MismatchError: if the two are hardly alike.
    """
    weight = layer.weight()
    now = sketch_of(weight)
    if sketch is None or now is None:
        return 0.0
    distance, apart = moved(sketch, now, weight.numel())
    # Of a weight that was all zeros, as some begin, nothing can be told.
    if sketch[0] > 0 and not apart <= _STRANGER:
        far = f"about {apart:.0%} of their norm" if math.isfinite(apart) else "far"
        raise MismatchError(
            f"layer '{layer.name}' has the shape that the {where} is for and other weights, {far} "
            f"away: the {where} is of another model, or of this one before it was trained on. "
            f"Estimate the curvature of this model and plan anew"
        )
    return min(distance, 1.0)
