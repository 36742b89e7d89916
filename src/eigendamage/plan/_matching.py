"""Which layers of a model a curvature is of, and which of them are to be left alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from eigendamage.curvature import Curvature, LayerCurvature
from eigendamage.errors import EigenDamageError, MismatchError, NonFiniteError
from eigendamage.layers import ON_REQUEST, Layer, Sketch, find_layers, require_near, sketch_of

_ROUNDED = 1e-3  # as a file's bases may be off
_TELLING = 0.02  # of a weight's norm; rounding to bfloat16 is a tenth of it


def matching_layers(model: nn.Module, curvature: Curvature) -> dict[str, Layer]:
    """The model's layers that the curvature is of.

    Raises:
        MismatchError: if one is missing or has another shape.
        NonFiniteError: if the curvature of one is not finite, or its bases are none.
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
        _require_numbers(name, known)
        layers[name] = layer
    return layers


def matching_sketches(
    layers: Mapping[str, Layer], curvature: Curvature
) -> dict[str, Sketch | None]:
    """Of the weights as they are.

    Raises:
        MismatchError: if they are those of another model.
    """
    now = {name: sketch_of(layer.weight()) for name, layer in layers.items()}
    _movement(now, curvature)
    return now


def _movement(now: Mapping[str, Sketch | None], curvature: Curvature) -> dict[str, float]:
    """By what fraction of their norm weights have moved since; those of another model raise."""
    return {
        name: require_near(name, sketch, curvature.sketches.get(name), "curvature")
        for name, sketch in now.items()
    }


def notes_on_movement(now: Mapping[str, Sketch | None], curvature: Curvature) -> tuple[str, ...]:
    """What a user should know where weights have moved since their curvature was estimated."""
    moved = _movement(now, curvature)
    most = max(moved, key=moved.__getitem__)
    if moved[most] < _TELLING:
        return ()
    count = sum(distance >= _TELLING for distance in moved.values())
    return (
        f"the weights of {count} of {len(moved)} layers have changed since the curvature was "
        f"estimated, most in '{most}', by about {moved[most]:.0%} of their norm: prices are those "
        f"of the model as it was; estimate the curvature again for others",
    )


def _require_numbers(name: str, known: LayerCurvature) -> None:
    """A curvature that was estimated or loaded is sound; one that was made by hand may not be."""
    for field in fields(known):
        value = getattr(known, field.name)
        if not isinstance(value, Tensor):
            continue
        # No entry of an orthonormal matrix is above 1; that its columns are would take a product.
        if bool(torch.isfinite(value).all()) and not (
            field.name in ("Q_S", "Q_A") and bool((value.abs() > 1 + _ROUNDED).any())
        ):
            continue
        raise NonFiniteError(
            f"layer '{name}': '{field.name}' of the curvature holds NaN or infinite values, or is "
            f"no orthonormal basis; estimate the curvature again"
        )


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
