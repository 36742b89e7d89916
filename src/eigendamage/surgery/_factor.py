"""The stages of a truncated layer, as tensors and as modules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendamage.curvature import LayerCurvature
from eigendamage.errors import LayerError
from eigendamage.layers import FactoredConv2d, FactoredLinear, Form, Layer, balance
from eigendamage.plan import DepthwiseBlock, EigenBlock, LowRank, metric_of
from eigendamage.plan.prices.eigendamage_dw import CP, layer_cp
from eigendamage.plan.prices.low_rank import best_form


def planned_stages(
    weight: Float[Tensor, "o i K"], curvature: LayerCurvature, action: EigenBlock | DepthwiseBlock
) -> list[Tensor]:
    """The weights of the stages that an action describes, first to last, in float64."""
    if isinstance(action, EigenBlock):
        return block_stages(weight, curvature, action)
    cp = layer_cp(weight, curvature, action.rows, action.columns, action.rank)
    Q_S, Q_A = curvature.Q_S, curvature.Q_A
    return depthwise_stages(cp, Q_S, Q_A, action.rows, action.columns)


def block_stages(
    weight: Float[Tensor, "o i K"], curvature: LayerCurvature, action: EigenBlock
) -> list[Tensor]:
    """The weights of the stages, first to last, in float64, balanced to equal norms.

    W is projected on the kept eigenvectors, U (Uᵀ W V) Vᵀ, and neighbours are multiplied together
    as the form says. Outer stages are matrices, the one with the kernel is (o', i', K).
    """
    U = curvature.Q_S.double()[:, list(action.rows)].to(weight.device)
    V = curvature.Q_A.double()[:, list(action.columns)].to(weight.device)
    core = torch.einsum("op,oik,iq->pqk", U, weight.double(), V)
    stages: dict[Form, list[Tensor]] = {
        "three": [V.T, core, U],
        "merge_in": [torch.einsum("pqk,iq->pik", core, V), U],
        "merge_out": [V.T, torch.einsum("op,pqk->oqk", U, core)],
    }
    return balance(stages[action.form])


def depthwise_stages(
    cp: CP,
    Q_S: Float[Tensor, "o o"],
    Q_A: Float[Tensor, "i i"],
    rows: Sequence[int],
    columns: Sequence[int],
) -> list[Tensor]:
    """The stages of a depthwise separable layer, first to last, in float64, of equal norms.

    The outer factors of the core are multiplied into the kept eigenvectors:
    Vᵀ Q_A[:, columns]ᵀ of shape (R, i), S as the weight (R, 1, K) of a convolution with R groups,
    and Q_S[:, rows] U of shape (o, R). Each of the R terms is balanced by itself, which changes
    nothing of the product.
    """
    even = cp.balanced()
    first = even.V.T @ Q_A.to(even.V)[:, list(columns)].T
    last = Q_S.to(even.U)[:, list(rows)] @ even.U
    return [first, even.S.unsqueeze(1), last]


def low_rank_stages(
    layer: Layer, curvature: LayerCurvature, action: LowRank
) -> tuple[list[Tensor], Float[Tensor, " o"]]:
    """The stages of a low-rank form, first to last, in float64, of equal norms, and its bias.

    The bias takes up the mean of what is cut: b + (W − X) times the mean patch.
    """
    basis = action.directions(layer.inputs)
    cut = action.form != "merge_out"
    metric = metric_of(layer, curvature, action.damping)
    best = best_form(metric, basis, action.rank if cut else None)
    stages = [] if best.basis is None else [best.basis.double().T]
    stages.append(best.core)
    if best.out is not None:
        stages.append(best.out)
    bias = layer.bias()
    shifted = best.shift if bias is None else bias.double().cpu() + best.shift
    return balance(stages), shifted


def factored_module(
    layer: Layer, stages: list[Tensor], bias: Float[Tensor, " o"] | None = None
) -> nn.Module:
    """The stages as a factored module with the layer's dtype, device and mode.

    The bias is the layer's own where none is given.

    Stages are weights as torch has them, (outputs, inputs of one group) with the kernel offsets as
    third axis where there is a kernel: one that reads fewer channels than the stage before returns
    is a convolution with groups.

    Raises:
        LayerError: if a stage has groups, but the layer has no kernel.
    """
    grouped = any(after.shape[1] < before.shape[0] for before, after in pairwise(stages))
    if grouped and layer.offsets == 1:
        raise LayerError(
            layer.name,
            "it has no kernel, so a depthwise stage would only scale its channels; plan an "
            "ordinary block for it",
        )
    old = layer.module
    weight = layer.dense_weight()
    bias = layer.bias() if bias is None else bias
    last = len(stages) - 1
    modules: list[nn.Module] = []
    for index, stage in enumerate(stages):
        stage_bias = bias if index == last else None
        if layer.geometry is None:
            new = _linear(stage, stage_bias is not None)
        else:
            new = _conv(layer, stages, index, stage_bias is not None)
        new.to(device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            new.weight.copy_(stage.reshape(new.weight.shape))
            if stage_bias is not None and new.bias is not None:
                new.bias.copy_(stage_bias)
        modules.append(new)
    factored = (FactoredLinear if layer.geometry is None else FactoredConv2d)(*modules)
    if layer.channels_last:
        for parameter in factored.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    for name, parameter in factored.named_parameters():
        has_own = name.endswith("bias") and isinstance(old.bias, Tensor)
        source = old.bias if has_own else weight
        parameter.requires_grad_(isinstance(source, Tensor) and source.requires_grad)
    return factored.train(old.training)


def _linear(stage: Tensor, bias: bool) -> nn.Linear:
    outputs, inputs = stage.shape[:2]
    return nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device="cpu")


def _conv(layer: Layer, stages: list[Tensor], index: int, bias: bool) -> nn.Conv2d:
    assert layer.geometry is not None
    stage = stages[index]
    inputs = stages[index - 1].shape[0] if index else layer.inputs
    outputs, groups = stage.shape[0], inputs // stage.shape[1]
    source = layer.module.core if isinstance(layer.module, FactoredConv2d) else layer.module
    conv = cast(nn.Conv2d, source)
    if layer.geometry.is_pointwise:
        # Without a kernel any stage can take the stride; the first saves the others the pixels.
        stride = layer.geometry.stride if index == 0 else 1
        new = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=bias, device="meta")
    elif stage.ndim == 3:
        new = nn.Conv2d(
            inputs,
            outputs,
            layer.geometry.kernel,
            stride=layer.geometry.stride,
            padding=conv.padding,  # pyright: ignore[reportArgumentType]
            dilation=layer.geometry.dilation,
            groups=groups,
            padding_mode=conv.padding_mode,  # pyright: ignore[reportArgumentType]
            bias=bias,
            device="meta",
        )
    else:
        new = nn.Conv2d(inputs, outputs, 1, bias=bias, device="meta")
    return new.to_empty(device="cpu")
