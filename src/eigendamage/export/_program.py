"""A model as the graph that torch.export makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from eigendamage.batch import Batch, map_tensors
from eigendamage.errors import ExportError
from eigendamage.export._quiet import quiet
from eigendamage.export._values import has_batch_axis, plain_output, with_size
from eigendamage.layers import evaluating

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv2d.default, _aten.conv2d.padding, _aten.conv_transpose2d.input)


def traced(model: nn.Module, batch: Batch, *, dynamic_batch: bool) -> ExportedProgram:
    """The graph of a model in eval mode; its outputs are plain tuples and dicts of tensors.

    Args:
        model: on the CPU; as it was afterwards.
        batch: what it is run with, on the CPU. What is not a tensor becomes a constant.
        dynamic_batch: whether the first axis of all inputs that have the batch's length is left
            open. One example cannot be told from an axis of length 1, so that a batch of one is
            traced as two.

    Raises:
        ExportError: if the model cannot be traced so.
    """
    if dynamic_batch:
        if batch.size == 1 and not batch.divisible:
            raise ExportError(
                "the example is one of several inputs, of which it cannot be seen which have a "
                "batch axis; give two examples or more, or dynamic_batch=False"
            )
        batch = with_size(batch, max(batch.size, 2))
    shapes = _dynamic_shapes(batch) if dynamic_batch else None
    handle = model.register_forward_hook(lambda _module, _args, output: plain_output(output))
    try:
        with evaluating(model), torch.no_grad(), quiet():
            return torch.export.export(
                model, batch.args, dict(batch.kwargs), dynamic_shapes=shapes, strict=False
            )
    except ExportError:
        raise
    except Exception as error:  # torch.export raises whatever the model's code does
        raise ExportError(_cannot_trace(error, dynamic_batch)) from error
    finally:
        handle.remove()


def _dynamic_shapes(batch: Batch) -> Any:
    axis = Dim("batch", min=1)

    def shape(x: Tensor) -> Any:
        return {0: axis} if has_batch_axis(x, batch) else {}

    def spec(item: Any) -> Any:
        return map_tensors(item, shape)

    if batch.args:
        return tuple(_without_constants(spec(a)) for a in batch.args)
    return {k: _without_constants(spec(v)) for k, v in batch.kwargs.items()}


def _without_constants(item: Any) -> Any:
    """The same, with None for whatever is no container: a constant has no axes."""
    if isinstance(item, dict):
        return {k: v if isinstance(k, int) else _without_constants(v) for k, v in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(map(_without_constants, item))
    return None


def _cannot_trace(error: Exception, dynamic_batch: bool) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    advice = (
        "If it runs at one batch size only, give dynamic_batch=False. "
        if dynamic_batch
        else "Its forward must not branch on the values of tensors. "
    )
    return (
        f"torch.export cannot trace the model: {lines[0]}. {advice}torch's whole message is the "
        f"cause of this error"
    )


def widths(program: ExportedProgram) -> list[int]:
    """Channels that each convolution puts out for others to read, not as an output of the model."""
    return [
        node.meta["val"].shape[1]
        for node in program.graph.nodes
        if node.target in _CONVOLUTIONS and any(user.op != "output" for user in node.users)
    ]
