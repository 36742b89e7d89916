"""Hooks that hand each call's input and output gradient to a sink, and leave no trace."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eigendamage.batch import Batch
from eigendamage.calls import call
from eigendamage.curvature._head import Head, Seed
from eigendamage.errors import LayerError
from eigendamage.layers import Layer, evaluating, preserved_random_state

Record = TypeVar("Record")


@runtime_checkable
class Sink(Protocol[Record]):
    """What becomes of the calls: ``entered`` in the forward pass, ``left`` in the backward pass.

    ``left`` may be told of the same record several times (one backward pass a class), or never
    (recomputation under activation checkpointing, or a branch the loss does not depend on).
    """

    def entered(self, layer: Layer, x: Tensor, batch: Batch) -> Record:
        """Note an input; what is returned comes back with the gradient."""
        ...

    def left(self, layer: Layer, record: Record, g: Tensor, batch: Batch) -> None:
        """Take the gradient of the loss with respect to the output."""
        ...


class _Gate(torch.autograd.Function):
    """Identity in place that starts a graph at its input and ends the backward pass there.

    With the weights frozen nothing before the first layer needs gradients; its output has to be
    told to. In place (and so not a view), because an in-place activation may follow.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[None, None]:
        return None, None


class Capture(Generic[Record]):
    """While active, every call of the given layers under autograd is told to the sink.

    Only tensors' own hooks are used for gradients: they survive in-place activations, and they do
    not fire for the recomputed forward of activation checkpointing.
    """

    def __init__(self, layers: Iterable[Layer], sink: Sink[Record]) -> None:
        self._layers = list(layers)
        self._sink = sink
        self._batch: Batch | None = None
        self._more = False
        self._handles: list[Any] = []

    def __enter__(self) -> Capture[Record]:
        for layer in self._layers:
            hook = self._forward_hook(layer)
            self._handles.append(
                layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            )
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def expect(self, batch: Batch) -> None:
        """Say what the coming forward pass is of."""
        self._batch = batch

    def backward(self, seed: Seed) -> None:
        """Go backwards from a seed; after the last one, kept inputs are let go as they are used."""
        self._more = seed.more
        if seed.start.requires_grad:
            seed.start.backward(seed.cotangent, retain_graph=seed.more)

    def _forward_hook(self, layer: Layer) -> Any:
        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            if not torch.is_grad_enabled():
                return  # the first, graph-less run of a reentrant checkpoint
            if not output.requires_grad:
                anchor = torch.zeros((), device=output.device, requires_grad=True)
                output = _Gate.apply(output, anchor)
            batch = self._batch
            assert batch is not None
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                records = [self._sink.entered(layer, x.detach(), batch)]

            def on_gradient(g: Tensor) -> None:
                record = records[0] if self._more else records.pop()
                with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
                    self._sink.left(layer, record, g.detach(), batch)

            output.register_hook(on_gradient)

        return hook


def inputs_by_example(layer: Layer, x: Tensor, batch: Batch) -> Float[Tensor, "n i *size"]:
    """A layer's input as (n, channels, positions…), in at least float32; padded tokens are zero.

    Linear layers may have any number of leading axes; the first is the batch, or a multiple of it
    with each example's rows together (windows, say).

    Raises:
        LayerError: if the leading axis does not tell the examples apart.
    """
    return _by_example(layer, x, batch, layer.inputs)


def gradients_by_example(layer: Layer, g: Tensor, batch: Batch) -> Float[Tensor, "n o t"]:
    """A layer's output gradient as (n, channels, positions), likewise."""
    return _by_example(layer, g, batch, layer.outputs).flatten(2)


def counted_positions(layer: Layer, batch: Batch, positions: int) -> Bool[Tensor, "n t"] | None:
    """Which positions of a layer are tokens that count; None where all do.

    The positions of a Linear layer are taken for the batch's tokens if there are as many of them.
    """
    counted = batch.counted
    if counted is None or layer.geometry is not None or counted.shape[1] != positions:
        return None
    return counted


def _by_example(layer: Layer, x: Tensor, batch: Batch, channels: int) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    examples = batch.size
    if layer.geometry is not None and x.ndim == 4 and x.shape[0] == examples:
        return x
    if layer.geometry is None and x.ndim >= 2 and x.shape[0] % examples == 0:
        rows = x.reshape(examples, -1, channels).transpose(1, 2)
        counted = counted_positions(layer, batch, rows.shape[2])
        return rows if counted is None else rows.masked_fill(~counted.unsqueeze(1), 0)
    raise LayerError(
        layer.name,
        f"its tensors have shape {tuple(x.shape)} for a batch of {examples} examples, so examples "
        f"cannot be told apart. Put the batch axis first, or leave the layer alone with ignore=",
    )


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None]:
    """Freeze the weights, go to eval mode, and put everything back as it was.

    Gradients are on inside even where the caller switched them off; random states of torch,
    numpy and Python are restored at the end, so that a shuffling loader costs the caller nothing.
    """
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(preserved_random_state())
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        try:
            for parameter, _ in wanted:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)


class _LayoutProbe:
    """Notes the layers in which one example's gradient is not in that example's rows alone."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.reached: set[str] = set()

    def entered(self, layer: Layer, x: Tensor, batch: Batch) -> None:
        return None

    def left(self, layer: Layer, record: None, g: Tensor, batch: Batch) -> None:
        self.reached.add(layer.name)
        try:
            rows = gradients_by_example(layer, g, batch)
        except LayerError:
            self.reasons[layer.name] = (
                f"its output of shape {tuple(g.shape)} has no batch axis in front "
                f"(batch of {batch.size}); put it first, by batch_first=True where there is such "
                f"an option"
            )
            return
        others = rows[1:]
        # NaN tells nothing apart; the passes over the data refuse it by the layer's name.
        if bool((torch.isfinite(others) & (others != 0)).any()):
            self.reasons[layer.name] = (
                f"its output of shape {tuple(g.shape)} mixes the examples of a batch, "
                f"or has the batch on another axis than the first"
            )


def probe_layout(
    model: nn.Module, layers: Mapping[str, Layer], batch: Batch, head: Head
) -> tuple[set[str], dict[str, str]]:
    """Back-propagate from one of two examples and see where its gradient turns up.

    Returns:
        The layers that a gradient reached, and the reason for each whose tensors do not keep the
        examples apart. With a batch of one nothing can be told apart, and no reason is given.
    """
    few = batch.few(2)
    probe = _LayoutProbe()
    with undisturbed(model), Capture(layers.values(), probe) as capture:
        capture.expect(few)
        outputs = [
            t
            for t in head.starts(call(model, few))
            if t.requires_grad and t.ndim > 0 and t.shape[0] == few.size
        ]
        # Not constant over an example's outputs: softmax and normalisation cancel constants.
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.zeros_like(t) for t in outputs]
        for v in cotangents:
            v[0] = torch.randn(v.shape[1:], generator=generator).to(v)
        if outputs:
            torch.autograd.backward(outputs, cotangents)
    return probe.reached, probe.reasons
