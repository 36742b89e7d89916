"""Timing whole models: taking turns, so that all meet the same conditions."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.batches import Batches, Data
from eigendamage.calls import call, device_of, tried_call
from eigendamage.errors import DataError, EigenDamageError
from eigendamage.layers import evaluating, preserved_random_state

Call = Callable[[], object]

_SAMPLE_SECONDS = 2e-4  # far above what reading the clock takes
_FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass of a batch.

    Attributes:
        median: over the rounds, in milliseconds.
        spread: interquartile range, in milliseconds.
    """

    median: float
    spread: float


def time_together(
    calls: Sequence[Call],
    *,
    device: torch.device,
    rounds: int = 15,
    min_seconds: float = _SAMPLE_SECONDS,
) -> list[float]:
    """Median milliseconds of each call, all of them timed under the same conditions.

    They take turns, in an order drawn anew every other round and in its reverse in between, so
    that a clock that slows down or a neighbour that wakes up meets all of them alike. Without
    gradients and garbage collection.

    Args:
        calls: what to time; each runs twice beforehand.
        device: what they run on; it has finished whenever the clock is read.
        rounds: samples of each call.
        min_seconds: a shorter call is repeated within a sample until that has passed.

    Raises:
        EigenDamageError: if ``rounds`` is less than 1.
    """
    samples = samples_of(calls, device, rounds, min_seconds=min_seconds)
    return [float(median) for median in np.median(samples, axis=0)]


def latency(
    models: Sequence[nn.Module], data: Data, *, batch: int, rounds: int = 15
) -> list[Latency]:
    """Time whole models on the same inputs in eval mode, taking turns as in `time_together`.

    Args:
        models: on one device. Modes, hooks and random states are as before afterwards.
        data: its first batch gives the inputs, which have to be tensors.
        batch: examples a call: the first ones, over again if there are not so many.
        rounds: samples of each model.

    Raises:
        DataError: if the data has no such batch, or a model cannot run on it.
        EigenDamageError: if the models are on several devices, or ``rounds`` is less than 1.
    """
    devices = sorted({str(device_of(model)) for model in models})
    if not devices:
        return []
    if len(devices) > 1:
        raise EigenDamageError(
            f"the models are on {' and '.join(devices)}; move them to one device to compare them"
        )
    device = device_of(models[0])
    examples = examples_of(data, batch, device)
    with as_deployed(models):
        samples = samples_of([checked_call(model, examples) for model in models], device, rounds)
    quartiles = np.quantile(samples, (0.25, 0.5, 0.75), axis=0).T
    return [Latency(float(middle), float(high - low)) for low, middle, high in quartiles]


def samples_of(
    calls: Sequence[Call],
    device: torch.device,
    rounds: int,
    *,
    min_seconds: float = _SAMPLE_SECONDS,
    max_seconds: float = math.inf,
) -> Float64[np.ndarray, "rounds calls"]:
    """Milliseconds of each call in each round; fewer rounds if all would take too long."""
    at_least_one("rounds", rounds)
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.no_grad():
            # The first run chooses kernels and gets memory; either may be interrupted.
            first = [_seconds(one, 1, device) for one in calls]
            once = [min(s, _seconds(one, 1, device)) for s, one in zip(first, calls, strict=True)]
            repeats = [max(1, math.ceil(min_seconds / max(s, 1e-9))) for s in once]
            a_round = sum(r * s for r, s in zip(repeats, once, strict=True))
            affordable = max(_FEWEST_ROUNDS, max_seconds / max(a_round, 1e-9))
            rounds = int(min(rounds, affordable))
            samples = np.empty((rounds, len(calls)))
            # An order and its reverse, then others: nothing periodic falls on one of the calls.
            draws = np.random.default_rng(0)
            order = np.arange(len(calls))
            for number in range(rounds):
                order = draws.permutation(order) if number % 2 == 0 else order[::-1]
                for index in order:
                    seconds = _seconds(calls[index], repeats[index], device)
                    samples[number, index] = 1e3 * seconds / repeats[index]
    finally:
        if collecting:
            gc.enable()
    return samples


def _seconds(one: Call, repeats: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        one()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def as_deployed(models: Sequence[nn.Module]) -> Generator[None]:
    """Eval mode without gradients, and put everything back at the end.

    Unlike with `evaluating` alone, fused inference paths run if the user has them on: they count.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(preserved_random_state())
        stack.enter_context(torch.no_grad())
        for model in models:
            stack.enter_context(evaluating(model))
        torch.backends.mha.set_fastpath_enabled(fused)
        yield


def examples_of(data: Data, count: int, device: torch.device) -> Batch:
    """The first ``count`` examples of the first batch, over again if there are not so many."""
    if count < 1:
        raise DataError(f"a batch of {count} examples cannot be timed; take at least 1")
    batch = next(iter(Batches(data, device)))
    if batch.size == count:
        return batch
    chosen = torch.arange(count, device=device) % batch.size

    def pick(name: str, value: object) -> Tensor:
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch.size:
            return value[chosen]
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(
            f"{name} is of {found}, so {count} examples cannot be made of a batch of {batch.size}; "
            f"give batches of {count}"
        )

    args = tuple(pick("the input", value) for value in batch.args)
    kwargs = {name: pick(f"the input '{name}'", value) for name, value in batch.kwargs.items()}
    return Batch(args, kwargs, None, count)


def checked_call(model: nn.Module, batch: Batch) -> Call:
    """The call of a model that has been seen to run."""
    tried_call(model, batch)
    return partial(call, model, batch)


def at_least_one(what: str, value: int) -> None:
    if value < 1:
        raise EigenDamageError(f"{what} is {value}; at least 1 is needed")
