"""Where what a layer returns is added to something that was there before the layer ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from eigendamage.batch import Batch, tensors_in
from eigendamage.calls import tried_call
from eigendamage.layers._factored import FactoredConv2d
from eigendamage.layers._trace import evaluating, preserved_random_state

_EXAMPLES = 2  # of one, what is the same for all examples looks like what each has of its own
_ADDITIONS = ("aten::add.Tensor", "aten::add_.Tensor")
# Subclasses may do anything.
_NOTHING_IN_EVAL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


@dataclass(frozen=True)
class Port:
    """A tensor of a forward pass, by a module that reads it or returns it.

    Attributes:
        module: its dotted path. It runs once.
        side: whether the tensor is the module's first input or its output.
    """

    module: str
    side: Literal["input", "output"]

    def watch(self, model: nn.Module, seen: Callable[[Tensor], None]) -> RemovableHandle:
        """Have told the tensor of every forward pass."""
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
        through: the dotted path of the module that makes the other tensor of it; None if it is
            the other tensor. It holds none of the layers that were asked for, keeps nothing from
            call to call and returns the same when it is called once more.
    """

    norm: str | None
    other: Port
    through: str | None = None

    def watch(self, model: nn.Module, seen: Callable[[Tensor], None]) -> RemovableHandle:
        """Have told the other tensor of every forward pass, before the layer runs."""
        if self.through is None:
            return self.other.watch(model, seen)
        module = model.get_submodule(self.through)
        return self.other.watch(model, lambda x: seen(module(x)))


def find_sums(model: nn.Module, layers: Iterable[str], batch: Batch) -> dict[str, Sum]:
    """The layers whose output goes into a sum and nowhere else, but for a batch norm on the way.

    Seen in one forward pass of two examples, in eval mode and without gradients. Sums that are
    not between two tensors of the same shape are not found, nor are those whose other tensor no
    module reads or returns before the layer runs, or makes alone of such a tensor. What reads an
    output outside of torch (by ``numpy()``, or out of an attribute after the pass) is not seen.

    Args:
        model: the network, left as it was.
        layers: dotted paths of layers that run once.
        batch: some inputs.

    Raises:
        DataError: if the model cannot run on the batch.
    """
    watch = _Watch(model, frozenset(layers))
    handles: list[RemovableHandle] = []
    with preserved_random_state(), evaluating(model), torch.no_grad():
        try:
            for path, module in model.named_modules():
                if path:
                    handles += watch.over(path, module)
            with watch:
                output = tried_call(model, batch.few(_EXAMPLES))
        finally:
            for handle in handles:
                handle.remove()
        return watch.found(output)


@dataclass(frozen=True)
class _Noted:
    """A port, with when its tensor was seen there and which version of it that was."""

    port: Port
    time: int
    version: int


@dataclass(frozen=True)
class _Branch:
    """A tensor that is a layer's output, or made of it in eval mode by a batch norm alone.

    Attributes:
        layer: the layer.
        convolutional: whether its channels are axis 1 of four; they are the last one otherwise.
        started: when the layer began to run.
        version: of the tensor.
        norm: the batch norm.
        tensors: ids of the output, and of what was made of it up to here.
    """

    layer: str
    convolutional: bool
    started: int
    version: int
    norm: str | None
    tensors: tuple[int, ...]

    def onwards(self, made: Tensor, norm: str | None) -> _Branch:
        """The same, at what was made of its tensor."""
        tensors = (*self.tensors, id(made))
        return replace(self, version=_version(made), norm=norm, tensors=tensors)


@dataclass(frozen=True)
class _Run:
    """One call of a module with one tensor and nothing else."""

    x: Tensor
    read: _Noted
    output: Tensor


class _Watch(TorchDispatchMode):
    """Follows tensors by their identity through modules and operations."""

    def __init__(self, model: nn.Module, layers: frozenset[str]) -> None:
        super().__init__()
        self._model = model
        self._layers = layers
        self._before = {path: _state(module) for path, module in model.named_modules()}
        self._time = 0
        self._calls: Counter[str] = Counter()
        self._starts: dict[str, tuple[int, _Noted | None]] = {}
        self._ports: dict[int, list[_Noted]] = {}
        self._runs: dict[str, _Run] = {}
        self._branches: dict[int, _Branch] = {}
        self._uses: Counter[int] = Counter()
        self._sums: list[tuple[_Branch, Sum]] = []
        self._alive: list[Tensor] = []  # so that ids stay theirs

    def over(self, path: str, module: nn.Module) -> list[RemovableHandle]:
        """Watch what a module reads and returns."""

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._time += 1
            self._calls[path] += 1
            x = _first_tensor(args, kwargs)
            noted = None if x is None else self._note(x, Port(path, "input"))
            alone = len(args) == 1 and not kwargs
            self._starts[path] = self._time, noted if alone else None

        def after(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            self._time += 1
            if isinstance(output, Tensor):
                x = _first_tensor(args, kwargs)
                self._returned(path, module, x, output)

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    def _returned(self, path: str, module: nn.Module, x: Tensor | None, output: Tensor) -> None:
        started, read = self._starts[path]
        if x is not None and read is not None and x is not output and read.version == _version(x):
            self._runs[path] = _Run(x, self._ports[id(x)][0], output)
        self._note(output, Port(path, "output"))
        if path in self._layers:
            convolutional = isinstance(module, nn.Conv2d | FactoredConv2d)
            made = _Branch(path, convolutional, started, _version(output), None, (id(output),))
            self._branches[id(output)] = made
            return
        branch = None if x is None or x is output else self._branches.get(id(x))
        if branch is None:
            return
        if branch.norm is None and _scales_channels(module, branch, output):
            self._branches[id(output)] = branch.onwards(output, path)
        elif type(module) in _NOTHING_IN_EVAL:
            self._branches[id(output)] = branch.onwards(output, branch.norm)

    def _note(self, tensor: Tensor, port: Port) -> _Noted:
        noted = _Noted(port, self._time, _version(tensor))
        known = self._ports.setdefault(id(tensor), [])
        if not known:
            self._alive.append(tensor)
        elif known[-1].version != noted.version:  # changed in place, it is another one
            known.clear()
        known.append(noted)
        return noted

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and see what it does with the tensors that are followed."""
        options = kwargs or {}
        if func.name() in _ADDITIONS and len(args) == 2 and not options:
            self._added(*args)
        for tensor in tree_leaves((args, options)):
            if isinstance(tensor, Tensor):
                self._used(tensor)
        for tensor in _written(func, args, options):
            self._branches.pop(id(tensor), None)  # what is read of it now is not the output
        return func(*args, **options)

    def _used(self, tensor: Tensor) -> None:
        if id(tensor) in self._branches:
            self._uses[id(tensor)] += 1

    def _added(self, a: Any, b: Any) -> None:
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape):
            return
        for mine, other in ((a, b), (b, a)):
            branch = self._branches.get(id(mine))
            if branch is None or mine is other or branch.version != _version(mine):
                continue
            for noted in self._ports.get(id(other), ()):
                if noted.version == _version(other):
                    self._sums += [(branch, s) for s in self._ways(branch, noted)]

    def _ways(self, branch: _Branch, noted: _Noted) -> list[Sum]:
        """How to come by a tensor before the layer runs."""
        if noted.time <= branch.started:
            return [Sum(branch.norm, noted.port)]
        run = self._runs.get(noted.port.module)
        if noted.port.side == "input" or run is None or run.read.time > branch.started:
            return []
        return [Sum(branch.norm, n.port, noted.port.module) for n in self._ports[id(run.x)]]

    def found(self, output: Any) -> dict[str, Sum]:
        """Of layers and ports that run once, the sums that are all that is made of the output.

        Args:
            output: what the model returned, and so somebody reads.
        """
        for tensor in tensors_in(output):
            self._used(tensor)
        sums: dict[str, Sum] = {}
        for branch, found in self._sums:
            once = all(self._calls[n] == 1 for n in (branch.layer, found.other.module))
            alone = all(self._uses[tensor] == 1 for tensor in branch.tensors)
            early = found.through is None or self._is_a_function(found.through)
            if once and alone and early:
                sums.setdefault(branch.layer, found)
        return sums

    def _is_a_function(self, path: str) -> bool:
        """Whether a module can be called once more, early, and nothing else happens."""
        module = self._model.get_submodule(path)
        inner = [f"{path}.{name}" if name else path for name, _ in module.named_modules()]
        if self._calls[path] != 1 or not self._layers.isdisjoint(inner):
            return False
        now = {name: _state(self._model.get_submodule(name)) for name in inner}
        if any(now[name] != self._before[name] or now[name].hooked for name in inner):
            return False
        run = self._runs[path]
        return torch.equal(module(run.x), run.output)


@dataclass(frozen=True)
class _State:
    """What a module holds: attributes by identity, and the versions of its own tensors."""

    attributes: frozenset[tuple[str, int]]
    versions: tuple[int, ...]
    hooked: bool


def _state(module: nn.Module) -> _State:
    own = [*module.buffers(recurse=False), *module.parameters(recurse=False)]
    return _State(
        frozenset((name, id(value)) for name, value in vars(module).items() if name != "training"),
        tuple(map(_version, own)),
        any(vars(module)[hooks] for hooks in ("_forward_hooks", "_forward_pre_hooks")),
    )


def _written(func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    found: list[Any] = []
    for index, spec in enumerate(func._schema.arguments):
        if spec.alias_info is not None and spec.alias_info.is_write:
            found.append(args[index] if index < len(args) else options.get(spec.name))
    return [v for v in tree_leaves(found) if isinstance(v, Tensor)]


def _scales_channels(module: nn.Module, branch: _Branch, output: Tensor) -> bool:
    """Whether it scales and shifts each of the layer's channels by numbers that stay."""
    fitting = (nn.BatchNorm2d, 4) if branch.convolutional else (nn.BatchNorm1d, 2)
    if (type(module), output.ndim) != fitting:
        return False
    return getattr(module, "running_var", None) is not None


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


def _version(tensor: Tensor) -> int:
    """How often it was changed in place; of tensors of inference mode nobody knows."""
    return 0 if tensor.is_inference() else tensor._version
