"""Neurons and heads: channels between Linear layers, by which numbers depend on which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eigendamage.batch import Batch
from eigendamage.calls import call
from eigendamage.layers._channel_graph import ChannelGroup, Member
from eigendamage.layers._factored import FactoredLinear

_SEED = 0
_MOST_UNITS = 1024
"""Units that are told apart one at a time; of more, the layers are taken to be mixed."""


@dataclass(frozen=True)
class _Unit:
    """Channels that depend on one another and on nothing else.

    Attributes:
        rows: for each layer that makes them, by dotted path, outputs.
        columns: inputs of the layer that reads them.
    """

    rows: Mapping[str, tuple[int, ...]]
    columns: tuple[int, ...]


def find_linear_groups(base: nn.Module, batch: Batch) -> dict[str, ChannelGroup]:
    """Candidates for groups of channels that Linear layers make and one Linear layer reads.

    Such are the neurons of a transformer's MLP, gated or not, and the heads of its attention:
    every query head with the keys and values that it shares with others, from separate layers or
    one fused layer, in any order. No name, class or attribute of the model is looked at. Instead
    every Linear layer is made to return random numbers that depend on nothing before, so that what
    a layer reads depends on the layers right before it alone; the gradients then tell which of
    its inputs depends on which of their outputs. Outputs and inputs that hang together are a unit;
    a norm over channels makes one unit of all, and no group.

    A layer's outputs may be read elsewhere, too, or be counted by an attribute that says how to
    reshape them: nothing here is proven.

    Cost: one forward pass, and for each reader 2 log₂(inputs) gradients through what lies right
    before it, or about 6 for each head.

    Args:
        base: a model in eval mode without hooks; it is left as it was. Random states are not
            preserved.
        batch: what to run it on.

    Returns:
        The groups of two units or more by the dotted path of their first producer; none if the
        model does not run on random numbers.
    """
    cut = _Cut(base)
    try:
        # The plain form of attention is the one that can be differentiated twice.
        with cut, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            call(base, batch)
    except Exception:  # noqa: BLE001 - random numbers may be refused by anything in a user's model
        return {}
    return cut.groups()


@dataclass(eq=False)
class _Cut:
    """While entered, Linear layers return random leaves, and what they read is looked at.

    Attributes:
        model: the model.
    """

    model: nn.Module
    _leaves: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _readers: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _units: dict[str, list[_Unit]] = field(default_factory=dict[str, list[_Unit]])
    _again: set[str] = field(default_factory=set[str])
    _undo: list[Any] = field(default_factory=list[Any])

    def __enter__(self) -> None:
        self._generator = torch.Generator().manual_seed(_SEED)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
            self._undo.append(lambda p=parameter: p.requires_grad_(True))
        for path, module in _linears(self.model):
            for handle in (
                module.register_forward_pre_hook(self._reads(path), with_kwargs=True),
                module.register_forward_hook(self._returns(path)),
            ):
                self._undo.append(handle.remove)

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()

    def groups(self) -> dict[str, ChannelGroup]:
        """What was found out about layers that ran once and are read by one layer."""
        order = list(self._leaves)
        found: dict[str, ChannelGroup] = {}
        for reader, units in self._units.items():
            alike: dict[tuple[Any, ...], list[_Unit]] = defaultdict(list)
            for unit in units:
                signature = (len(unit.columns), *((p, len(r)) for p, r in unit.rows.items()))
                alike[signature].append(unit)
            for same in alike.values():
                makers = sorted(same[0].rows, key=order.index)
                private = all(self._readers[path] == [reader] for path in makers)
                names = [path for path in makers if path not in found]
                if len(same) < 2 or not private or not names or self._again & {reader, *makers}:
                    continue
                found[names[0]] = ChannelGroup(
                    size=len(same),
                    producers=tuple(
                        Member(module=path, indices=tuple(unit.rows[path] for unit in same))
                        for path in makers
                    ),
                    carriers=(),
                    readers=(Member(module=reader, indices=tuple(u.columns for u in same)),),
                )
        return found

    def _reads(self, path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            if not x.requires_grad:
                return
            reached = _reached(x, self._leaves, self._random(x))
            fresh = not any(self._readers[maker] for maker in reached)
            for maker in reached:
                self._readers[maker].append(path)
            if fresh and reached:
                leaves = {maker: self._leaves[maker] for maker in reached}
                self._units[path] = list(_units(x, leaves, self._random(x)))

        return hook

    def _returns(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            if path in self._leaves:
                self._again.add(path)
            self._leaves[path] = self._random(output).requires_grad_()
            # A leaf must not be written to, which what follows may do.
            return self._leaves[path].clone()

        return hook

    def _random(self, like: Tensor) -> Tensor:
        numbers = torch.randn(like.shape, generator=self._generator, dtype=torch.float32)
        numbers[:1].abs_()  # of few tokens a ReLU might let none through
        return numbers.to(like)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, dense or factored, without the stages of the latter."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            inside.update(map(id, module))
            yield path, module
        elif isinstance(module, nn.Linear) and id(module) not in inside:
            yield path, module


def _reached(x: Tensor, leaves: Mapping[str, Tensor], weights: Tensor) -> list[str]:
    """The leaves that a tensor depends on."""
    grads = torch.autograd.grad(
        x, list(leaves.values()), weights, retain_graph=True, allow_unused=True
    )
    reached: list[str] = []
    for path, grad in zip(leaves, grads, strict=True):
        if grad is not None and bool(grad.any()):  # pyright: ignore[reportUnnecessaryComparison]
            reached.append(path)
    return reached


def _units(x: Tensor, leaves: Mapping[str, Tensor], weights: Tensor) -> Iterator[_Unit]:
    """The units of what one layer reads.

    Args:
        x: (…, columns), what the layer reads.
        leaves: (…, rows) each, what that depends on.
        weights: of x in the sums whose gradients are taken.
    """
    probe = _Probe(x, leaves, weights)
    singles = _singles(probe, x.shape[-1])
    if singles is not None:
        yield from singles
        return
    left = torch.ones(x.shape[-1], dtype=torch.bool, device=x.device)
    for _ in range(_MOST_UNITS):
        if not bool(left.any()):
            return
        columns = torch.zeros_like(left)
        columns[int(left.nonzero()[0])] = True
        while True:
            rows = probe.rows(columns)
            more = probe.columns(rows) | columns
            if bool((more == columns).all()):
                break
            columns = more
        left &= ~columns
        reading = {path: _indices(mine) for path, mine in rows.items() if bool(mine.any())}
        if reading:
            yield _Unit(reading, _indices(columns))


def _singles(probe: _Probe, width: int) -> list[_Unit] | None:
    """The units if no row acts on two columns, as in an MLP; None if one does.

    The columns are halved by each bit of their number in turn. A row that acts on one column is
    seen in one half of each, which spells the column's number.
    """
    number = torch.arange(width, device=probe.device)
    column_of: dict[str, Tensor] = {}
    live: dict[str, Tensor] = {}
    for bit in range(max(1, (width - 1).bit_length())):
        ones, zeros = (probe.rows((number >> bit & 1) == half) for half in (1, 0))
        for path, one in ones.items():
            if bool((one & zeros[path]).any()):
                return None
            live[path] = one | zeros[path]
            column_of[path] = column_of.get(path, torch.zeros_like(one).long()) + (
                one.long() << bit
            )
    rows: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for path, columns in column_of.items():
        for row in _indices(live[path]):
            rows[int(columns[row])][path].append(row)
    return [
        _Unit({path: tuple(mine) for path, mine in rows[column].items()}, (column,))
        for column in sorted(rows)
    ]


class _Probe:
    """Which outputs of some layers and which inputs of another act on one another.

    Args:
        x: (…, columns), what the other layer reads.
        leaves: (…, rows) each, what the layers return, by dotted path.
        weights: of x in the sums whose gradients are taken.
    """

    def __init__(self, x: Tensor, leaves: Mapping[str, Tensor], weights: Tensor) -> None:
        self.device = x.device
        self._x = x
        self._leaves = leaves
        self._weights = weights
        self._twice: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def rows(self, columns: Bool[Tensor, " columns"]) -> dict[str, Bool[Tensor, " _"]]:
        """By layer, the outputs that act on some of these inputs."""
        grads = torch.autograd.grad(
            self._x, list(self._leaves.values()), self._weights * columns, retain_graph=True
        )
        return {path: _support(g) for path, g in zip(self._leaves, grads, strict=True)}

    def columns(self, rows: Mapping[str, Bool[Tensor, " _"]]) -> Bool[Tensor, " columns"]:
        """The inputs that some of these outputs act on, by the gradient of a gradient."""
        if self._twice is None:
            weights = self._weights.clone().requires_grad_()
            grads = torch.autograd.grad(
                self._x, list(self._leaves.values()), weights, create_graph=True
            )
            self._twice = weights, grads
        weights, grads = self._twice
        directions = [
            torch.randn_like(grad) * mine for grad, mine in zip(grads, rows.values(), strict=True)
        ]
        acting = [(g, d) for g, d in zip(grads, directions, strict=True) if g.requires_grad]
        (found,) = torch.autograd.grad(
            [g for g, _ in acting], weights, [d for _, d in acting], retain_graph=True
        )
        return _support(found)


def _support(grad: Tensor) -> Bool[Tensor, " _"]:
    """The channels (of the last axis) in which something is not zero."""
    return (grad != 0).reshape(-1, grad.shape[-1]).any(0)


def _indices(mask: Bool[Tensor, " _"]) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())
