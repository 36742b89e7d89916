"""Forward passes of two networks that hand over what their layers read and return."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eigendamage.batch import Batch
from eigendamage.errors import LayerError
from eigendamage.layers import Sum


@dataclass(frozen=True, eq=False)
class Twins:
    """Two networks with layers of the same names, and the data that both are run on.

    Attributes:
        student: the network whose layers' inputs are looked at. It may be changed meanwhile.
        teacher: the network whose layers' outputs are looked at.
        layers: dotted paths of layers that run once in both, in the order in which they do.
        parts: the data in parts, each of which can be gone through several times.
        sums: for layers whose outputs go into a sum what else goes into it, in both networks.
    """

    student: nn.Module
    teacher: nn.Module
    layers: Sequence[str]
    parts: Sequence[Iterable[Batch]]
    sums: Mapping[str, Sum] = field(default_factory=dict[str, Sum])

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """All batches, each with the number of its part."""
        for part, batches in enumerate(self.parts):
            for batch in batches:
                yield part, batch


@contextmanager
def watched(
    twins: Twins,
    names: Sequence[str],
    passed: Callable[[str, Tensor], None],
    arrived: Callable[[str, Tensor], None],
) -> Generator[None]:
    """Have tensors of all forward passes told.

    Args:
        twins: the networks.
        names: layers.
        passed: told what else goes into the sum that a layer's output goes into.
        arrived: told what the student's layer is about to read and what the teacher's returned.
    """

    def before(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arrived(name, args[0] if args else kwargs["input"])

        return hook

    def after(name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            arrived(name, output)

        return hook

    handles: list[RemovableHandle] = []
    try:
        # First what passes: it may be what the layer itself reads.
        for name in names:
            if name in twins.sums:
                joined, seen = twins.sums[name], partial(passed, name)
                handles += [joined.watch(m, seen) for m in (twins.student, twins.teacher)]
        for name in names:
            student, teacher = twins.student.get_submodule(name), twins.teacher.get_submodule(name)
            handles.append(student.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(teacher.register_forward_hook(after(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Passed(NamedTuple):
    """What was seen of one layer in one forward pass.

    Attributes:
        tensor: what the student's layer is about to read, or what the teacher's returned.
        other: what else goes into the sum that the layer's output goes into, if that is known.
    """

    tensor: Tensor
    other: Tensor | None


class _Ended(BaseException):
    """Ends a forward pass that is not needed any more, past any ``except Exception``."""


class _Arrived(BaseException):
    """Carries a tensor out of a forward pass, and ends it."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


def _stop(_name: str, tensor: Tensor) -> None:
    raise _Arrived(tensor)


def until(twins: Twins, name: str, forward: Callable[[], None]) -> Passed:
    """What the layer reads or returns in a forward pass, which ends there."""
    others: dict[str, Tensor] = {}
    try:
        with watched(twins, [name], others.__setitem__, _stop):
            forward()
    except _Arrived as arrived:
        return Passed(arrived.tensor, others.get(name))
    raise _missing(name)


def _missing(name: str) -> LayerError:
    return LayerError(
        name,
        "it did not run on some batch, though it did on the first; which layers run must be the "
        "same for all inputs. Leave it out of layers=",
    )


def wait(name: str, tensor: Tensor) -> None:
    """In the thread of a run: hand over a tensor, and wait to be told to go on."""
    thread = threading.current_thread()
    if isinstance(thread, Run):  # not the caller's own use of the networks meanwhile
        thread.pause(name, tensor)


def keep(name: str, tensor: Tensor) -> None:
    """In the thread of a run: keep a tensor until the layer of that name is reached."""
    thread = threading.current_thread()
    if isinstance(thread, Run):
        thread.others[name] = tensor


class Run(threading.Thread):
    """A forward pass that stands still at every layer until it is told to go on."""

    def __init__(self, forward: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._forward = forward
        self._go = threading.Semaphore(0)
        self._still = threading.Semaphore(0)
        self._at: tuple[str, Tensor] | None = None
        self.others: dict[str, Tensor] = {}
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

    def to(self, name: str) -> Passed:
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
        return Passed(tensor, self.others.pop(name, None))

    def let_go(self) -> None:
        """From outside: end the pass at its next layer, if it gets there."""
        self._unwanted = True
        self._go.release()


def end_all(runs: Sequence[Run]) -> None:
    """End all passes that began, and wait for it."""
    begun = [run for run in runs if run.ident is not None]
    for run in begun:
        run.let_go()
    for run in begun:
        run.join()
