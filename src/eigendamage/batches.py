"""What a user calls data, as batches a model can be called with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import count, islice
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from eigendamage.batch import Batch, as_batch
from eigendamage.errors import DataError, EigenDamageError
from eigendamage.repeated import Repeated

Data = Iterable[Any] | Tensor | Dataset[Any]
"""An iterable of batches: tensors, (input, label) pairs or dicts. A lone tensor is one batch.

A dict is passed by keywords, or as one argument to a model whose ``forward`` takes one and knows
none of its names.
"""

D = TypeVar("D")

_DATASET_BATCH = 64
_PEEKED = 8


class Batches:
    """Data that can be gone through several times, on one device, up to ``limit`` examples.

    A one-shot iterator (a generator, say) is kept in memory on the first pass, because most of what
    is built on curvature needs two; a DataLoader draws the same in every pass, and what has a
    ``set_epoch`` is told that each is the first. Iterating raises `DataError` if there is no
    example, and `NonFiniteError` where an input has a NaN or an infinity (a mask may have -inf).
    """

    def __init__(self, data: Data, device: torch.device, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise DataError(f"max_examples is {limit}; at least one example is needed")
        source = iterable_of(kept(data, limit))
        self._source = Repeated(source) if isinstance(source, DataLoader) else source
        self._device = device
        self._limit = limit

    def __iter__(self) -> Iterator[Batch]:
        seen = 0
        if hasattr(self._source, "set_epoch"):  # the first pass of what shuffles by its number
            cast(Any, self._source).set_epoch(0)
        for index, raw in numbered(self._source):
            known = isinstance(raw, Batch)
            batch = raw.on(self._device) if known else as_batch(raw, index, self._device)
            if self._limit is not None and seen + batch.size > self._limit:
                batch = batch.few(self._limit - seen)
            seen += batch.size
            yield batch
            if self._limit is not None and seen >= self._limit:
                return
        if seen == 0:
            raise DataError(
                "the data has no example: the iterable ended before its first batch. "
                "If it is a generator that was used before, make a new one or pass a list."
            )

    def peek(self) -> Batch:
        """The first batch that holds several examples, or the first if none of a few does."""
        first: Batch | None = None
        for batch in islice(self, _PEEKED):
            if batch.size > 1:
                return batch
            first = first or batch
        assert first is not None  # iterating raises where there is no batch
        return first

    def __len__(self) -> int:
        """Number of batches, 0 where it is not known before a pass."""
        if self._limit is not None:
            return 0
        try:
            return len(cast(Sized, self._source))
        except TypeError:
            return 0


def numbered(source: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """The batches of a source, each with its number.

    Raises:
        DataError: if the source fails on the way to a batch; its own error is the cause.
    """
    items = iter(source)
    for index in count():
        try:
            raw = next(items)
        except StopIteration:
            return
        except EigenDamageError:
            raise
        except Exception as error:
            raise DataError(
                f"the data failed at batch {index} with {type(error).__name__}: {error}. Its own "
                f"error is above; mend the source and run this again"
            ) from error
        yield index, raw


def kept(data: D, limit: int | None = None) -> D | list[Any]:
    """The batches of a one-shot iterator as a list; anything else as it is.

    Args:
        data: what a user calls data.
        limit: examples after which no more batches are drawn, of which there may be no end.

    Raises:
        DataError: as `numbered`, and with a limit where a batch has a form that is not known.
        NonFiniteError: with a limit, where an input holds a NaN or an infinity.
    """
    if not isinstance(data, Iterator):
        return data
    found: list[Any] = []
    seen = 0
    for index, raw in numbered(data):
        found.append(raw)
        if limit is not None:
            batch = raw if isinstance(raw, Batch) else as_batch(raw, index, torch.device("cpu"))
            seen += batch.size
            if seen >= limit:
                break
    return found


def iterable_of(data: Data) -> Iterable[Any]:
    """What a user calls data as batches: a lone batch as one, a dataset by a loader.

    Raises:
        DataError: if it is nothing of the kind.
    """
    if has_columns(data):
        raise DataError(
            f"a {type(data).__name__} of datasets has columns, and which are inputs depends on the "
            f"model; give column_batches(dataset, model, batch_size=…)"
        )
    if isinstance(data, Tensor | Mapping):
        return [data]
    if _is_input_label_pair(data):
        return [data]
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=_DATASET_BATCH)
    if isinstance(data, Iterator):
        return kept(data)
    if not isinstance(data, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError(
            f"data must be an iterable of batches (tensors, (input, label) pairs or dicts), "
            f"found {type(data).__name__}"
        )
    return data


def has_columns(data: object) -> bool:
    """Whether it is a dataset of Hugging Face's datasets, streamed or not."""
    roots = {kind.__module__.partition(".")[0] for kind in type(data).__mro__}
    return "datasets" in roots and hasattr(data, "column_names")


def _is_input_label_pair(data: object) -> bool:
    """Whether a tuple is one (input, label) batch rather than two batches of inputs."""
    if not isinstance(data, tuple):
        return False
    items = cast("tuple[object, ...]", data)
    if len(items) != 2:
        return False
    first, second = items
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    if first.ndim == 0 or second.ndim == 0 or first.shape[0] != second.shape[0]:
        return False
    if first.dtype == second.dtype and first.ndim == second.ndim:
        raise DataError(
            "a tuple of two tensors alike may be two batches or one (input, label) pair; give "
            "[x1, x2] or [(x, y)]"
        )
    return True
