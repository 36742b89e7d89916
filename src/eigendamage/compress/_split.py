"""Data in two parts: one to fit on, and one that had no part in that, to judge by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from eigendamage.batch import Batch, tensors_in
from eigendamage.batches import Batches, Data
from eigendamage.errors import DataError

_HELD_OUT = 10  # one example in so many is held out
_FEWEST = 5  # batches, for whole ones to be held out


class Part:
    """Some of the batches of data that can be gone through several times.

    Args:
        batches: all of them.
        held_out: whether this is the part that is held out.
        whole: whether whole batches are held out, or the last examples of each.
    """

    def __init__(self, batches: Batches, *, held_out: bool, whole: bool) -> None:
        self._batches = batches
        self._held_out = held_out
        self._whole = whole

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(self._batches):
            if self._whole:
                if (index % _HELD_OUT == _FEWEST - 1) == self._held_out:
                    yield batch
            else:
                first = batch.size - max(1, batch.size // _HELD_OUT)
                stop = batch.size if self._held_out else first
                start = first if self._held_out else 0
                if start < stop:
                    yield batch.part(start, stop)


@dataclass(frozen=True)
class Parts:
    """Data to fit on, and data to judge by; both can be gone through several times.

    Attributes:
        fit: about nine tenths of it.
        held_out: the rest.
        steady: whether two passes began with the same batch.
    """

    fit: Part
    held_out: Part
    steady: bool


def split(data: Data, device: torch.device, max_examples: int | None) -> Parts:
    """Hold out about a tenth of the examples: whole batches where there are enough of them.

    The order of the batches is taken to be the same in every pass, as a DataLoader's is here. Two
    first batches tell whether it is.

    Raises:
        DataError: if nothing can be held out.
    """
    batches = Batches(data, device, max_examples)
    first: list[Batch] = []
    for batch in batches:
        first.append(batch)
        if len(first) == _FEWEST:
            break
    whole = len(first) >= _FEWEST
    if not whole and not all(batch.divisible for batch in first):
        raise DataError(
            f"a part of the data is held out to judge the repair by, which takes at least "
            f"{_FEWEST} batches where they are of several tensors each and cannot be cut; the data "
            f"has {len(first)}. Give more, or repair=False and calibrate=False"
        )
    if not whole and all(batch.size < 2 for batch in first):
        raise DataError(
            f"a part of the data is held out to judge the repair by, which takes at least "
            f"{_FEWEST} batches of one example, or larger ones; the data has {len(first)}. Give "
            f"more, or repair=False and calibrate=False"
        )
    again = next(iter(batches))
    return Parts(
        Part(batches, held_out=False, whole=whole),
        Part(batches, held_out=True, whole=whole),
        steady=_same_inputs(first[0], again),
    )


def _same_inputs(a: Batch, b: Batch) -> bool:
    mine, its = (tensors_in([*batch.args, *batch.kwargs.values()]) for batch in (a, b))
    return len(mine) == len(its) and all(map(torch.equal, mine, its))
