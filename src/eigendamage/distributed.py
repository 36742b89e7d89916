"""Several processes that compute one result: what each does of it, and how all get all of it.

Every function here does nothing in a single process, so callers need not ask how many there are.
Otherwise the default group of ``torch.distributed`` is used, whatever started it. All processes
make the same calls in the same order. Before each exchange they tell one another how they fare, so
that a failure of one ends all with an error instead of leaving the others to wait.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from itertools import islice
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eigendamage.errors import EigenDamageError, MismatchError, ProcessError

P = ParamSpec("P")
K = TypeVar("K", bound=Hashable)
R = TypeVar("R")
T = TypeVar("T")

_collectives = cast("Any", dist)  # their results are of no declared type, and not used
_in_one_fate: ContextVar[bool] = ContextVar("in_one_fate", default=False)
_FINE, _FAILED = 0, 1


def rank() -> int:
    """This process's number; 0 if it is alone."""
    return dist.get_rank() if _started() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _started() else 1


def one_fate(function: Callable[P, R]) -> Callable[P, R]:
    """A function that returns in all processes or fails in all.

    Where it raises in one, that one raises its own error, and the others a `ProcessError` at their
    next exchange, the last of which is at the function's end. Inside another such function it is
    the outer one that sees to it: an error that is caught between the two ends nothing.
    """

    @wraps(function)
    def together(*args: P.args, **kwargs: P.kwargs) -> R:
        if world() == 1 or _in_one_fate.get():
            return function(*args, **kwargs)
        token = _in_one_fate.set(True)
        try:
            result = function(*args, **kwargs)
            _told("the end of " + function.__name__)
        except ProcessError:
            raise
        except Exception:  # whatever it is: it goes on as it came, once the others know of it
            _tell_failure()
            raise
        finally:
            _in_one_fate.reset(token)
        return result

    return together


def dealt(items: Iterable[T]) -> Iterator[tuple[T, ...]]:
    """As many items at a time as there are processes; the last time may be fewer.

    The process of rank r deals with the r-th of each.
    """
    source = iter(items)
    while step := tuple(islice(source, world())):
        yield step


def shared_out(costs: Sequence[float]) -> list[int]:
    """Which process computes each item: the dearest first, each to whoever has least to do.

    Graham's longest-processing-time rule: the slowest process takes at most 4/3 of the least
    possible time.
    """
    loads = [0.0] * world()
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owner = min(range(len(loads)), key=loads.__getitem__)
        owners[index] = owner
        loads[owner] += costs[index]
    return owners


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's sum over the processes, to the same bit in all of them.

    Args:
        tensors: of one dtype, of the same shapes in every process.
    """
    if world() == 1:
        return list(tensors)
    flat = torch.cat([t.reshape(-1).to(_device()) for t in tensors])
    _exchange(f"a sum of {flat.numel()} {flat.dtype}", lambda: _collectives.all_reduce(flat))
    parts = flat.split([t.numel() for t in tensors])
    return [p.reshape(t.shape).to(t.device) for p, t in zip(parts, tensors, strict=True)]


def summed_counts(counts: Sequence[int]) -> list[int]:
    """Each count's sum over the processes."""
    if world() == 1 or not counts:
        return list(counts)
    total: list[int] = summed([torch.tensor(counts, dtype=torch.int64)])[0].tolist()
    return total


def gathered(number: int) -> list[int]:
    """A number of every process, in the order of ranks."""
    if world() == 1:
        return [number]
    return _told("a number of each", number)


def from_rank(tensors: Sequence[Tensor], owner: int) -> list[Tensor]:
    """One process's tensors, in every process; of one dtype.

    Args:
        tensors: the owner's; in the others any of the same shapes, for their devices.
        owner: its rank.
    """
    if world() == 1:
        return list(tensors)
    flat = torch.cat([t.detach().reshape(-1).to(_device()) for t in tensors])
    what = f"{flat.numel()} {flat.dtype} from process {owner}"
    _exchange(what, lambda: _collectives.broadcast(flat, owner))
    parts = flat.split([t.numel() for t in tensors])
    return [p.reshape(t.shape).to(t.device) for p, t in zip(parts, tensors, strict=True)]


def exchanged(mine: Mapping[K, T]) -> dict[K, T]:
    """What every process computed, by name, in every process; of data on the CPU."""
    if world() == 1:
        return dict(mine)
    found: list[Any] = [None] * world()
    _exchange("what each computed", lambda: _collectives.all_gather_object(found, dict(mine)))
    return {name: value for part in found for name, value in part.items()}


def from_first(item: T) -> T:
    """The first process's item, in every process; of data on the CPU."""
    if world() == 1:
        return item
    box: list[Any] = [item]
    _exchange("a decision", lambda: _collectives.broadcast_object_list(box, 0, device=_device()))
    return cast("T", box[0])


def decided(work: Callable[[], R]) -> R:
    """What ``work`` returns in the first process, in every process; the others do not run it.

    Raises:
        EigenDamageError: in every process what it raised in the first.
    """
    if world() == 1:
        return work()
    outcome: tuple[Any, EigenDamageError | None] = (None, None)
    if rank() == 0:
        try:
            outcome = (work(), None)
        except EigenDamageError as error:
            outcome = (None, error)
    found, error = from_first(outcome)
    if error is not None:
        raise error
    return cast("R", found)


def with_first_state(model: nn.Module) -> None:
    """Give a model the first process's parameters and buffers, in place.

    Raises:
        MismatchError: if the models are not of one form.
    """
    if world() == 1:
        return
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    require_same(
        "the models", "; ".join(f"{n} {tuple(t.shape)} {t.dtype}" for n, t in held.items())
    )
    with torch.no_grad():
        for tensor in held.values():
            tensor.copy_(from_rank([tensor], 0)[0])


@contextmanager
def failing_alone(what: str) -> Generator[None]:
    """Where another engine exchanges data: an error ends this process without telling the others.

    To tell them would be an exchange of its own, which the engine's would be mistaken for. They
    fail once this one has gone.

    Raises:
        ProcessError: for any error, where there are several processes.
    """
    try:
        yield
    except Exception as error:
        if world() == 1 or isinstance(error, ProcessError):
            raise
        raise ProcessError(
            f"{what} failed in process {rank()} of {world()}: {error}. If that is a lost "
            f"connection, another process has failed before; its own error says why. Mend that and "
            f"start all of them again"
        ) from error


def require_same(what: str, value: object) -> None:
    """Refuse to go on with something that is not the same in all processes.

    Args:
        what: its name, in the plural, for the message.
        value: anything whose ``repr`` tells it apart.

    Raises:
        MismatchError: if it differs; in every process.
    """
    if world() == 1:
        return
    found = _told(what, zlib.crc32(repr(value).encode()))
    odd = [k for k, mark in enumerate(found) if mark != found[0]]
    if odd:
        raise MismatchError(
            f"{what} of process {odd[0]} are not those of process 0, but all processes compute one "
            f"result: give each the same model, options, seed and data in the same order (the "
            f"library deals the batches out itself)"
        )


def mark_of(tensors: Iterable[Tensor]) -> list[tuple[object, ...]]:
    """Shapes, dtypes and checksums, for `require_same`; nothing in a single process."""
    if world() == 1:
        return []
    return [
        (
            tuple(t.shape),
            t.dtype,
            zlib.crc32(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data),
        )
        for t in tensors
    ]


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    """Where tensors have to be for the group's exchanges."""
    if dist.get_backend() == dist.Backend.NCCL:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _exchange(what: str, collective: Callable[[], object]) -> None:
    """One exchange of data, once it is certain that all processes are there for the same one."""
    _told(what)
    _guarded(collective)


def _told(what: str, number: int = 0) -> list[int]:
    """A number of every process, which by that is known to be well and at the same exchange.

    Raises:
        ProcessError: where one has failed, or is at something else; in all the others.
    """
    mark = zlib.crc32(what.encode())
    told = _status(_FINE, mark, number)
    failed = [k for k, (fate, _, _) in enumerate(told) if fate == _FAILED]
    if failed:
        raise ProcessError(
            f"process {failed[0]} of {world()} failed, so that the others cannot go on; its own "
            f"error says why. Mend that and start all of them again"
        )
    odd = [k for k, (_, other, _) in enumerate(told) if other != mark]
    if odd:
        raise ProcessError(
            f"process {rank()} is at '{what}' and process {odd[0]} is not: the processes are out "
            f"of step. Give each the same model, options and data, and let all make the same calls"
        )
    return [found for _, _, found in told]


def _tell_failure() -> None:
    with suppress(ProcessError):  # nobody may be left to be told
        _status(_FAILED, 0, 0)


def _status(fate: int, mark: int, number: int) -> list[tuple[int, int, int]]:
    mine = torch.tensor([fate, mark, number], dtype=torch.int64, device=_device())
    found = [torch.empty_like(mine) for _ in range(world())]
    _guarded(lambda: _collectives.all_gather(found, mine))
    return [(int(each[0]), int(each[1]), int(each[2])) for each in found]


def _guarded(collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProcessError(
            f"another of the {world()} processes ended or did not answer in time ({reason}). What "
            f"it printed last says why; mend that and start all of them again"
        ) from error
