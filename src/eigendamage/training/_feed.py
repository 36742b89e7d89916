"""Training data, pass by pass: a user's loader, or examples in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from eigendamage.batch import Batch, as_batch
from eigendamage.batches import iterable_of, numbered
from eigendamage.errors import DataError
from eigendamage.seeds import unsigned_seed


@runtime_checkable
class Feed(Protocol):
    """Batches to train on; a pass depends on its number alone."""

    def __len__(self) -> int: ...

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Those of one pass."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """Data that can hold out a part of itself."""

    def holding_out(self, fraction: float, seed: int) -> tuple[Iterable[Any], Iterable[Any]]:
        """What is left, and the part held out, in a fixed order and as it is."""
        ...


class LoaderFeed:
    """A user's loader. Before each pass all generators that it may draw from are seeded.

    Args:
        data: batches, of known length.
        device: for the batches.
        seed: of the first pass.
        rank: which of so many processes this is; each takes every so-manieth batch, and all
            equally many.
        processes: how many there are.

    Raises:
        DataError: if the length is unknown, or there are fewer batches than processes.
    """

    def __init__(
        self, data: Iterable[Any], device: torch.device, seed: int, rank: int, processes: int
    ) -> None:
        self._data = iterable_of(data)
        self._device = device
        self._seed = seed
        self._rank = rank
        self._processes = processes
        self._batches = length_of(self._data)
        if self._batches < max(1, processes):
            raise DataError(
                f"the training data has {self._batches} batches, and each of {processes} "
                f"processes needs one; give more data"
            )

    def __len__(self) -> int:
        return self._batches // self._processes

    def batches(self, epoch: int) -> Iterator[Batch]:
        seed = _seed_of(self._seed, epoch)
        seed_everything(seed)
        for part in (self._data, *_parts(self._data)):
            announce = getattr(part, "set_epoch", None)
            if callable(announce):
                announce(epoch)
        with _seeded([g for part in _parts(self._data) if (g := _generator(part))], seed):
            mine = islice(self._data, self._rank, len(self) * self._processes, self._processes)
            for index, raw in numbered(mine):
                yield as_batch(raw, index, self._device)


def _seed_of(seed: int, epoch: int) -> int:
    """Of one epoch. Seed 0 in epoch 1 and seed 1 in epoch 0 differ, as they would not in a sum."""
    return int(np.random.SeedSequence([unsigned_seed(seed), epoch]).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and Python, which loaders and their transforms draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def length_of(data: Iterable[Any]) -> int:
    """How many batches a pass has.

    Raises:
        DataError: if that is not known.
    """
    try:
        return len(cast(Sized, data))
    except TypeError as error:
        raise DataError(
            "training needs data of known length, such as a list or a DataLoader over a dataset "
            "that is no stream"
        ) from error


def _parts(data: object) -> list[object]:
    if not isinstance(data, DataLoader):
        return []
    loader = cast("DataLoader[Any]", data)
    found = [loader, loader.sampler, loader.batch_sampler, loader.dataset]
    return [part for part in found if part is not None]


def _generator(part: object) -> torch.Generator | None:
    found = getattr(part, "generator", None)
    return found if isinstance(found, torch.Generator) else None


@contextmanager
def _seeded(generators: Sequence[torch.Generator], seed: int) -> Generator[None]:
    before = [(g, g.get_state()) for g in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


def hold_out(
    data: Iterable[Any], fraction: float, seed: int
) -> tuple[Iterable[Any], Iterable[Any]]:
    """Training data without a part of it, and that part.

    Raises:
        DataError: if the data cannot be divided, or there is too little of it.
    """
    if isinstance(data, Divisible):
        return data.holding_out(fraction, seed)
    if isinstance(data, Sequence):
        items: Sequence[Any] = data
        out = set(_drawn(len(items), fraction, seed, "batches"))
        return (
            [item for index, item in enumerate(items) if index not in out],
            [item for index, item in enumerate(items) if index in out],
        )
    if isinstance(data, DataLoader):
        return _loader_in_two(cast("DataLoader[Any]", data), fraction, seed)
    raise DataError(
        f"a part of the training data is held out to choose the best epoch by, but a "
        f"{type(data).__name__} cannot be divided; give a DataLoader over a dataset or a list, or "
        f"held_out=, or a config with held_out=0"
    )


def _drawn(count: int, fraction: float, seed: int, what: str) -> list[int]:
    held = max(1, round(fraction * count))
    if held >= count:
        raise DataError(
            f"the training data has {count} {what}, too few to hold out {fraction:g} of them; give "
            f"more, or a config with held_out=0"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:held].tolist()


def _loader_in_two(
    loader: DataLoader[Any], fraction: float, seed: int
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    dataset: Any = loader.dataset
    plain = isinstance(loader.sampler, RandomSampler | SequentialSampler)
    if isinstance(dataset, IterableDataset) or not plain or loader.batch_size is None:
        raise DataError(
            "a part of the training data is held out to choose the best epoch by, but this "
            "DataLoader has a sampler of its own or a stream; give held_out= with other data, or a "
            "config with held_out=0"
        )
    out = sorted(_drawn(len(dataset), fraction, seed, "examples"))
    gone = set(out)
    kept = [index for index in range(len(dataset)) if index not in gone]

    def over(indices: list[int], *, shuffle: bool, drop_last: bool) -> DataLoader[Any]:
        collate = cast("Callable[[list[Any]], Any]", loader.collate_fn)
        return DataLoader(
            Subset(dataset, indices),
            batch_size=loader.batch_size,
            shuffle=shuffle,
            num_workers=loader.num_workers,
            collate_fn=collate,
            pin_memory=loader.pin_memory,
            drop_last=drop_last,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator if shuffle else None,
        )

    shuffled = isinstance(loader.sampler, RandomSampler)
    return (
        over(kept, shuffle=shuffled, drop_last=loader.drop_last),
        over(out, shuffle=False, drop_last=False),
    )


class PoolFeed:
    """Examples in memory, in another order in every pass, changed by an augmentation.

    Args:
        pass_of: makes one pass of a generator.
        steps: batches a pass.
        augment: changes each batch, drawing from the same generator.
        seed: of the first pass.
    """

    def __init__(
        self,
        pass_of: Callable[[torch.Generator], Iterator[Batch]],
        steps: int,
        augment: Callable[[Batch, torch.Generator], Batch],
        seed: int,
    ) -> None:
        self._pass_of = pass_of
        self._steps = steps
        self._augment = augment
        self._seed = seed

    def __len__(self) -> int:
        return self._steps

    def batches(self, epoch: int) -> Iterator[Batch]:
        seed = _seed_of(self._seed, epoch)
        generator = torch.Generator().manual_seed(seed)
        for batch in self._pass_of(generator):
            yield self._augment(batch, generator)
