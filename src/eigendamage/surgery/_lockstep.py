"""Running two networks layer by layer, so that one can be changed between its layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eigendamage.batches import Batch, call, device_of
from eigendamage.errors import LayerError
from eigendamage.layers import LayerTrace, Trace, evaluating, preserved_random_state

# What a thread of its own costs each network for each batch: its stack and torch's workspaces.
_THREAD_BYTES = 8 * 2**20
# Beside a layer's input and output, branches and what lies between layers may be alive, and memory
# that one thread has let go is not always used again by the others.
_ALIVE = 4


class Pair(NamedTuple):
    """What one layer saw of one batch.

    Attributes:
        part: which part of the data the batch belongs to.
        x: the input of the student's layer.
        y: the output of the teacher's layer.
    """

    part: int
    x: Tensor
    y: Tensor


Steps = Generator[tuple[str, Iterator[Pair]]]
"""For each layer in order its dotted path, and a pair for each batch, part by part.

A layer's pairs are to be used one at a time: tensors may be overwritten once the next is asked for.
When the next layer is asked for, the student goes on with the weights that it has then.
"""


@dataclass(frozen=True, eq=False)
class Twins:
    """Two networks with layers of the same names, and the data that both are run on.

    Attributes:
        student: the network whose layers' inputs are looked at. It may be changed meanwhile.
        teacher: the network whose layers' outputs are looked at.
        layers: dotted paths of layers that run once in both, in the order in which they do.
        parts: the data in parts, each of which can be gone through several times.
    """

    student: nn.Module
    teacher: nn.Module
    layers: Sequence[str]
    parts: Sequence[Iterable[Batch]]

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """All batches, each with the number of its part."""
        for part, batches in enumerate(self.parts):
            for batch in batches:
                yield part, batch


def lockstep(twins: Twins, traces: Sequence[Trace], max_memory: int) -> Steps:
    """Go through the layers of both networks on all data, in whichever way fits in memory.

    Both networks run in eval mode, without gradients and under the caller's autocast. When the
    generator ends, is closed or fails, their modes, hooks and the random state are as they were.

    Args:
        twins: the networks and the data.
        traces: one of each network, for the estimate of the memory that they need.
        max_memory: bytes that may be held by forward passes that wait; what would need more runs
            anew for each layer.

    Raises:
        LayerError: if a layer does not run, runs twice or out of turn on some batch.
    """
    strategy = together if held_bytes(twins, traces) <= max_memory else anew
    with ExitStack() as stack:
        stack.enter_context(preserved_random_state())
        stack.enter_context(evaluating(twins.student))
        stack.enter_context(evaluating(twins.teacher))
        yield from stack.enter_context(closing(strategy(twins)))


def held_bytes(twins: Twins, traces: Sequence[Trace]) -> int:
    """About how much memory `together` holds at once, rather too much than too little.

    Of each network and example four times what its largest layer reads and returns. The data is not
    counted; a network that keeps many activations for later, as a U-Net does, holds more.
    """
    sizes = [batch.size for _, batch in twins.batches()]
    largest = sum(max(map(_elements, t.layers.values()), default=0) for t in traces)
    width = max((p.element_size() for p in twins.teacher.parameters()), default=4)
    return round(_ALIVE * sum(sizes) * largest * width) + 2 * len(sizes) * _THREAD_BYTES


def _elements(layer: LayerTrace) -> float:
    """Numbers in what the layer reads and returns of one example."""
    shape = layer.shape
    return shape.inputs * shape.positions_in + shape.outputs * shape.positions_out


def together(twins: Twins) -> Steps:
    """Each batch runs once: its forward passes wait, in threads of their own, at every layer.

    Only one thread runs at a time. All batches' live activations are in memory.
    """
    same = _surroundings(device_of(twins.teacher))
    runs: list[tuple[int, _Run, _Run]] = []
    with _hooks(twins, twins.layers, _wait):
        try:
            for part, batch in twins.batches():
                student = _Run(_forward(twins.student, batch, same))
                teacher = _Run(_forward(twins.teacher, batch, same))
                runs.append((part, student, teacher))
            for name in twins.layers:
                pairs = (Pair(part, s.to(name), t.to(name)) for part, s, t in runs)
                yield name, pairs
                for _ in pairs:  # those that were not asked for have to get there as well
                    pass
        finally:
            _end([run for _, *both in runs for run in both])


def anew(twins: Twins) -> Steps:
    """Every batch runs again for each layer, up to that layer. One batch is in memory."""
    same = _surroundings(device_of(twins.teacher))
    for name in twins.layers:
        yield name, _pairs_anew(twins, name, same)


def _pairs_anew(
    twins: Twins, name: str, same: Callable[[], AbstractContextManager[None]]
) -> Iterator[Pair]:
    for part, batch in twins.batches():
        x = _until(twins, name, _forward(twins.student, batch, same))
        y = _until(twins, name, _forward(twins.teacher, batch, same))
        yield Pair(part, x, y)


def _forward(
    model: nn.Module, batch: Batch, same: Callable[[], AbstractContextManager[None]]
) -> Callable[[], None]:
    def forward() -> None:
        with same():
            call(model, batch)

    return forward


def _surroundings(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """What a thread does not inherit: no gradients, the caller's autocast and CUDA stream."""
    kind = device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    @contextmanager
    def same() -> Generator[None]:
        # A cached cast would outlive the change of the weight that it is of.
        autocast = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
        with torch.no_grad(), torch.cuda.stream(stream), autocast:
            yield

    return same


@contextmanager
def _hooks(
    twins: Twins, names: Iterable[str], arrived: Callable[[str, Tensor], None]
) -> Generator[None]:
    """Have told what the student's layers are about to read and what the teacher's returned."""

    def before(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arrived(name, args[0] if args else kwargs["input"])

        return hook

    def after(name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            arrived(name, output)

        return hook

    handles: list[Any] = []
    try:
        for name in names:
            student, teacher = twins.student.get_submodule(name), twins.teacher.get_submodule(name)
            handles.append(student.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(teacher.register_forward_hook(after(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Ended(BaseException):
    """Ends a forward pass that is not needed any more, past any ``except Exception``."""


class _Arrived(BaseException):
    """Carries a tensor out of a forward pass, and ends it."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


def _stop(_name: str, tensor: Tensor) -> None:
    raise _Arrived(tensor)


def _until(twins: Twins, name: str, forward: Callable[[], None]) -> Tensor:
    """What the layer reads or returns in a forward pass, which ends there."""
    try:
        with _hooks(twins, [name], _stop):
            forward()
    except _Arrived as arrived:
        return arrived.tensor
    raise _missing(name)


def _missing(name: str) -> LayerError:
    return LayerError(
        name,
        "it did not run on some batch, though it did on the first; which layers run must be the "
        "same for all inputs. Leave it out of layers=",
    )


def _wait(name: str, tensor: Tensor) -> None:
    thread = threading.current_thread()
    if isinstance(thread, _Run):  # not the caller's own use of the networks meanwhile
        thread.pause(name, tensor)


class _Run(threading.Thread):
    """A forward pass that stands still at every layer until it is told to go on."""

    def __init__(self, forward: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._forward = forward
        self._go = threading.Semaphore(0)
        self._still = threading.Semaphore(0)
        self._at: tuple[str, Tensor] | None = None
        self._error: BaseException | None = None
        self._unwanted = False
        self._over = False

    def run(self) -> None:
        """Run the forward pass, from the first time that it is told to go on."""
        try:
            self._resume_later()
            self._forward()
        except _Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - `to` raises it where it can be caught
            self._error = error
        self._over = True
        self._still.release()

    def pause(self, name: str, tensor: Tensor) -> None:
        """In the thread: hand over a tensor and stand still."""
        self._at = (name, tensor)
        self._still.release()
        self._resume_later()

    def _resume_later(self) -> None:
        self._go.acquire()
        self._at = None
        if self._unwanted:
            raise _Ended

    def to(self, name: str) -> Tensor:
        """From outside: go on to the next layer, and what it reads or returned there.

        Raises:
            LayerError: if that is not the layer of that name.
        """
        if self.ident is None:
            self.start()
        if not self._over:
            self._go.release()
            self._still.acquire()
        if self._error is not None:
            raise self._error
        if self._at is None:
            raise _missing(name)
        found, tensor = self._at
        if found != name:
            raise LayerError(
                found,
                f"it ran where layer '{name}' was expected; layers must run once, in the same "
                f"order in both networks and on all batches. Leave it out of layers=",
            )
        return tensor

    def let_go(self) -> None:
        """From outside: end the pass at its next layer, if it gets there."""
        self._unwanted = True
        self._go.release()


def _end(runs: Sequence[_Run]) -> None:
    """End all passes that began, and wait for it."""
    begun = [run for run in runs if run.ident is not None]
    for run in begun:
        run.let_go()
    for run in begun:
        run.join()
