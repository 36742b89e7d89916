"""Which channels hang together, from torch-pruning's dependency graph (Fang et al. 2023, DepGraph).

All that is known of torch-pruning is in this file, its faults included: it traces only parameters
that need gradients, changes the model's mode, prints and warns, crashes on some models and may run
for ever on others. It is given a copy to spoil and a thread that can be stopped. Only its graph is
used. What follows from it is not trusted here or elsewhere, but proven by removing channels.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from torch import nn

from eigendamage.batch import Batch
from eigendamage.calls import call, output_tensors
from eigendamage.errors import ChannelError

_STOP_S = 5.0

T = TypeVar("T")


class Place(NamedTuple):
    """A side of a module, or a parameter outside any known layer, by dotted path.

    What passes channels on (a norm, say) has only its side ``out``.
    """

    path: str
    side: Literal["out", "in"]


@dataclass(frozen=True)
class Coupling:
    """Channels that can only go together.

    Attributes:
        root: the layer whose outputs the search started from.
        places: for each place the channels of each unit; every unit has equally many.
        is_output: whether they are the last axis but the batch of what the model returns.
        traceable: whether every channel could be followed back to the root.
    """

    root: str
    places: Mapping[Place, tuple[tuple[int, ...], ...]]
    is_output: bool
    traceable: bool


class _Index(NamedTuple):
    """A channel here and the root's channel that it goes with, under torch-pruning's names."""

    idx: int
    root_idx: int


class _TimeUp(BaseException):
    """Raised inside the worker; not an Exception, so that no handler on the way swallows it."""


def find_couplings(
    copy: nn.Module, batch: Batch, roots: Iterable[str], *, limit_s: float
) -> list[Coupling]:
    """All channels that hang together with the outputs of the given layers.

    Args:
        copy: a copy of the model without hooks, in eval mode, whose floating-point parameters all
            need gradients. It is to be thrown away.
        batch: what to run it on.
        roots: dotted paths of Linear and Conv2d layers, in the order to start from them.
        limit_s: seconds after which it is stopped.

    Raises:
        ChannelError: if torch-pruning fails or takes longer.
    """
    name = type(copy).__name__
    advice = 'method="eigendamage" needs no groups of channels'
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch_pruning(\.|$)")
        try:
            return _within(limit_s, lambda: _couplings(_build(copy, batch), copy, roots))
        except TimeoutError:
            raise ChannelError(
                f"finding which channels of {name} go together took over {limit_s:g} s and was "
                f"stopped (torch-pruning's graph). Prune differently: {advice}"
            ) from None
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            raise ChannelError(
                f"torch-pruning cannot tell which channels of {name} go together: "
                f"{type(error).__name__}: {said}. Prune differently: {advice}"
            ) from error


def _within(limit_s: float, work: Callable[[], T]) -> T:
    """What ``work`` returns or raises; it runs in a thread that is stopped after ``limit_s``."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - handed on to the caller
            errors.append(error)

    worker = threading.Thread(target=run, name="eigendamage-channels", daemon=True)
    worker.start()
    worker.join(limit_s)
    if worker.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(worker.ident or 0), ctypes.py_object(_TimeUp)
        )
        worker.join(_STOP_S)
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


def _build(copy: nn.Module, batch: Batch) -> Any:
    """torch-pruning's graph; the one place that calls it."""
    pruning = importlib.import_module("torch_pruning")

    def differentiable(output: Any) -> list[Any]:
        return [t for t in output_tensors(output) if t.grad_fn is not None]

    return pruning.DependencyGraph().build_dependency(
        copy,
        example_inputs=batch,
        forward_fn=call,
        output_transform=differentiable,
        verbose=False,
    )


def _couplings(graph: Any, copy: nn.Module, roots: Iterable[str]) -> list[Coupling]:
    paths = {id(module): path for path, module in copy.named_modules()}
    paths.update({id(parameter): path for path, parameter in copy.named_parameters()})
    # No tensor has more channels than all layers together; what is beyond goes in circles.
    most = sum(max(p.shape, default=0) for p in copy.parameters())
    found: list[Coupling] = []
    done: set[tuple[str, int]] = set()
    for root in roots:
        node = graph.module2node.get(copy.get_submodule(root))
        if node is None:
            continue
        width = int(graph.get_out_channels(node))
        rows = [row for row in range(width) if (root, row) not in done]
        if not rows:
            continue
        for coupling in _coupled(graph, paths, root, node, rows, most):
            found.append(coupling)
            done.update(
                (place.path, channel)
                for place, units in coupling.places.items()
                if place.side == "out"
                for unit in units
                for channel in unit
            )
    return found


def _coupled(
    graph: Any, paths: Mapping[int, str], root: str, node: Any, rows: list[int], most: int
) -> list[Coupling]:
    """What hangs together with some outputs of one layer, split where units are not alike."""
    reached: dict[Place, set[_Index]] = defaultdict(set)
    is_output = False
    closure = _closure(graph, node, rows, most)
    for (target, handler), indices in closure.reached.items():
        is_output |= type(target.module).__name__ == "_OutputOp"
        if id(target.module) in paths:
            side = "out" if graph.is_out_channel_pruning_fn(handler) else "in"
            reached[Place(paths[id(target.module)], side)] |= indices
    lost = any(index.root_idx is None for indices in reached.values() for index in indices)  # pyright: ignore[reportUnnecessaryComparison]
    if lost or closure.endless:
        return [Coupling(root, dict.fromkeys(reached, ()), is_output, False)]
    alike: dict[tuple[tuple[Place, int], ...], list[dict[Place, list[int]]]] = defaultdict(list)
    for unit in _units(rows, reached):
        alike[tuple((p, len(channels)) for p, channels in unit.items())].append(unit)
    return [
        Coupling(
            root,
            {p: tuple(tuple(unit[p]) for unit in units) for p, _ in signature},
            is_output,
            True,
        )
        for signature, units in alike.items()
    ]


class _Closure(NamedTuple):
    """Every (node, pruning function) that was reached, and whether there was no end to it."""

    reached: Mapping[tuple[Any, Any], set[_Index]]
    endless: bool


def _closure(graph: Any, node: Any, rows: list[int], most: int) -> _Closure:
    """Every (node, pruning function) that losing these outputs triggers, with its channels.

    The graph's own search for a group compares whole lists of channels and works out all its
    mappings anew each time, which takes minutes on a DenseNet; this one visits a channel once.
    Where halves of a tensor change places (rotary embeddings) the graph's mappings shift channels
    further with every round, for ever: an index above ``most`` ends the search.
    """
    start = graph.get_pruner_of_module(node.module).prune_out_channels
    seen: dict[tuple[Any, Any], set[_Index]] = defaultdict(set)
    stack: list[tuple[Any, Any, list[Any]]] = [(node, start, [_Index(r, r) for r in rows])]
    while stack:
        at, handler, indices = stack.pop()
        known = seen[at, handler]
        new = [index for index in map(_plain, indices) if index not in known]
        if not new:
            continue
        known.update(new)
        if any(index.idx > most for index in new):
            return _Closure(seen, True)
        for dependency in at.dependencies:
            if dependency.is_triggered_by(handler):
                mapped: list[Any] = new
                for mapping in dependency.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)
                stack.append((dependency.target, dependency.handler, mapped))
    return _Closure(seen, False)


def _plain(index: Any) -> _Index:
    return _Index(index.idx, index.root_idx)


def _units(rows: list[int], reached: Mapping[Place, set[_Index]]) -> list[dict[Place, list[int]]]:
    """The finest units: two of the root's channels that meet in one place are one unit."""
    parent = {row: row for row in rows}

    def top(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for indices in reached.values():
        first: dict[int, int] = {}
        for index in sorted(indices):
            one, other = top(first.setdefault(index.idx, index.root_idx)), top(index.root_idx)
            parent[max(one, other)] = min(one, other)
    units: dict[int, dict[Place, list[int]]] = {row: {} for row in rows if top(row) == row}
    for place in sorted(reached):
        for index in sorted(reached[place]):
            channels = units[top(index.root_idx)].setdefault(place, [])
            if not channels or channels[-1] != index.idx:
                channels.append(index.idx)
    return list(units.values())
