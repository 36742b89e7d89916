"""Which layers of a model a curvature is of, and which of them are to be left alone."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from eigendamage.curvature import Curvature
from eigendamage.errors import EigenDamageError, MismatchError
from eigendamage.layers import ON_REQUEST, Layer, find_layers


def matching_layers(model: nn.Module, curvature: Curvature) -> dict[str, Layer]:
    """The model's layers that the curvature is of.

    Raises:
        MismatchError: if one is missing or has another shape.
    """
    found = find_layers(model)
    layers: dict[str, Layer] = {}
    for name, known in curvature.items():
        layer = found.compressible.get(name)
        if layer is None:
            why = found.left_alone.get(name, "there is no such layer")
            raise MismatchError(f"layer '{name}' of the curvature does not fit the model: {why}")
        expected, shape = known.eigenvalues.shape, (layer.outputs, layer.inputs, layer.offsets)
        if tuple(expected) != shape:
            raise MismatchError(
                f"layer '{name}' has a weight of shape {shape} (o, i, K), the curvature is for "
                f"{tuple(expected)}"
            )
        layers[name] = layer
    return layers


def ignored_layers(curvature: Curvature, ignore: Iterable[str]) -> dict[str, str]:
    """The modules with parameters, layers or not, that a pattern names, here or in the estimate."""
    found = {n: why for n, why in curvature.left_alone.items() if why.startswith(ON_REQUEST)}
    known = [*curvature, *curvature.left_alone]
    for pattern in [ignore] if isinstance(ignore, str) else ignore:
        hits = [n for n in known if fnmatchcase(n, pattern)]
        if not hits:
            raise EigenDamageError(
                f"ignore pattern '{pattern}' matches no layer of the curvature; layers are: "
                f"{', '.join(list(curvature)[:8])}, …"
            )
        found.update(dict.fromkeys(hits, f"{ON_REQUEST} (pattern '{pattern}')"))
    return found
