"""One forward pass of a few examples: in which order layers run, at what sizes, at what cost."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from eigendamage.batch import Batch, tensors_in
from eigendamage.calls import output_tensors, tried_call
from eigendamage.errors import ShapeError
from eigendamage.layers._cost import LayerShape
from eigendamage.layers._find import Layer

_EXAMPLES = 2


@dataclass(frozen=True)
class LayerTrace:
    """What one layer did in the pass.

    Attributes:
        calls: how often it ran in one forward pass.
        shape: its sizes; positions are those of one example, summed over its calls.
    """

    calls: int
    shape: LayerShape


@dataclass(frozen=True)
class Trace:
    """What one forward pass showed.

    Attributes:
        layers: the layers that ran, in the order in which they first did.
        outputs: the modules, compressible or not, that returned the model's output.
        read: the layers whose weights something else than their own forward computes with.
        macs: multiply-accumulates of one example in the whole model, everything included that
            ``torch.utils.flop_counter`` knows (also attention and layers that are left alone).
    """

    layers: Mapping[str, LayerTrace]
    outputs: frozenset[str]
    read: frozenset[str]
    macs: float


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """The model in eval mode, each module's own mode put back at the end.

    Fused inference paths that bypass submodules are switched off meanwhile.
    """
    modes = [(m, m.training) for m in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes:
            module.training = mode


@contextmanager
def preserved_random_state() -> Generator[None]:
    """Restore the random states of torch (all devices in use), numpy and Python afterwards."""
    python, legacy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


@contextmanager
def counted_operations(model: nn.Module) -> Generator[FlopCounterMode]:
    """Count what the model computes inside, where there are no gradients.

    Not even its parameters require any: the counter looks for the gradient function of what enters
    a module, and a parameter that is handed to one (a class token) has none.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # Fused attention on the CPU is unknown to the counter; its plain form is not.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield counter
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


class _Reads(TorchFunctionMode):
    """While active, notes whose parameters are computed with while their layer does not run."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        self._owners = {id(p): layer.name for layer in layers for p in layer.module.parameters()}
        self._running: list[str] = []
        self.found: set[str] = set()

    def watch(self, layer: Layer) -> list[Any]:
        """Hooks that tell when the layer runs."""

        def begins(*_: object) -> None:
            self._running.append(layer.name)

        def ends(*_: object) -> None:
            self._running.remove(layer.name)

        return [
            layer.module.register_forward_pre_hook(begins),
            layer.module.register_forward_hook(ends, always_call=True),
        ]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _computes(func, args) and tensors_in([result]):
            owners = {
                self._owners.get(id(x)) for x in tensors_in([*args, *(kwargs or {}).values()])
            }
            self.found.update(o for o in owners if o is not None and o not in self._running)
        return result


def _computes(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a function takes more of its tensors than their size, type and device."""
    name = getattr(func, "__name__", "")
    as_another = name == "to" and len(args) > 1 and isinstance(args[1], nn.Parameter)
    return not (as_another or name == "type_as" or name[:4] == "new_" or name[-5:] == "_like")


def trace(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batch: Batch,
    starts: Callable[[Any], list[Tensor]] = output_tensors,
) -> Trace:
    """Run the first examples of a batch and note what each layer does.

    ``starts`` picks the tensors that the loss is taken of out of the model's output.

    Raises:
        DataError: if the model cannot run on the batch.
        ShapeError: if a convolution gets an input without a batch axis.
        LossError: if the model's output holds no tensor to take a loss of.
    """
    few = batch.few(_EXAMPLES)
    calls: dict[str, list[tuple[float, float]]] = {}
    returned: dict[str, Tensor] = {}

    def watch(layer: Layer) -> Any:
        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            if layer.geometry is not None and x.ndim != 4:
                raise ShapeError(
                    layer.name,
                    f"got an input of shape {tuple(x.shape)}; expected (batch, channels, height, "
                    f"width). Give the model whole batches.",
                )
            positions_out = output.numel() / layer.outputs / few.size
            # A pointwise layer's first stage takes its stride, so it never sees more pixels.
            pointwise = layer.geometry is None or layer.geometry.is_pointwise
            positions_in = positions_out if pointwise else x.numel() / layer.inputs / few.size
            calls.setdefault(layer.name, []).append((positions_in, positions_out))

        return hook

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                returned[name] = output

        return hook

    handles = [
        layer.module.register_forward_hook(watch(layer), prepend=True, with_kwargs=True)
        for layer in layers.values()
    ]
    reads = _Reads(layers.values())
    handles += [handle for layer in layers.values() for handle in reads.watch(layer)]
    handles += [
        module.register_forward_hook(note(name), prepend=True)
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) or name in layers
    ]
    try:
        with (
            evaluating(model),
            counted_operations(model) as counter,
            reads,
            warnings.catch_warnings(),
        ):
            # Reentrant checkpoints warn of what is meant here: no gradients.
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            outputs = starts(tried_call(model, few))
    finally:
        for handle in handles:
            handle.remove()
    found = {
        name: LayerTrace(
            calls=len(seen),
            shape=layers[name].shape(sum(s[0] for s in seen), sum(s[1] for s in seen)),
        )
        for name, seen in calls.items()
    }
    last = frozenset(
        name for name, mine in returned.items() if any(_same_storage(mine, out) for out in outputs)
    )
    read = frozenset(reads.found)
    return Trace(found, last, read, counter.get_total_flops() / 2 / few.size)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and a.data_ptr() == b.data_ptr()
