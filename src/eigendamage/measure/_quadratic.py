"""What a change of weights costs to second order: the exact Gauss–Newton quadratic, no labels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from eigendamage.batch import Batch
from eigendamage.batches import Batches, Data
from eigendamage.calls import call, device_of, logits_of, tried_call
from eigendamage.curvature import Loss, preserved_random_state
from eigendamage.errors import NonFiniteError
from eigendamage.layers import Layer, evaluating, find_layers
from eigendamage.measure._change import (
    Change,
    Rule,
    changed_layers,
    predictive_head,
    response,
    rewritten_outputs,
)
from eigendamage.progress import track


class _TangentLostError(RuntimeError):
    """Forward-mode differentiation is switched off where a changed layer runs."""


def joint_quadratic(
    model: nn.Module,
    changes: Mapping[str, Change],
    data: Data,
    *,
    loss: Loss = "cross_entropy",
    max_examples: int | None = None,
    progress: bool = True,
) -> float | None:
    """The rise of the mean loss per example to second order, if all changes are made together.

    ½ Δθᵀ G Δθ with G the generalised Gauss–Newton matrix of the data, which is the exact Fisher
    (Martens 2020, "New insights and perspectives on the natural gradient method"): the mean over
    examples of ½ δzᵀ H δz, where δz = J Δθ is the change of the logits to first order and H the
    Hessian of the loss in them. Nothing is factored or sampled, and all interactions of layers
    count. One forward pass, by forward-mode differentiation.

    Args:
        model: the original; its weights are not touched.
        changes: what becomes of layers of `find_layers`, by dotted path. The others stay.
        data: batches; labels serve only to tell which positions are ignored.
        loss: as in `estimate_curvature`, but a name.
        max_examples: stop after that many examples.
        progress: whether to show progress.

    Returns:
        The rise, in the unit of the prices (nats for cross-entropy); None if the model runs, but
        torch cannot differentiate it forwards: custom autograd functions, reentrant checkpoints,
        autocast inside the model, LSTMs on the CPU and group norm in channels_last are known.

    Raises:
        MismatchError: if a changed layer is none of those that can be compressed.
        ShapeError: if a new weight or bias has another shape than the layer's.
        LossError: if the loss is a function.
        DataError: if there is no example.
        NonFiniteError: if an input, the model's output or its derivative is not finite.
    """
    head = predictive_head(loss)
    rules = [
        (layer, _tangent_of(layer, changes[layer.name]))
        for layer in changed_layers(find_layers(model), changes)
    ]
    total, examples = 0.0, 0
    with (
        torch.inference_mode(False),
        preserved_random_state(),
        evaluating(model),
        torch.no_grad(),
        # Fused attention has no forward-mode derivative; its plain form has.
        sdpa_kernel(SDPBackend.MATH),
    ):
        batches = Batches(data, device_of(model), max_examples)
        for batch in track(batches, "quadratic", total=len(batches) or None, enabled=progress):
            try:
                logits, tangent = _logits_and_tangent(model, batch, rules)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                tried_call(model, batch)  # raises if it is the model itself that fails
                return None
            if not bool(torch.isfinite(logits).all() & torch.isfinite(tangent).all()):
                raise NonFiniteError(
                    "the model's output, or its derivative along the changes, holds NaN or "
                    "infinite values although its input is finite; check both weights"
                )
            total += float(head.quadratic(logits, tangent, batch).sum())
            examples += batch.size
    return total / examples


def _tangent_of(layer: Layer, change: Change) -> Rule:
    """The rule that adds to an output's tangent what the change does to the layer's input."""
    old = layer.weight()
    dW = (change.weight.to(old.device).double() - old.double()).to(old.dtype)
    db = None
    if change.bias is not None:
        bias = layer.bias()
        new = change.bias.to(old.device).double()
        db = (new if bias is None else new - bias.double()).to(old.dtype)
    return partial(_joined, layer, dW, db)


def _joined(
    layer: Layer,
    dW: Float[Tensor, "o i K"],
    db: Float[Tensor, " o"] | None,
    x: Tensor,
    output: Tensor,
) -> Tensor:
    """The output, its tangent raised by what a step of the weights does to the input ``x``."""
    step = response(layer, forward_ad.unpack_dual(x).primal, dW, db).to(output.dtype)
    # Adding a dual zero joins the tangents, whether the output has one or not.
    joined = output + forward_ad.make_dual(torch.zeros_like(step), step)
    if forward_ad.unpack_dual(joined).tangent is None:
        # Reentrant checkpoints and inference mode drop tangents without a word.
        raise _TangentLostError(layer.name)
    return joined


def _logits_and_tangent(
    model: nn.Module, batch: Batch, rules: Sequence[tuple[Layer, Rule]]
) -> tuple[Tensor, Tensor]:
    """The logits of a batch, and their tangent: zero where no rule has given them one."""
    with (
        # Under autocast, derivatives come out in other types than what they are of.
        torch.autocast(device_of(model).type, enabled=False),
        rewritten_outputs(rules),
        forward_ad.dual_level(),
        warnings.catch_warnings(),
    ):
        # torch scripts its own derivatives on first use.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")
        logits, tangent = forward_ad.unpack_dual(logits_of(call(model, batch)))
    return logits, torch.zeros_like(logits) if tangent is None else tangent
