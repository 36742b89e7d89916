"""Factored layers: subclasses of nn.Sequential whose parts are plain layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendamage.layers._cost import Form

Layout = tuple[Form, int, int]
"""How a factored layer is laid out: its form, and the ranks (r_o, r_i); a merged side is full."""


class FactoredLinear(nn.Sequential):
    """A Linear layer as a product of two or three plain Linear stages; the bias is on the last.

    It runs, trains, saves and exports as the ``nn.Sequential`` that it is.
    """

    __jit_unused_properties__: ClassVar[list[str]] = [
        *("in_features", "out_features", "layout", "weight", "bias")
    ]

    @property
    def in_features(self) -> int:
        """Features of the input."""
        return cast(nn.Linear, self[0]).in_features

    @property
    def out_features(self) -> int:
        """Features of the output."""
        return cast(nn.Linear, self[-1]).out_features

    @property
    def layout(self) -> Layout:
        """Form and ranks."""
        widths = [cast(nn.Linear, s).out_features for s in self]
        if len(widths) == 3:
            return "three", widths[1], widths[0]
        return "merge_in", widths[0], self.in_features

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weight of the one dense layer that the stages amount to, computed anew each time."""
        weight = cast(nn.Linear, self[0]).weight
        for stage in list(self)[1:]:
            weight = cast(nn.Linear, stage).weight @ weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the last stage."""
        return cast(nn.Linear, self[-1]).bias


class FactoredConv2d(nn.Sequential):
    """A convolution as a K convolution with 1×1 convolutions before it, after it, or both.

    Stride, padding and dilation belong to the K stage, the bias to the last. Between two 1×1
    stages the K stage may be depthwise. It runs, trains, saves and exports as the
    ``nn.Sequential`` that it is.
    """

    __jit_unused_properties__: ClassVar[list[str]] = [
        *("core", "in_channels", "out_channels", "kernel_size", "stride"),
        *("layout", "weight", "bias"),
    ]

    @property
    def core(self) -> nn.Conv2d:
        """The stage with the original kernel, stride, padding and dilation."""
        # The stage that does what a 1×1 convolution of stride 1 cannot; if none does, the last.
        return max(enumerate(cast(list[nn.Conv2d], list(self))), key=_spatial_reach)[1]

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return cast(nn.Conv2d, self[0]).in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return cast(nn.Conv2d, self[-1]).out_channels

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """The core's kernel size."""
        return self.core.kernel_size

    @property
    def stride(self) -> tuple[int, ...]:
        """The core's stride."""
        return self.core.stride

    @property
    def layout(self) -> Layout:
        """Form and ranks."""
        stages = cast(list[nn.Conv2d], list(self))
        widths = [s.out_channels for s in stages]
        if len(stages) == 3:
            form: Form = "three" if self.core.groups == 1 else "depthwise"
            return form, widths[1], widths[0]
        if self.core is stages[0]:
            return "merge_in", widths[0], self.in_channels
        return "merge_out", self.out_channels, widths[0]

    @property
    def weight(self) -> Float[Tensor, "o i kh kw"]:
        """The weight of the one dense layer that the stages amount to, computed anew each time."""
        stages = cast(list[nn.Conv2d], list(self))
        core = self.core
        at = stages.index(core)
        weight = core.weight
        for stage in reversed(stages[:at]):
            if core.groups > 1:  # each of its channels reads one row of the stage before
                weight = weight * stage.weight
            else:
                weight = torch.einsum("or...,ri->oi...", weight, stage.weight[:, :, 0, 0])
        for stage in stages[at + 1 :]:
            weight = torch.einsum("or,ri...->oi...", stage.weight[:, :, 0, 0], weight)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the last stage."""
        return cast(nn.Conv2d, self[-1]).bias


def _spatial_reach(numbered: tuple[int, nn.Conv2d]) -> tuple[int, int, bool, int]:
    index, stage = numbered
    padded = not isinstance(stage.padding, str) and any(stage.padding)
    return math.prod(stage.kernel_size), math.prod(stage.stride), padded, index


def balance(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Scale the factors of a product to equal Frobenius norms; the product is unchanged.

    Unbalanced factors barely train: a gradient step moves the large one too little and the small
    one too much. A factor that is all zero is left as it is, and so are the others.
    """
    norms = [float(m.norm()) for m in matrices]
    if not all(n > 0 and math.isfinite(n) for n in norms):
        return list(matrices)
    common = math.exp(sum(map(math.log, norms)) / len(norms))
    return [m * (common / n) for m, n in zip(matrices, norms, strict=True)]


def balance_factors(model: nn.Module) -> None:
    """Scale the stages of all factored layers, in place, to equal norms; no product changes.

    Layers of which a stage is frozen are left as they are.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FactoredLinear | FactoredConv2d):
                weights = [cast("nn.Linear | nn.Conv2d", stage).weight for stage in module]
                if all(w.requires_grad for w in weights):
                    for weight, even in zip(weights, balance(weights), strict=True):
                        weight.copy_(even)
