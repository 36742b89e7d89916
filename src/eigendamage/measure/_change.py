"""Changes of layers: what a plan made of them, and running a model as if they were made."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eigendamage.curvature import Loss, PredictiveHead, head_of, loss_name
from eigendamage.errors import LossError, MismatchError, ShapeError
from eigendamage.layers import Layer, Layers, find_layers
from eigendamage.plan import Channels, Plan

Rule = Callable[[Tensor, Tensor], Tensor]
"""What a layer returns instead, of its input and its output."""


@dataclass(frozen=True, eq=False)
class Change:
    """What becomes of a layer, seen as a dense one with all its inputs and outputs.

    Attributes:
        weight: the new weight, in the coordinates of the original's.
        bias: the new bias; None if it stays. A layer without one may be given one.
    """

    weight: Float[Tensor, "o i K"]
    bias: Float[Tensor, " o"] | None = None


def planned_changes(model: nn.Module, smaller: nn.Module, plan: Plan) -> dict[str, Change]:
    """What a plan, and any repair after it, made of each layer of a model.

    Channels that are gone show where they were read: the columns of the readers are zero. The rows
    that made them stay as they were, because nothing reads them. What is no compressible layer
    (the statistics of batch norms, say) is left out.

    Args:
        model: the original.
        smaller: what `apply_plan` made of it, with its weights as they are now.
        plan: the plan.

    Returns:
        By dotted path, the layers whose weight or bias is not the original's.

    Raises:
        MismatchError: if ``smaller`` lacks a layer, or its weight is not what the plan leaves.
    """
    changes: dict[str, Change] = {}
    for name, layer in find_layers(model).compressible.items():
        planned = plan.layers.get(name)
        action = None if planned is None else planned.action
        if isinstance(action, Channels):
            change = _embedded(layer, smaller, action.outputs, action.inputs)
        else:
            change = _embedded(layer, smaller, range(layer.outputs), range(layer.inputs))
        if change.bias is not None or not torch.equal(change.weight, layer.weight()):
            changes[name] = change
    return changes


def predictive_head(loss: Loss) -> PredictiveHead:
    """The head of a loss whose divergence and Hessian are known.

    Raises:
        LossError: if it is a function, or an unknown name.
    """
    head = head_of(loss)
    if not isinstance(head, PredictiveHead):
        raise LossError(
            f"the loss {loss_name(loss)} is a function, which tells nothing without labels; use "
            f"loss='cross_entropy', 'causal_lm', 'mse' or 'bce'"
        )
    return head


def changed_layers(found: Layers, changes: Mapping[str, Change]) -> list[Layer]:
    """The layers that changes are of, in their order.

    Raises:
        MismatchError: if there is no such layer, or it cannot be compressed.
        ShapeError: if a new weight or bias has another shape than the layer's.
    """
    layers: list[Layer] = []
    for name, change in changes.items():
        layer = found.compressible.get(name)
        if layer is None:
            why = found.left_alone.get(name, "there is no such layer")
            raise MismatchError(f"the change of layer '{name}' does not fit the model: {why}")
        expected, shape = (layer.outputs, layer.inputs, layer.offsets), tuple(change.weight.shape)
        if shape != expected:
            raise ShapeError(
                name, f"the changed weight has shape {shape}; expected {expected} (o, i, K)"
            )
        if change.bias is not None and tuple(change.bias.shape) != (layer.outputs,):
            raise ShapeError(
                name,
                f"the changed bias has shape {tuple(change.bias.shape)}; expected "
                f"({layer.outputs},)",
            )
        layers.append(layer)
    return layers


def response(
    layer: Layer, x: Tensor, weight: Float[Tensor, "o i K"], bias: Float[Tensor, " o"] | None
) -> Tensor:
    """What a layer returns for the input ``x`` with another dense weight and bias.

    Raises:
        ShapeError: if a convolution gets an input without a batch axis.
    """
    if layer.geometry is None:
        return F.linear(x, weight[:, :, 0], bias)
    if x.ndim != 4:
        raise ShapeError(
            layer.name,
            f"got an input of shape {tuple(x.shape)}; expected (batch, channels, height, width). "
            f"Give the model whole batches.",
        )
    geometry = layer.geometry
    kernel = weight.unflatten(2, geometry.kernel)
    return F.conv2d(
        geometry.pad(x), kernel, bias, stride=geometry.stride, dilation=geometry.dilation
    )


@contextmanager
def rewritten_outputs(rules: Sequence[tuple[Layer, Rule]]) -> Generator[None]:
    """While active, each layer returns what its rule makes of its input and its output."""
    handles = [
        layer.module.register_forward_hook(partial(_run, rule), prepend=True, with_kwargs=True)
        for layer, rule in rules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(
    rule: Rule, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    return rule(args[0] if args else kwargs["input"], output)


def _embedded(
    layer: Layer, smaller: nn.Module, outputs: Sequence[int], inputs: Sequence[int]
) -> Change:
    """The layer's weight and bias in ``smaller``, put where they were in the original's."""
    old = layer.weight()
    bias = layer.bias()
    rows = torch.tensor(list(outputs), device=old.device)
    columns = torch.tensor(list(inputs), device=old.device)
    small_weight, small_bias = _dense(layer.name, smaller)
    shape, expected = tuple(small_weight.shape), (len(rows), len(columns), layer.offsets)
    if shape != expected:
        raise MismatchError(
            f"layer '{layer.name}' of the smaller model has a weight of shape {shape} (o, i, K), "
            f"the plan leaves {expected}; give the model that this plan made"
        )
    weight = old.clone()
    weight[rows] = 0
    weight[rows.unsqueeze(1), columns] = small_weight.to(old)
    before = old.new_zeros(layer.outputs) if bias is None else bias
    after = before.clone()
    after[rows] = old.new_zeros(len(rows)) if small_bias is None else small_bias.to(old)
    return Change(weight, None if torch.equal(after, before) else after)


def _dense(name: str, model: nn.Module) -> tuple[Float[Tensor, "o i K"], Tensor | None]:
    """The dense weight and the bias of a Linear, a Conv2d, a factored or a masked layer."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise MismatchError(f"the smaller model has no layer '{name}'") from error
    weight: Any = getattr(module, "weight", None)
    bias: Any = getattr(module, "bias", None)
    if hasattr(module, "weight_mask"):
        # The product is only as fresh as the last forward pass.
        weight = module.get_parameter("weight_orig") * module.get_buffer("weight_mask")
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise MismatchError(
            f"layer '{name}' of the smaller model is a {type(module).__name__} without a weight"
        )
    wide = weight.detach().reshape(weight.shape[0], weight.shape[1], -1)
    return wide, bias.detach() if isinstance(bias, Tensor) else None
