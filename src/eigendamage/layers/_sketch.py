"""A few numbers of a weight that tell it from another one, and how far it has moved since."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.errors import MismatchError
from eigendamage.layers._find import Layer

Sketch = tuple[float, ...]
"""A weight's norm, and its sums over every sixteenth of its numbers from the first, second, …"""
_SUMS = 16
_STRANGER = 0.6


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


def moved(before: Sequence[float], now: Sequence[float]) -> float:
    """About ‖W₁ - W₀‖ / ‖W₀‖ of two weights, by their sketches; near √2 for strangers.

    A sum over numbers whose signs are as good as random has the square of their norm, in the mean;
    where they all lean to one side, the sums are the larger measure of both.
    """
    difference = math.dist(before[1:], now[1:])
    size = max(before[0], math.hypot(*before[1:]))
    return difference / size if size > 0 else math.inf if now[0] > 0 else 0.0


def require_known(layer: Layer, sketch: Sketch | None, where: str) -> float:
    """Refuse a layer with weights of another model; return how far its own have moved.

    Args:
        layer: of the model at hand.
        sketch: of the layer that is meant; None, which is near to all, where there is none.
        where: what the sketch is from.

    Raises:
        MismatchError: if the two are hardly alike.
    """
    now = sketch_of(layer.weight())
    if sketch is None or now is None:
        return 0.0
    distance = moved(sketch, now)
    if distance > _STRANGER:
        raise MismatchError(
            f"layer '{layer.name}' has the shape that the {where} is for and other weights, about "
            f"{distance:.0%} of their norm away: the {where} is of another model, or of this one "
            f"before it was trained on. Estimate the curvature of this model and plan anew"
        )
    return distance
