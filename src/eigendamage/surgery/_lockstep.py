"""Running two networks layer by layer, so that one can be changed between its layers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.calls import call, cannot_run, device_of
from eigendamage.errors import LayerError
from eigendamage.layers import LayerTrace, Trace, evaluating, preserved_random_state
from eigendamage.surgery._passes import Passed, Run, Twins, end_all, keep, until, wait, watched

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
        others: what else goes into the sum that the layer's output goes into, in the student and
            in the teacher; None where that is not known.
        counted: which of the batch's tokens count; None where all do.
    """

    part: int
    x: Tensor
    y: Tensor
    others: tuple[Tensor, Tensor] | None = None
    counted: Tensor | None = None


Steps = Generator[tuple[str, Iterator[Pair]]]
"""For each layer in order its dotted path, and a pair for each batch, part by part.

A layer's pairs are to be used one at a time: tensors may be overwritten once the next is asked for.
When the next layer is asked for, the student goes on with the weights that it has then.
"""


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
        LayerError: if a layer does not run, fails, runs twice or out of turn on some batch.
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
    runs: list[tuple[int, Tensor | None, Run, Run]] = []
    with watched(twins, twins.layers, keep, wait):
        try:
            for part, batch in twins.batches():
                student = Run(_forward(twins.student, batch, same))
                teacher = Run(_forward(twins.teacher, batch, same))
                runs.append((part, batch.counted, student, teacher))
            for name in twins.layers:
                pairs = (
                    _pair(twins, name, part, counted, s.to(name), t.to(name))
                    for part, counted, s, t in runs
                )
                yield name, pairs
                for _ in pairs:  # those that were not asked for have to get there as well
                    pass
        finally:
            end_all([run for _, _, *both in runs for run in both])


def anew(twins: Twins) -> Steps:
    """Every batch runs again for each layer, up to that layer. One batch is in memory."""
    same = _surroundings(device_of(twins.teacher))
    for name in twins.layers:
        yield name, _pairs_anew(twins, name, same)


def _pairs_anew(
    twins: Twins, name: str, same: Callable[[], AbstractContextManager[None]]
) -> Iterator[Pair]:
    for part, batch in twins.batches():
        student = until(twins, name, _forward(twins.student, batch, same))
        teacher = until(twins, name, _forward(twins.teacher, batch, same))
        yield _pair(twins, name, part, batch.counted, student, teacher)


def _pair(
    twins: Twins,
    name: str,
    part: int,
    counted: Tensor | None,
    student: Passed,
    teacher: Passed,
) -> Pair:
    """What both networks showed.

    Raises:
        LayerError: if what the layer's output is added to was not there on this batch.
    """
    if name not in twins.sums:
        return Pair(part, student.tensor, teacher.tensor, counted=counted)
    if student.other is None or teacher.other is None:
        raise LayerError(
            name,
            f"on some batch '{twins.sums[name].other.module}' did not run before it, though it did "
            f"on the first; which layers run must be the same for all inputs. Leave it out of "
            f"layers=",
        )
    return Pair(part, student.tensor, teacher.tensor, (student.other, teacher.other), counted)


def _forward(
    model: nn.Module, batch: Batch, same: Callable[[], AbstractContextManager[None]]
) -> Callable[[], None]:
    def forward() -> None:
        try:
            with same():
                call(model, batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise cannot_run(model, batch, error) from error

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
