"""A few numbers of a weight that tell it from another one, and how far it has moved since."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, FiniteFloat
from torch import Tensor
from torch.nn.functional import pad

from eigendamage.errors import MismatchError
from eigendamage.layers._find import Layer

_SUMS = 32
Sketch = Annotated[tuple[FiniteFloat, ...], Field(min_length=_SUMS + 1, max_length=_SUMS + 1)]
"""A weight's norm, and its sums with so many fixed patterns of signs (AMS; Alon, Matias and Szegedy
1996)."""
_STRANGER = 0.6  # of a weight's norm, from which on another is of another model
_ROW = 1021  # prime, so that no row of a weight begins where a row of signs does


def sketch_of(weight: Float[Tensor, "o i K"]) -> Sketch | None:
    """The sketch of a weight, in the order of (o, i, K); None if its norm overflows."""
    flat = weight.detach().reshape(-1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    rows = pad(flat, (0, -len(flat) % _ROW)).view(-1, _ROW)
    # The sign of a number is that of its row times that of its column.
    within, across = (_signs(what, n).to(rows) for what, n in (("c", _ROW), ("r", len(rows))))
    sums = ((across @ rows) * within).sum(1)
    numbers = torch.cat([torch.linalg.vector_norm(flat)[None], sums])
    return tuple(numbers.tolist()) if bool(torch.isfinite(numbers).all()) else None


@lru_cache(maxsize=64)
def _signs(what: str, count: int) -> Float[Tensor, "s n"]:
    """As good as random, and the same everywhere and always."""
    bits = hashlib.shake_256(what.encode()).digest(-(-_SUMS * count // 8))
    signs = np.unpackbits(np.frombuffer(bits, np.uint8), count=_SUMS * count)
    return torch.from_numpy(2.0 * signs.astype(np.float32) - 1).view(_SUMS, count)


def moved(before: Sequence[float], now: Sequence[float]) -> float:
    """About ‖W₁ - W₀‖ / ‖W₀‖ of two weights, by their sketches; near √2 for strangers.

    The square of a sum with random signs has the square of the norm for its mean, whatever the
    numbers are. Of so many sums the root mean square is about an eighth off.
    """
    difference = math.dist(before[1:], now[1:]) / math.sqrt(_SUMS)
    return difference / before[0] if before[0] > 0 else math.inf if difference > 0 else 0.0


def require_known(layer: Layer, sketch: Sketch | None, where: str) -> float:
    """Refuse a layer with weights of another model; return how far its own have moved.

    Args:
        layer: of the model at hand.
        sketch: of the layer that is meant; None, which is near to all, where there is none.
        where: what the sketch is from.

    Raises:
        MismatchError: if the two are hardly alike.
    """
    return require_near(layer.name, sketch_of(layer.weight()), sketch, where)


def require_near(name: str, now: Sketch | None, sketch: Sketch | None, where: str) -> float:
    """`require_known` of a layer's name and sketch."""
    if sketch is None or now is None:
        return 0.0
    distance = moved(sketch, now)
    # Of a weight that was all zeros, as some begin, nothing can be told.
    if sketch[0] > 0 and not distance <= _STRANGER:
        far = f"about {distance:.0%} of their norm" if math.isfinite(distance) else "far"
        raise MismatchError(
            f"layer '{name}' has the shape that the {where} is for and other weights, {far} away: "
            f"the {where} is of another model, or of this one before it was trained on. Estimate "
            f"the curvature of this model and plan anew"
        )
    return min(distance, 1.0)
