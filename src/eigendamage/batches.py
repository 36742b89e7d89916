"""What a user calls data, as batches a model can be called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from eigendamage.errors import DataError, EigenDamageError, NonFiniteError
from eigendamage.repeated import Repeated

Data = Iterable[Any] | Tensor | Dataset[Any]
"""An iterable of batches: tensors, (input, label) pairs or dicts. A lone tensor is one batch.

A dict is passed by keywords, or as one argument to a model whose ``forward`` takes one and knows
none of its names.
"""

D = TypeVar("D")

LABEL_KEYS = ("labels", "label", "targets", "target")
TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids")
"""What language models call their inputs of shape (batch, tokens)."""
_DATASET_BATCH = 64
_PEEKED = 8


@dataclass(frozen=True)
class Batch:
    """One call of the model: its arguments, the targets if any, and how many examples it holds."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Tensor | None
    size: int

    @property
    def divisible(self) -> bool:
        """Whether its input is one tensor, or one by tokens, which can be cut along the first axis.

        Among several other tensors there may be some without a batch axis (a mask, positions) whose
        first axis is as long by chance.
        """
        if not self.args and self.kwargs and all(name in TOKEN_KEYS for name in self.kwargs):
            shapes = {v.shape for v in self.kwargs.values() if isinstance(v, Tensor)}
            return len(shapes) == 1
        return len(tensors_in([*self.args, *self.kwargs.values()])) == 1

    @property
    def counted(self) -> Bool[Tensor, "n t"] | None:
        """Which tokens of each example count, by ``attention_mask``; None where all of them do."""
        mask = self.kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != self.size:
            return None
        # One that is added to scores is 0 where there is something to see.
        added = mask.is_floating_point() and bool(mask.isneginf().any())
        counted = mask == 0 if added else mask != 0
        return None if bool(counted.all()) else counted

    def few(self, count: int) -> Batch:
        """Its first ``count`` examples if it is divisible, the whole batch otherwise."""
        if not self.divisible or count >= self.size:
            return self
        return self.part(0, count)

    def on(self, device: torch.device) -> Batch:
        """The same on a device."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return Batch(
            tuple(map_tensors(a, move) for a in self.args),
            {k: map_tensors(v, move) for k, v in self.kwargs.items()},
            None if self.target is None else move(self.target),
            self.size,
        )

    def part(self, start: int, stop: int) -> Batch:
        """The examples from ``start`` to ``stop`` of a divisible batch."""

        def cut(x: Tensor) -> Tensor:
            return x[start:stop]

        return Batch(
            tuple(map_tensors(a, cut) for a in self.args),
            {k: map_tensors(v, cut) for k, v in self.kwargs.items()},
            None if self.target is None else self.target[start:stop],
            stop - start,
        )

    def shapes(self) -> str:
        """The shapes of its inputs, for messages."""
        found = tensors_in([*self.args, *self.kwargs.values()])
        return ", ".join(str(tuple(t.shape)) for t in found)


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
        source = iterable_of(data)
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


def kept(data: D) -> D | list[Any]:
    """The batches of a one-shot iterator as a list; anything else as it is.

    Raises:
        DataError: as `numbered`.
    """
    return [raw for _, raw in numbered(data)] if isinstance(data, Iterator) else data


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


def as_batch(raw: object, index: int, device: torch.device) -> Batch:
    """One item of the user's data as a `Batch` on ``device``.

    Raises:
        DataError: if the item is neither a tensor, an (input, label) pair nor a dict of tensors.
        NonFiniteError: if an input holds a NaN or an infinity.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    target: object = None
    if isinstance(raw, Tensor):
        args = (raw,)
    elif isinstance(raw, Mapping):
        kwargs = {str(k): v for k, v in cast("Mapping[object, Any]", raw).items()}
        for key in LABEL_KEYS:
            if key in kwargs:
                target = kwargs.pop(key)
                break
    elif isinstance(raw, list | tuple):
        items = cast("list[Any] | tuple[Any, ...]", raw)
        if len(items) not in (1, 2):
            raise DataError(
                f"batch {index} is a {type(raw).__name__} of {len(items)} items; expected an "
                f"input or an (input, label) pair. For several inputs use a dict of keyword "
                f"arguments."
            )
        if isinstance(items[0], Mapping):
            kwargs = {str(k): v for k, v in cast("Mapping[object, Any]", items[0]).items()}
        else:
            args = (items[0],)
        target = items[1] if len(items) == 2 else None
    else:
        raise DataError(
            f"batch {index} is a {type(raw).__name__}; expected a tensor, an (input, label) pair "
            f"or a dict of tensors"
        )

    def move(x: Tensor) -> Tensor:
        moved = x.detach().to(device, non_blocking=True)
        return moved.clone() if moved.is_inference() else moved

    args = tuple(map_tensors(a, move) for a in args)
    kwargs = {k: map_tensors(v, move) for k, v in kwargs.items()}
    if target is not None and not isinstance(target, Tensor):
        try:
            target = torch.as_tensor(target)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"the labels of batch {index} are {type(target).__name__}; expected a tensor"
            ) from error
    moved_target = None if target is None else move(target)
    size = _batch_size(args, kwargs, index)
    if moved_target is not None and (moved_target.ndim == 0 or moved_target.shape[0] != size):
        raise DataError(
            f"batch {index} has {size} inputs but labels of shape {tuple(moved_target.shape)}; "
            f"the first axis of both must be the batch"
        )
    _refuse_non_finite(args, kwargs, index)
    return Batch(args, kwargs, moved_target, size)


def map_tensors(item: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nested lists, tuples and mappings with a function done to each tensor."""
    if isinstance(item, Tensor):
        return function(item)
    if isinstance(item, list | tuple):
        items = cast("list[Any] | tuple[Any, ...]", item)
        mapped = [map_tensors(x, function) for x in items]
        return mapped if isinstance(items, list) else tuple(mapped)
    if isinstance(item, Mapping):
        return {k: map_tensors(v, function) for k, v in cast("Mapping[Any, Any]", item).items()}
    return item


def tensors_in(item: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and mappings, or a lone one."""
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(item, keep)
    return found


def _batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int) -> int:
    for tensor in tensors_in([*args, *kwargs.values()]):
        if tensor.ndim > 0:
            if tensor.shape[0] == 0:
                raise DataError(
                    f"batch {index} is empty: its input has shape {tuple(tensor.shape)}"
                )
            return tensor.shape[0]
    raise DataError(f"batch {index} holds no tensor with a batch axis")


def _refuse_non_finite(args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int) -> None:
    named = [("the input", a) for a in args] + [(f"the input '{k}'", v) for k, v in kwargs.items()]
    for name, item in named:
        for tensor in tensors_in(item):
            if not tensor.is_floating_point():
                continue
            # What is added to attention scores is -inf where nothing is to be seen.
            fine = torch.isfinite(tensor) | (tensor.isneginf() if "mask" in name else False)
            if not bool(fine.all()):
                bad = int((~fine).sum())
                raise NonFiniteError(
                    f"{name} of batch {index} holds {bad} NaN or infinite values of "
                    f"{tensor.numel()}; clean the data first"
                )
