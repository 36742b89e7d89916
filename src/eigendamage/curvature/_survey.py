"""Which layers a curvature can be had of, found on a few examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from eigendamage.batch import Batch
from eigendamage.curvature._capture import probe_layout
from eigendamage.curvature._head import Head
from eigendamage.errors import NothingToCompressError
from eigendamage.layers import Layer, Trace, find_layers, trace


@dataclass(frozen=True)
class Survey:
    """What is known of a model before any data has gone through it in earnest.

    Attributes:
        layers: the compressible layers that run and get gradients, in order of execution.
        left_alone: why the others are not.
        trace: sizes, order and cost.
        classifier: the layers whose output is the model's.
    """

    layers: Mapping[str, Layer]
    left_alone: Mapping[str, str]
    trace: Trace
    classifier: tuple[str, ...]


def survey(model: nn.Module, batch: Batch, ignore: Iterable[str], head: Head) -> Survey:
    """Find a model's layers, run a few examples and see which get gradients of their own.

    Raises:
        NothingToCompressError: if none does.
    """
    found = find_layers(model, ignore=ignore)
    if not found.compressible:
        raise NothingToCompressError(
            "the model has no layer that can be compressed. " + _reasons(found.left_alone)
        )
    traced = trace(model, found.compressible, batch, head.starts)
    reached, unclear = probe_layout(model, found.compressible, batch, head)
    left_alone = dict(found.left_alone)
    layers: dict[str, Layer] = {}
    for name in (*traced.layers, *(n for n in found.compressible if n not in traced.layers)):
        if name not in traced.layers:
            left_alone[name] = (
                "it was not called on the data given: it did not run, or its weight is read"
            )
        elif name in traced.read:
            left_alone[name] = "its weight is also read directly, past its forward"
        elif name not in reached:
            left_alone[name] = "no gradient of the loss reaches it"
        elif name in unclear:
            left_alone[name] = unclear[name]
        else:
            layers[name] = found.compressible[name]
    if not layers:
        raise NothingToCompressError(
            "no compressible layer of the model can be handled. " + _reasons(left_alone)
        )
    classifier = tuple(n for n in layers if n in traced.outputs)
    if not traced.outputs:  # something without parameters comes after it
        classifier = (list(layers)[-1],)
    return Survey(layers, left_alone, traced, classifier)


def _reasons(left_alone: Mapping[str, str]) -> str:
    if not left_alone:
        return "It has no module with parameters at all."
    shown = "; ".join(f"'{n}': {r}" for n, r in list(left_alone.items())[:6])
    more = len(left_alone) - 6
    return f"Left alone are {shown}" + (f"; and {more} more." if more > 0 else ".")
