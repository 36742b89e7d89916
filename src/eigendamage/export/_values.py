"""What goes into a model and what comes out, as plain containers of tensors with names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from eigendamage.batch import Batch, map_tensors
from eigendamage.errors import ExportError

Plain = Tensor | tuple[Any, ...] | dict[str, Any]
"""A model's output without the classes that hold it."""


def plain_output(output: Any) -> Plain:
    """The tensors of a model's output in tuples and dicts; what is none of these is left out.

    Raises:
        ExportError: if it holds no tensor.
    """
    found = _plain(output)
    if found is None:
        raise ExportError(
            f"the model returned {type(output).__name__}, which holds no tensor; wrap it so that "
            f"its forward returns a tensor, or a tuple or dict of them"
        )
    return found


def _plain(item: Any) -> Plain | None:
    if isinstance(item, Tensor):
        return item
    if isinstance(item, Mapping):
        pairs = ((str(k), _plain(v)) for k, v in cast("Mapping[object, Any]", item).items())
        return {k: v for k, v in pairs if v is not None} or None
    if isinstance(item, list | tuple):
        parts = map(_plain, cast("list[Any] | tuple[Any, ...]", item))
        return tuple(p for p in parts if p is not None) or None
    return None


def named_outputs(output: Plain) -> dict[str, Tensor]:
    """Every tensor of an output by its place in it: ``output``, ``output_0`` or a dict's key."""
    return dict(_named(output, ""))


def _named(item: Plain, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(item, Tensor):
        yield place or "output", item
    elif isinstance(item, dict):
        for key, value in item.items():
            yield from _named(value, f"{place}_{key}" if place else key)
    else:
        for index, value in enumerate(item):
            yield from _named(value, f"{place or 'output'}_{index}")


def with_size(batch: Batch, size: int) -> Batch:
    """A batch of ``size`` examples, those of the given one over and over."""
    rows = torch.arange(size) % batch.size

    def take(x: Tensor) -> Tensor:
        return x[rows.to(x.device)] if has_batch_axis(x, batch) else x

    return Batch(
        tuple(map_tensors(a, take) for a in batch.args),
        {k: map_tensors(v, take) for k, v in batch.kwargs.items()},
        None,
        size,
    )


def has_batch_axis(x: Tensor, batch: Batch) -> bool:
    """Whether a tensor's first axis is as long as the batch."""
    return x.ndim > 0 and x.shape[0] == batch.size
