"""Which torch.nn layer an operation of a graph is, and how Python makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

_aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """A layer of torch.nn.

    Attributes:
        made: the Python that makes it.
        reads: the node that it is called with.
        tensors: for each of its tensors' names the node.
    """

    made: str
    reads: fx.Node
    tensors: dict[str, fx.Node]


def part_of(node: fx.Node) -> Part | None:
    """The layer of torch.nn that an operation is, if it is one."""
    make = _MAKERS.get(node.target)
    return None if make is None or node.kwargs else make(node.args)


def _convolution(kind: str) -> Callable[[Sequence[Any]], Part]:
    def make(args: Sequence[Any]) -> Part:
        x, weight, bias, stride, padding, dilation, groups = _filled(
            args, (None, None, None, 1, 0, 1, 1)
        )
        out, per_group, *kernel = _value(weight).shape
        options = {"stride": (stride, 1), "padding": (padding, 0), "dilation": (dilation, 1)}
        text = "".join(
            f", {name}={short}"
            for name, (value, default) in options.items()
            if (short := _short(value)) != repr(default)
        )
        text += f", groups={groups}" if groups != 1 else ""
        made = f"{per_group * groups}, {out}, {_short(kernel)}{text}"
        return _with_bias(f"nn.{kind}", made, x, weight, bias)

    return make


def _linear(args: Sequence[Any]) -> Part:
    x, weight, bias = _filled(args, (None, None, None))
    out, inputs = _value(weight).shape
    return _with_bias("nn.Linear", f"{inputs}, {out}", x, weight, bias)


def _batch_norm(args: Sequence[Any]) -> Part | None:
    x, weight, bias, mean, variance, training, _, eps, *_ = args
    kind = {2: 1, 3: 1, 4: 2, 5: 3}.get(_value(x).ndim)
    if kind is None or training or mean is None or (weight is None) != (bias is None):
        return None
    affine = "" if weight is not None else ", affine=False"
    made = f"nn.BatchNorm{kind}d({len(_value(mean))}, eps={eps!r}{affine}{_dtype(mean)})"
    tensors = {"weight": weight, "bias": bias} if weight is not None else {}
    return Part(made, x, {**tensors, "running_mean": mean, "running_var": variance})


def _layer_norm(args: Sequence[Any]) -> Part | None:
    x, shape, weight, bias, eps, *_ = _filled(args, (None, None, None, None, 1e-5))
    if weight is None:
        return None
    return _with_bias("nn.LayerNorm", f"{_short(shape, 1)}, eps={eps!r}", x, weight, bias)


def _group_norm(args: Sequence[Any]) -> Part | None:
    x, groups, weight, bias, eps, *_ = _filled(args, (None, None, None, None, 1e-5))
    if weight is None or bias is None:
        return None
    made = f"nn.GroupNorm({groups}, {len(_value(weight))}, eps={eps!r}{_dtype(weight)})"
    return Part(made, x, {"weight": weight, "bias": bias})


def _embedding(args: Sequence[Any]) -> Part:
    weight, indices = args[:2]  # the others are about gradients
    rows, width = _value(weight).shape
    return Part(f"nn.Embedding({rows}, {width}{_dtype(weight)})", indices, {"weight": weight})


_MAKERS: dict[object, Callable[[Sequence[Any]], Part | None]] = {
    _aten.conv1d.default: _convolution("Conv1d"),
    _aten.conv1d.padding: _convolution("Conv1d"),
    _aten.conv2d.default: _convolution("Conv2d"),
    _aten.conv2d.padding: _convolution("Conv2d"),
    _aten.conv3d.default: _convolution("Conv3d"),
    _aten.conv3d.padding: _convolution("Conv3d"),
    _aten.linear.default: _linear,
    _aten.batch_norm.default: _batch_norm,
    _aten.layer_norm.default: _layer_norm,
    _aten.group_norm.default: _group_norm,
    _aten.embedding.default: _embedding,
}


def _with_bias(kind: str, made: str, x: Any, weight: Any, bias: Any) -> Part:
    text = f"{kind}({made}{'' if bias is not None else ', bias=False'}{_dtype(weight)})"
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return Part(text, x, tensors)


def _filled(args: Sequence[Any], defaults: Sequence[Any]) -> list[Any]:
    """Arguments, the last of which may be left out."""
    return [*args, *defaults[len(args) :]]


def _value(node: fx.Node) -> Tensor:
    return cast(Tensor, node.meta["val"])


def _dtype(node: fx.Node) -> str:
    dtype = _value(node).dtype
    return "" if dtype == torch.float32 else f", dtype={dtype}"


def _short(value: Any, least: int = 0) -> str:
    """A size as one number where it is the same along all axes."""
    if isinstance(value, list | tuple):
        sizes = cast("list[int]", list(value))
        if len(set(sizes)) == 1 and (not least or len(sizes) == least):
            return repr(sizes[0])
        return repr(tuple(sizes))
    return repr(value)
