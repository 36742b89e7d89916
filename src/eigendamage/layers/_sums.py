"""Where what a layer returns is added to something that was there before the layer ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from eigendamage.batches import Batch, first_call, tensors_in
from eigendamage.layers._trace import evaluating, preserved_random_state

_EXAMPLES = 1
_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_NOTHING_IN_EVAL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


@dataclass(frozen=True)
class Port:
    """A tensor of a forward pass, by the module that reads it first or returns it.

    Attributes:
        module: its dotted path. It runs once.
        side: whether the tensor is the module's first input or its output.
    """

    module: str
    side: Literal["input", "output"]

    def watch(self, model: nn.Module, seen: Callable[[Tensor], None]) -> Any:
        """Have told the tensor of every forward pass; returns the handle of the hook."""
        module = model.get_submodule(self.module)
        if self.side == "output":

            def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
                seen(output)

            return module.register_forward_hook(after)

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _first_tensor(args, kwargs)
            if x is not None:
                seen(x)

        return module.register_forward_pre_hook(before, with_kwargs=True)


@dataclass(frozen=True)
class Sum:
    """The sum of a layer's output with another tensor, as at the end of a residual block.

    Attributes:
        norm: the dotted path of the batch norm that the output passes before; None if none.
        other: what the other tensor is made of, which is there before the layer runs.
        through: the dotted path of the module, with none of the layers in it, that makes the other
            tensor of it; None if it is the other tensor.
    """

    norm: str | None
    other: Port
    through: str | None = None

    def watch(self, model: nn.Module, seen: Callable[[Tensor], None]) -> Any:
        """Have told the other tensor of every forward pass; returns the handle of the hook."""
        if self.through is None:
            return self.other.watch(model, seen)
        module = model.get_submodule(self.through)
        return self.other.watch(model, lambda x: seen(module(x)))


def find_sums(model: nn.Module, layers: Iterable[str], batch: Batch) -> dict[str, Sum]:
    """The layers whose output goes into a sum and nowhere else, but for a batch norm on the way.

    Seen in one forward pass of one example, in eval mode and without gradients. Sums that are
    not between two tensors of the same shape are not found, nor are those whose other tensor no
    module reads or returns before the layer runs, or makes alone of such a tensor.

    Args:
        model: the network, left as it was.
        layers: dotted paths of layers that run once.
        batch: some inputs.

    Raises:
        DataError: if the model cannot run on the batch.
    """
    watch = _Watch(frozenset(layers))
    handles: list[Any] = []
    try:
        for path, module in model.named_modules():
            if path:
                handles += watch.over(path, module)
        with preserved_random_state(), evaluating(model), torch.no_grad(), watch:
            watch.returned(first_call(model, batch.few(_EXAMPLES)))
    finally:
        for handle in handles:
            handle.remove()
    return watch.found()


@dataclass(frozen=True)
class _Noted:
    """A port, with when its tensor was seen first and which version of it that was."""

    port: Port
    time: int
    version: int


@dataclass(frozen=True)
class _Branch:
    """A tensor that is a layer's output, or made of it in eval mode by a batch norm alone.

    Attributes:
        layer: the layer.
        started: when the layer began to run.
        norm: the batch norm.
        tensors: ids of the output, and of what was made of it up to here.
    """

    layer: str
    started: int
    norm: str | None = None
    tensors: tuple[int, ...] = ()


@dataclass(eq=False)
class _Watch(TorchFunctionMode):
    """Follows tensors by their identity through modules and functions."""

    layers: frozenset[str]
    time: int = 0
    calls: Counter[str] = field(default_factory=Counter[str])
    starts: dict[str, int] = field(default_factory=dict[str, int])
    ports: dict[int, _Noted] = field(default_factory=dict[int, _Noted])
    only_inputs: dict[str, _Noted] = field(default_factory=dict[str, _Noted])
    branches: dict[int, _Branch] = field(default_factory=dict[int, _Branch])
    uses: Counter[int] = field(default_factory=Counter[int])
    sums: list[tuple[str, Sum, _Branch]] = field(default_factory=list[tuple[str, Sum, _Branch]])
    alive: list[Tensor] = field(default_factory=list[Tensor])  # so that ids stay theirs

    def __post_init__(self) -> None:
        super().__init__()
        parts = (layer.split(".") for layer in self.layers)
        self._holding_layers = {".".join(p[:n]) for p in parts for n in range(1, len(p) + 1)}

    def over(self, path: str, module: nn.Module) -> list[Any]:
        """Watch what a module reads and returns."""

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.time += 1
            self.calls[path] += 1
            self.starts[path] = self.time
            x = _first_tensor(args, kwargs)
            if x is not None:
                self._note(x, Port(path, "input"))
                if len(args) == 1 and not kwargs and path not in self._holding_layers:
                    self.only_inputs[path] = self.ports[id(x)]

        def after(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            self.time += 1
            if not isinstance(output, Tensor):
                return
            x = _first_tensor(args, kwargs)
            read = self.only_inputs.get(path)
            if read is not None and x is not None and read.version != _version(x):
                del self.only_inputs[path]  # it writes over its input
            self._note(output, Port(path, "output"))
            if path in self.layers:
                started = self.starts[path]
                self.branches[id(output)] = _Branch(path, started, tensors=(id(output),))
                return
            branch = None if x is None or x is output else self.branches.get(id(x))
            if branch is not None and branch.norm is None and _is_affine(module):
                made = (*branch.tensors, id(output))
                self.branches[id(output)] = replace(branch, norm=path, tensors=made)
            elif branch is not None and isinstance(module, _NOTHING_IN_EVAL):
                made = (*branch.tensors, id(output))
                self.branches[id(output)] = replace(branch, tensors=made)

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    def _note(self, tensor: Tensor, port: Port) -> None:
        version = _version(tensor)
        known = self.ports.get(id(tensor))
        if known is None or known.version != version:  # changed in place, it is another one
            self.ports[id(tensor)] = _Noted(port, self.time, version)
            self.alive.append(tensor)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function, and see what it does with the tensors that are followed."""
        options = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ADDITIONS and len(args) == 2 and not options:
            self._added(*args)
        read = [v for v in tree_leaves((args, options)) if isinstance(v, Tensor)]
        versions = [_version(v) for v in read]
        result = func(*args, **options)
        makes_tensors = any(isinstance(v, Tensor) for v in tree_leaves(result))
        for tensor, version in zip(read, versions, strict=True):
            changed = _version(tensor) != version
            if makes_tensors and name != "__get__" and (changed or tensor is not result):
                self._used(tensor)
            if changed:  # what is read of it from now on is not the layer's output
                self.branches.pop(id(tensor), None)
        return result

    def _used(self, tensor: Tensor) -> None:
        if id(tensor) in self.branches:
            self.uses[id(tensor)] += 1

    def _added(self, a: Any, b: Any) -> None:
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape):
            return
        for mine, other in ((a, b), (b, a)):
            branch, noted = self.branches.get(id(mine)), self.ports.get(id(other))
            if branch is None or noted is None or mine is other:
                continue
            if noted.version != _version(other):
                continue
            source = self.only_inputs.get(noted.port.module)
            if noted.time <= branch.started:
                self.sums.append((branch.layer, Sum(branch.norm, noted.port), branch))
            elif noted.port.side == "output" and source and source.time <= branch.started:
                found = Sum(branch.norm, source.port, through=noted.port.module)
                self.sums.append((branch.layer, found, branch))

    def returned(self, output: Any) -> None:
        """What the model returns is read by whoever called it."""
        for tensor in tensors_in(output):
            self._used(tensor)

    def found(self) -> dict[str, Sum]:
        """Of layers and ports that run once, the sums that are all that is made of the output."""
        return {
            layer: found
            for layer, found, branch in self.sums
            if all(self.uses[tensor] == 1 for tensor in branch.tensors)
            and all(self.calls[n] == 1 for n in (layer, found.other.module, found.through) if n)
        }


def _is_affine(module: nn.Module) -> bool:
    """Whether it is a batch norm that scales and shifts each channel by numbers that stay."""
    return isinstance(module, _NORMS) and module.running_var is not None


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


def _version(tensor: Tensor) -> int:
    """How often it was changed in place; of tensors of inference mode nobody knows."""
    return 0 if tensor.is_inference() else tensor._version
