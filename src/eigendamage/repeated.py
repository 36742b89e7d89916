"""Passes over a DataLoader that all draw the same."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

_SEED = 0


class Repeated:
    """A DataLoader of which every pass has the same batches, in the same order.

    Where it shuffles, an example that is held out of one pass would be fitted on in the next. What
    it draws, for its order and for augmentations, it draws from the same random state in every
    pass, and from a generator of its own from where that stands; both are as before afterwards.
    What has a ``set_epoch`` is told that each pass is the first. Workers seed what they draw by
    that, as a DataLoader does; those that persist keep random states of their own.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for part in _parts(self._loader):
            if hasattr(part, "set_epoch"):  # the first pass of what shuffles by its number
                part.set_epoch(0)
        draws = _Draws(self._loader)
        with draws.taken_up():
            items = iter(self._loader)
        while True:
            with draws.taken_up():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


def _parts(loader: DataLoader[Any]) -> tuple[Any, ...]:
    """What of a loader may draw, or know the number of the pass."""
    batches = loader.batch_sampler
    inner = getattr(batches, "sampler", None)
    return loader, loader.dataset, loader.sampler, batches, inner


class _Draws:
    """The random state of one pass, apart from that of all else."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        found = [getattr(part, "generator", None) for part in _parts(loader)]
        own = {id(g): g for g in found if isinstance(g, torch.Generator)}
        self._generators = [torch.default_generator, *own.values()]
        fresh = torch.Generator().manual_seed(_SEED).get_state()
        self._torch = [fresh, *(generator.get_state() for generator in own.values())]
        self._numpy: Any = np.random.RandomState(_SEED).get_state()
        self._python = random.Random(_SEED).getstate()

    @contextmanager
    def taken_up(self) -> Generator[None]:
        """Draw from here inside."""
        outside = [generator.get_state() for generator in self._generators]
        numpy, python = np.random.get_state(), random.getstate()
        self._set(self._torch, self._numpy, self._python)
        try:
            yield
        finally:
            self._torch = [generator.get_state() for generator in self._generators]
            self._numpy, self._python = np.random.get_state(), random.getstate()
            self._set(outside, numpy, python)

    def _set(self, states: list[torch.Tensor], numpy: Any, python: Any) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
        np.random.set_state(numpy)
        random.setstate(python)
