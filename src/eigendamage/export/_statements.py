"""An operation of a graph as a line of Python."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from eigendamage.errors import ExportError

_aten = torch.ops.aten

_INFIX: dict[object, str] = {
    **dict.fromkeys((_aten.add.Tensor, operator.add), "+"),
    **dict.fromkeys((_aten.sub.Tensor, operator.sub), "-"),
    **dict.fromkeys((_aten.mul.Tensor, operator.mul), "*"),
    **dict.fromkeys((_aten.div.Tensor, operator.truediv), "/"),
    _aten.matmul.default: "@",
    operator.floordiv: "//",
    operator.mod: "%",
}

_METHODS: dict[object, str] = {
    _aten.add_.Tensor: "add_",
    _aten.clone.default: "clone",
    _aten.contiguous.default: "contiguous",
    _aten.expand.default: "expand",
    _aten.mean.dim: "mean",
    _aten.mul_.Tensor: "mul_",
    _aten.permute.default: "permute",
    _aten.reshape.default: "reshape",
    _aten.sym_size.int: "size",
    _aten.transpose.int: "transpose",
    _aten.unsqueeze.default: "unsqueeze",
    _aten.view.default: "view",
}

_FUNCTIONS: dict[object, str] = {
    _aten.adaptive_avg_pool2d.default: "F.adaptive_avg_pool2d",
    _aten.avg_pool2d.default: "F.avg_pool2d",
    _aten.cat.default: "torch.cat",
    _aten.chunk.default: "torch.chunk",
    _aten.flatten.using_ints: "torch.flatten",
    _aten.gelu.default: "F.gelu",
    _aten.max_pool2d.default: "F.max_pool2d",
    _aten.relu.default: "torch.relu",
    _aten.relu_.default: "torch.relu_",
    _aten.scaled_dot_product_attention.default: "F.scaled_dot_product_attention",
    _aten.sigmoid.default: "torch.sigmoid",
    _aten.silu.default: "F.silu",
    _aten.softmax.int: "torch.softmax",
    _aten.tanh.default: "torch.tanh",
}


def expression(node: fx.Node, name: Callable[[fx.Node], str]) -> str:
    """What an operation computes, in Python.

    Args:
        node: a call of a function.
        name: what a node that it reads is called.

    Raises:
        ExportError: if it is no operation of torch itself.
    """
    target: Any = node.target
    args = [literal(a, name) for a in node.args]
    keywords = [f"{key}={literal(value, name)}" for key, value in node.kwargs.items()]
    if target in _INFIX and len(args) == 2 and not keywords:
        return f"{args[0]} {_INFIX[target]} {args[1]}"
    if target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    if target in _METHODS:
        return f"{args[0]}.{_METHODS[target]}({', '.join([*args[1:], *keywords])})"
    return f"{_FUNCTIONS.get(target) or _qualified(target)}({', '.join([*args, *keywords])})"


def literal(value: Any, name: Callable[[fx.Node], str]) -> str:
    """An argument in Python.

    Raises:
        ExportError: if it is of a type that has no literal here.
    """
    if isinstance(value, fx.Node):
        return name(value)
    if isinstance(value, list | tuple):
        items = [literal(v, name) for v in cast("list[Any] | tuple[Any, ...]", value)]
        return f"[{', '.join(items)}]"
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(
        value, bool | int | float | str | torch.dtype | torch.layout | torch.memory_format
    ):
        return repr(value)
    if value is None:
        return "None"
    raise ExportError(
        f"an operation has an argument of type {type(value).__name__}, which has no plain form; "
        f"use format='torch.export'"
    )


def _qualified(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims"):  # pyright: ignore[reportPrivateUsage]
        return f"torch.ops.{target}"
    module = getattr(target, "__module__", "")
    if module in ("_operator", "math"):
        return f"{module.lstrip('_')}.{target.__name__}"
    if module == "torch" and getattr(torch, target.__name__, None) is target:
        return f"torch.{target.__name__}"
    raise ExportError(
        f"the model has the operation {target}, which has no plain form; use format='torch.export'"
    )
