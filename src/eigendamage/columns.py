"""Datasets of named columns, as Hugging Face's datasets has them, as batches for one model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from eigendamage.batch import LABEL_KEYS
from eigendamage.batches import has_columns
from eigendamage.errors import DataError

D = TypeVar("D")
_BATCH = 64


class ColumnBatches:
    """Batches of a ``datasets.Dataset``: dicts of tensors by the arguments that they are for.

    They can be gone through any number of times, in the order of the dataset.
    """

    def __init__(self, dataset: Any, arguments: Mapping[str, str], batch_size: int) -> None:
        """Go through a dataset.

        Args:
            dataset: a ``datasets.Dataset`` or ``IterableDataset``.
            arguments: for each column that is used, what it is called in a batch.
            batch_size: examples a batch; the last may have fewer.
        """
        self._dataset = _as_tensors(dataset)
        self._arguments = dict(arguments)
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for raw in _read(self._dataset, self._batch_size):
            yield {name: _stacked(raw[column], column) for column, name in self._arguments.items()}

    def __len__(self) -> int:
        """Number of batches.

        Raises:
            TypeError: if the dataset does not know how many examples it has.
        """
        return math.ceil(len(self._dataset) / self._batch_size)

    def holding_out(self, fraction: float, seed: int) -> tuple[ColumnBatches, ColumnBatches]:
        """What is left, and a part of the examples that is held out.

        Raises:
            DataError: if the dataset is streamed, or has too few examples.
        """
        if not hasattr(self._dataset, "select"):
            raise DataError(
                "a streamed dataset cannot be divided; give held_out=, or a config with held_out=0"
            )
        count = len(self._dataset)
        held = max(1, round(fraction * count))
        if held >= count:
            raise DataError(f"the dataset has {count} examples, too few to hold out {fraction:g}")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        return self._part(sorted(order[held:])), self._part(sorted(order[:held]))

    def _part(self, indices: list[int]) -> ColumnBatches:
        return ColumnBatches(self._dataset.select(indices), self._arguments, self._batch_size)


def column_batches(
    dataset: Any,
    model: nn.Module,
    *,
    batch_size: int = _BATCH,
    columns: Mapping[str, str] | None = None,
) -> ColumnBatches:
    """A ``datasets.Dataset`` as batches that a model can be called with.

    Columns whose names are arguments of ``model.forward`` are its inputs; a lone column of numbers
    is, whatever its name. A column called ``labels``, ``label``, ``targets`` or ``target`` is the
    label. All others are left out.

    Args:
        dataset: a ``datasets.Dataset`` or ``IterableDataset``, with a format or a transform of its
            own where it has one; one without is read as tensors.
        model: what is called with the batches.
        batch_size: examples a batch.
        columns: for each column that is to be used the argument of ``forward``, or ``"labels"``, if
            names do not say it.

    Raises:
        DataError: if it is several splits, has no example, has no column of a name in ``columns``,
            or cannot be read as tensors, or if it cannot be told what the inputs are; the message
            names the splits, or the columns and the arguments.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it must be at least 1")
    if isinstance(dataset, Mapping):
        splits = [str(name) for name in cast("Mapping[object, Any]", dataset)]
        raise DataError(
            f"the data is a {type(dataset).__name__} of the splits {', '.join(map(repr, splits))}; "
            f"give one of them, such as dataset['{next(iter(splits), 'train')}']"
        )
    first = next(iter(islice(_read(_as_tensors(dataset), 2), 1)), None)
    if first is None:
        raise DataError("the dataset has no example")
    if unknown := [name for name in columns or () if name not in first]:
        raise DataError(
            f"columns= names '{unknown[0]}'; the dataset has the columns {_listed(first)}"
        )
    return ColumnBatches(dataset, columns or _arguments(first, model), batch_size)


def fitted(data: D, model: nn.Module) -> D:
    """Data for a model: a dataset of columns as batches, all else as it is."""
    return cast(D, column_batches(data, model)) if has_columns(data) else data


def _read(dataset: Any, batch_size: int) -> Iterator[Mapping[str, Any]]:
    """Its batches.

    Raises:
        DataError: if datasets cannot give one as tensors, as where a row of a column is None.
    """
    try:
        yield from dataset.iter(batch_size=batch_size)
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"the dataset with the columns {', '.join(map(repr, dataset.column_names or ()))} "
            f"cannot be read as tensors: {error}. Leave out rows without a value "
            f"(dataset.filter) and columns that are no numbers (dataset.select_columns)"
        ) from error


def _as_tensors(dataset: Any) -> Any:
    formatted = getattr(dataset, "format", None)  # a streamed one has none to tell
    known = formatted is not None and formatted["type"] is not None
    return dataset if known else dataset.with_format("torch")


def _arguments(first: Mapping[str, Any], model: nn.Module) -> dict[str, str]:
    """What each column of a first batch is to ``forward``; those that are nothing are left out."""
    taken = inspect.signature(model.forward).parameters
    labels = [name for name in LABEL_KEYS if name in first][:1]
    numbers = [
        name for name, value in first.items() if name not in LABEL_KEYS and _is_numbers(value)
    ]
    inputs = [name for name in first if name in taken and name not in LABEL_KEYS]
    if not inputs and (len(numbers) == 1 or any(p.kind is p.VAR_KEYWORD for p in taken.values())):
        inputs = numbers
    needed = [
        name
        for name, parameter in taken.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    named = any(name in taken for name in inputs)
    if not inputs or (named and any(name not in inputs for name in needed)):
        raise DataError(
            f"the dataset has the columns {_listed(first)}; {type(model).__name__}.forward takes "
            f"{', '.join(repr(name) for name in taken)}. Tokenise texts, rename columns "
            f"(dataset.rename_column), or say which is which: "
            f"column_batches(dataset, model, columns={{column: argument}})"
        )
    return {name: name for name in [*inputs, *labels]}


def _is_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, Tensor) for item in cast("list[Any]", value))
    return isinstance(value, Tensor)


def _listed(first: Mapping[str, Any]) -> str:
    def kind(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{value.dtype}".removeprefix("torch.")
        item = value[0] if isinstance(value, list) and value else value
        return type(item).__name__

    return ", ".join(f"'{name}' ({kind(value)})" for name, value in first.items())


def _stacked(value: Any, column: str) -> Tensor:
    """A column of a batch as one tensor.

    Raises:
        DataError: if it holds no numbers, or examples of different shapes.
    """
    if isinstance(value, Tensor):
        return value
    items = cast("list[Any]", value if isinstance(value, list) else [value])
    try:
        if all(isinstance(item, Tensor) for item in items):
            return torch.stack(items)
        return torch.as_tensor(items)
    except (RuntimeError, TypeError, ValueError) as error:
        tensors = [item for item in items if isinstance(item, Tensor)]
        shapes = sorted({tuple(item.shape) for item in tensors})[:3]
        reason = (
            f"examples of different shapes, such as {', '.join(map(str, shapes))}; pad or cut them "
            f"to one length (tokenizer(…, padding='max_length', truncation=True))"
            if tensors
            else f"{type(items[0]).__name__}; only numbers can be put into a batch"
        )
        raise DataError(f"column '{column}' of the dataset holds {reason}") from error
