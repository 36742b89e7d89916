"""Examples that are drawn in another order in every pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eigendamage.batch import Batch
from eigendamage.errors import DataError


class Pool:
    """The examples of some batches, in memory, to be drawn without replacement.

    Batches whose input is one tensor, of the same shape in all of them, are mixed; of others, as of
    texts padded to different lengths, only the order is drawn.

    Args:
        batches: the examples. Targets are left out.
        size: examples to draw at once, where they are mixed.

    Raises:
        DataError: if there is no example.
    """

    def __init__(self, batches: Iterable[Batch], size: int) -> None:
        self._whole = list(batches)
        if not self._whole:
            raise DataError("there is no example to train on; give more data")
        self._size = size
        self._mixed = _joined(self._whole)
        if self._mixed is not None:
            self._whole = []

    @property
    def steps(self) -> int:
        """Batches in a pass."""
        return len(self._whole) if self._mixed is None else math.ceil(self._mixed.size / self._size)

    def shuffled(self, generator: torch.Generator) -> Iterator[Batch]:
        """One pass in an order of its own."""
        if self._mixed is None:
            for index in torch.randperm(len(self._whole), generator=generator).tolist():
                yield self._whole[index]
            return
        for part in torch.randperm(self._mixed.size, generator=generator).split(self._size):
            yield mapped(self._mixed, partial(_taken, part), len(part))


def _taken(at: Tensor, x: Tensor) -> Tensor:
    return x[at.to(x.device)]


def mapped(batch: Batch, change: Callable[[Tensor], Tensor], size: int) -> Batch:
    """A batch of one tensor with that tensor changed, without its target."""

    def new(value: object) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    args = tuple(new(value) for value in batch.args)
    return Batch(args, {key: new(value) for key, value in batch.kwargs.items()}, None, size)


def tensor_of(batch: Batch) -> Tensor | None:
    """The one tensor that a batch's input is, by itself or as a keyword; None for other inputs."""
    found = [v for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)]
    return found[0] if batch.divisible and len(found) == 1 else None


def _joined(batches: list[Batch]) -> Batch | None:
    tensors = [tensor_of(batch) for batch in batches]
    known = [x for x in tensors if x is not None]
    alike = {(x.shape[1:], x.dtype) for x in known}
    if len(known) < len(tensors) or len(alike) != 1 or not _same_rest(batches):
        return None
    whole = torch.cat(known)

    def all_of_it(_: Tensor) -> Tensor:
        return whole

    return mapped(batches[0], all_of_it, len(whole))


def _same_rest(batches: list[Batch]) -> bool:
    """Whether batches differ in nothing but their tensor."""

    def rest(batch: Batch) -> tuple[list[Any], Mapping[str, Any]]:
        args = [None if isinstance(v, Tensor) else v for v in batch.args]
        return args, {k: None if isinstance(v, Tensor) else v for k, v in batch.kwargs.items()}

    return all(rest(batch) == rest(batches[0]) for batch in batches)
