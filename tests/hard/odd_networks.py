"""Small networks of odd make: every block that torch users build, for images down to 1×1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

T = TypeVar("T")
Choose = Callable[[Sequence[Any]], Any]
"""Takes one of several: hypothesis' ``draw(sampled_from(…))``, or `random.Random.choice`."""

BlockKind = Literal[
    "conv", "pointwise", "grouped", "depthwise", "residual", "reused", "shared", "tokens", "narrow"
]
NormKind = Literal["none", "batch", "group"]
ActKind = Literal["relu", "gelu", "prelu", "tanh", "hardswish"]
Head = Literal["pooled", "flattened", "deep"]


@dataclass(frozen=True)
class OddBlock:
    """A block: its kind, width and stride, and what follows its layer."""

    kind: BlockKind
    width: int
    stride: int
    norm: NormKind
    act: ActKind


@dataclass(frozen=True)
class OddNetwork:
    """What an odd network is made of; it prints as what rebuilds it.

    Attributes:
        image: channels, height and width; None for inputs that are vectors.
        blocks: in order; for vectors each is a Linear layer of its width.
        head: how pixels become classes.
        classes: of the last layer.
        bias: whether layers before the last have one.
        zeros: whether the first layer's weight is zero, so that its factors are singular.
        seed: of weights and inputs.
    """

    image: tuple[int, int, int] | None
    blocks: tuple[OddBlock, ...]
    head: Head
    classes: int
    bias: bool
    zeros: bool
    seed: int

    def model(self) -> nn.Module:
        """In float32 and eval mode."""
        torch.manual_seed(self.seed)
        model = (self._vectors() if self.image is None else self._images()).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        if self.zeros:
            first = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
            nn.init.zeros_(first.weight)
        return model

    def inputs(self, examples: int) -> Tensor:
        """So many inputs."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(examples, *(self.image or (5,)), generator=generator)

    def _vectors(self) -> nn.Module:
        layers: list[nn.Module] = []
        width = 5
        for block in self.blocks:
            layers += [nn.Linear(width, block.width, bias=self.bias), _ACTS[block.act]()]
            width = block.width
        return nn.Sequential(*layers, nn.Linear(width, self.classes))

    def _images(self) -> nn.Module:
        assert self.image is not None
        width, height, columns = self.image
        layers: list[nn.Module] = []
        for block in self.blocks:
            layers.append(_Step(width, block, self.bias))
            width = layers[-1].outputs
        if self.head == "pooled":
            return nn.Sequential(
                *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, self.classes)
            )
        with torch.no_grad():
            size = nn.Sequential(*layers).eval()(torch.zeros(1, self.image[0], height, columns))
        features = size[0].numel()
        if self.head == "flattened":
            return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, self.classes))
        return nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(features, 6, bias=self.bias),
            nn.ReLU(inplace=True),
            nn.Dropout(0.1),
            nn.Linear(6, self.classes),
        )


class _Step(nn.Module):
    """A layer of some kind, with its norm and its activation."""

    def __init__(self, inputs: int, block: OddBlock, bias: bool) -> None:
        super().__init__()
        width, self.kind = block.width, block.kind
        self.outputs = width

        def conv(into: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> Any:
            return nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=bias)

        if block.kind == "conv":
            self.body = conv(inputs, width, stride=block.stride)
        elif block.kind == "narrow":
            self.body = nn.Conv2d(inputs, width, (1, 3), block.stride, (0, 1), bias=bias)
        elif block.kind == "pointwise":
            self.body = conv(inputs, width, 1, block.stride)
        elif block.kind == "grouped":
            self.outputs = inputs * (1 + width % 2)
            self.body = conv(inputs, self.outputs, groups=inputs if inputs % 2 else inputs // 2)
        elif block.kind == "depthwise":
            self.body = nn.Sequential(conv(inputs, inputs, groups=inputs), conv(inputs, width, 1))
        elif block.kind == "residual":
            self.body = nn.Sequential(
                conv(inputs, width), nn.ReLU(inplace=True), conv(width, inputs)
            )
            self.outputs = inputs
        elif block.kind == "tokens":
            self.body = nn.Linear(inputs, width, bias=bias)
        else:
            self.body = conv(inputs, width, stride=block.stride)
            self.again = conv(width, width)
            if block.kind == "shared":  # another module, the same weight
                self.twin = conv(width, width)
                self.twin.weight = self.again.weight
        self.norm = _norm(block.norm, self.outputs)
        self.act = _ACTS[block.act]()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "tokens":
            y = self.body(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
        else:
            y = self.body(x)
        if self.kind == "residual":
            y = x + y
        elif self.kind == "reused":
            y = self.again(torch.tanh(self.again(y)))
        elif self.kind == "shared":
            y = self.twin(torch.tanh(self.again(y)))
        return self.act(self.norm(y))


def _norm(kind: NormKind, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group" and channels > 1:  # torch refuses a norm over a single value
        return nn.GroupNorm(1, channels)
    return nn.Identity()


_ACTS: dict[ActKind, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "prelu": nn.PReLU,
    "tanh": nn.Tanh,
    "hardswish": nn.Hardswish,
}


def odd_network(choose: Choose) -> OddNetwork:
    """An odd network by a way of choosing."""
    side = (1, 2, 5, 8)
    image = (choose((1, 2, 3)), choose(side), choose(side))
    blocks = tuple(
        OddBlock(
            choose(get_args(BlockKind)),
            choose((1, 2, 4, 6, 9, 12)),
            choose((1, 2)),
            choose(get_args(NormKind)),
            choose(get_args(ActKind)),
        )
        for _ in range(choose((1, 2, 3)))
    )
    return OddNetwork(
        image=choose((image, image, image, None)),
        blocks=blocks,
        head=choose(get_args(Head)),
        classes=choose((1, 2, 3, 5)),
        bias=choose((True, False)),
        zeros=choose((False,) * 9 + (True,)),
        seed=choose(range(2**16)),
    )
