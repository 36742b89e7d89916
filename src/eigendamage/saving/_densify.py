"""densify: factored layers multiplied out again."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from eigendamage.layers import (
    SWITCHES,
    FactoredConv2d,
    FactoredLinear,
    copy_model,
    origin_of,
    reshaped_origin,
    set_following,
    set_origin,
)


@torch.inference_mode(False)
def densify(model: nn.Module) -> nn.Module:
    """A copy in which every factored layer is one plain Linear or Conv2d again, with equal outputs.

    For programs that know the original's layers only. Kernel, stride, padding and dilation are the
    original's. Products are taken in float64 and rounded once to the layer's dtype. Channels that
    were removed stay removed, and a bias that surgery added stays, so a layer has the original's
    shape exactly where it lost ranks alone. Nothing is left of the saved MACs and parameters of
    such a layer; `save` and `load` work as before. torch's encoder layers may compute in one fused
    call again.
    """
    dense: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, FactoredConv2d | FactoredLinear):
            dense[id(module)] = _dense(module)
    copy = copy_model(model, dense)
    for module in copy.modules():
        before = {} if (origin := origin_of(module)) is None else origin.counts
        for attribute in before.keys() & set(SWITCHES):
            set_following(module, attribute, before[attribute])
    return copy


def _dense(factored: FactoredConv2d | FactoredLinear) -> nn.Module:
    last = cast("nn.Linear | nn.Conv2d", factored[-1])
    bias = factored.bias
    if isinstance(factored, FactoredLinear):
        new = nn.Linear(
            factored.in_features, factored.out_features, bias=bias is not None, device="meta"
        )
    else:
        core = factored.core
        new = nn.Conv2d(
            factored.in_channels,
            factored.out_channels,
            core.kernel_size,  # pyright: ignore[reportArgumentType]
            stride=core.stride,  # pyright: ignore[reportArgumentType]
            padding=core.padding,  # pyright: ignore[reportArgumentType]
            dilation=core.dilation,  # pyright: ignore[reportArgumentType]
            bias=bias is not None,
            padding_mode=core.padding_mode,
            device="meta",
        )
    with torch.no_grad():
        wide = copy_model(factored).cpu().double()
        weight = cast(Tensor, wide.weight).to(last.weight)
    # In channels_last where the stages are.
    channels_last = any(not p.is_contiguous() for p in factored.parameters())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight = weight.contiguous(memory_format=layout)
    new.weight = nn.Parameter(weight, requires_grad=last.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    set_origin(new, reshaped_origin(factored))
    return new.train(factored.training)
