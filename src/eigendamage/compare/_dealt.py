"""Training data shared out among rounds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

from eigendamage.batches import kept
from eigendamage.errors import DataError


class Dealt:
    """Data of which each pass gives one share of the batches, so that so many passes make a whole.

    Args:
        data: batches, of known length.
        parts: how many shares there are.

    Raises:
        DataError: if the data has no length, or fewer batches than parts.
    """

    def __init__(self, data: Iterable[Any], parts: int) -> None:
        self._data = kept(data)
        self._parts = parts
        self._passes = 0
        if not isinstance(self._data, Sized):
            raise DataError("training needs data of known length, such as a DataLoader")
        if len(self._data) < parts:
            raise DataError(
                f"{len(self._data)} batches of training data cannot be split among {parts} rounds"
            )
        self._length = len(self._data) // parts

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        first = self._passes % self._parts
        self._passes += 1
        return islice(self._data, first, self._length * self._parts, self._parts)
