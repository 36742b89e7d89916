"""Small networks of the kinds that are pruned by channel, with the groups that they must have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Parts = tuple[set[str], set[str], set[str]]
"""Dotted paths of a group's producers, carriers and readers."""


@dataclass(frozen=True)
class Network:
    """A network and its groups of channels, by first producer."""

    name: str
    build: Callable[[], nn.Module]
    groups: dict[str, Parts]

    def model(self) -> nn.Module:
        """In float64 and eval mode, no batch norm with statistics or weights of 0 or 1."""
        torch.manual_seed(0)
        model = self.build().double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
        return model

    def inputs(self) -> Tensor:
        return torch.randn(
            3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )


def _conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)


def _conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(
        _conv(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class PreActBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), _conv(width, width + 2)
        self.bn2, self.conv2 = nn.BatchNorm2d(width + 2), _conv(width + 2, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.bn1(x)))
        return x + self.conv2(torch.relu(self.bn2(y)))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class InvertedResidual(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = _conv_bn(width, hidden, 1)
        self.depthwise = _conv_bn(hidden, hidden, groups=hidden)
        self.excite = SqueezeExcite(hidden)
        self.project = nn.Sequential(_conv(hidden, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.excite(self.depthwise(self.expand(x))))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), _conv(inputs, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


class Parallel(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one = _conv_bn(inputs, 3, 1)
        self.three = nn.Sequential(_conv_bn(inputs, 4, 1), _conv_bn(4, 5))
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), _conv_bn(inputs, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.pool(x)], 1)


class Pooled(nn.Module):
    """A trunk, the mean over its pixels, and a classifier."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).mean((2, 3)))


def _resnet() -> nn.Module:
    return Pooled(nn.Sequential(_conv_bn(3, 6), BasicBlock(6, 6), BasicBlock(6, 8, 2)), 8)


def _vgg_flat() -> nn.Module:
    return nn.Sequential(
        *_conv_bn(3, 6),
        nn.MaxPool2d(2),
        *_conv_bn(6, 7),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(28, 9),
        nn.PReLU(9),
        nn.Linear(9, 5),
    )


def _vgg_pooled() -> nn.Module:
    return Pooled(nn.Sequential(*_conv_bn(3, 6), nn.MaxPool2d(2), *_conv_bn(6, 7)), 7)


def _preresnet() -> nn.Module:
    return Pooled(
        nn.Sequential(_conv(3, 6), PreActBlock(6), PreActBlock(6), nn.BatchNorm2d(6), nn.ReLU()), 6
    )


def _mobilenet() -> nn.Module:
    return Pooled(nn.Sequential(_conv_bn(3, 4), InvertedResidual(4, 8), InvertedResidual(4, 6)), 4)


def _densenet() -> nn.Module:
    return Pooled(
        nn.Sequential(
            _conv(3, 4),
            DenseLayer(4, 3),
            DenseLayer(7, 3),
            nn.BatchNorm2d(10),
            nn.ReLU(),
            _conv(10, 5, 1),
            DenseLayer(5, 3),
            nn.BatchNorm2d(8),
        ),
        8,
    )


def _inception() -> nn.Module:
    return Pooled(nn.Sequential(_conv_bn(3, 4), Parallel(4), Parallel(10)), 10)


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network(
            "resnet",
            _resnet,
            {
                "trunk.0.0": (
                    {"trunk.0.0", "trunk.1.conv2"},
                    {"trunk.0.1", "trunk.1.bn2"},
                    {"trunk.1.conv1", "trunk.2.conv1", "trunk.2.shortcut.0"},
                ),
                "trunk.1.conv1": ({"trunk.1.conv1"}, {"trunk.1.bn1"}, {"trunk.1.conv2"}),
                "trunk.2.conv1": ({"trunk.2.conv1"}, {"trunk.2.bn1"}, {"trunk.2.conv2"}),
                "trunk.2.conv2": (
                    {"trunk.2.conv2", "trunk.2.shortcut.0"},
                    {"trunk.2.bn2", "trunk.2.shortcut.1"},
                    {"head"},
                ),
            },
        ),
        Network(
            "vgg, flattened",
            _vgg_flat,
            {"0": ({"0"}, {"1"}, {"4"}), "4": ({"4"}, {"5"}, {"9"}), "9": ({"9"}, {"10"}, {"11"})},
        ),
        Network(
            "vgg, pooled",
            _vgg_pooled,
            {
                "trunk.0": ({"trunk.0"}, {"trunk.1"}, {"trunk.4"}),
                "trunk.4": ({"trunk.4"}, {"trunk.5"}, {"head"}),
            },
        ),
        Network(
            "preresnet",
            _preresnet,
            {
                "trunk.0": (
                    {"trunk.0", "trunk.1.conv2", "trunk.2.conv2"},
                    {"trunk.1.bn1", "trunk.2.bn1", "trunk.3"},
                    {"trunk.1.conv1", "trunk.2.conv1", "head"},
                ),
                "trunk.1.conv1": ({"trunk.1.conv1"}, {"trunk.1.bn2"}, {"trunk.1.conv2"}),
                "trunk.2.conv1": ({"trunk.2.conv1"}, {"trunk.2.bn2"}, {"trunk.2.conv2"}),
            },
        ),
        Network(
            "mobilenet",
            _mobilenet,
            {
                "trunk.0.0": (
                    {"trunk.0.0", "trunk.1.project.0", "trunk.2.project.0"},
                    {"trunk.0.1", "trunk.1.project.1", "trunk.2.project.1"},
                    {"trunk.1.expand.0", "trunk.2.expand.0", "head"},
                ),
                **{
                    f"trunk.{block}.expand.0": (
                        {f"trunk.{block}.expand.0", f"trunk.{block}.excite.expand"},
                        {f"trunk.{block}.{p}" for p in ("expand.1", "depthwise.0", "depthwise.1")},
                        {f"trunk.{block}.excite.reduce", f"trunk.{block}.project.0"},
                    )
                    for block in (1, 2)
                },
                **{
                    f"trunk.{block}.excite.reduce": (
                        {f"trunk.{block}.excite.reduce"},
                        set[str](),
                        {f"trunk.{block}.excite.expand"},
                    )
                    for block in (1, 2)
                },
            },
        ),
        Network(
            "densenet",
            _densenet,
            {
                "trunk.0": (
                    {"trunk.0"},
                    {"trunk.1.norm", "trunk.2.norm", "trunk.3"},
                    {"trunk.1.conv", "trunk.2.conv", "trunk.5"},
                ),
                "trunk.1.conv": (
                    {"trunk.1.conv"},
                    {"trunk.2.norm", "trunk.3"},
                    {"trunk.2.conv", "trunk.5"},
                ),
                "trunk.2.conv": ({"trunk.2.conv"}, {"trunk.3"}, {"trunk.5"}),
                "trunk.5": ({"trunk.5"}, {"trunk.6.norm", "trunk.7"}, {"trunk.6.conv", "head"}),
                "trunk.6.conv": ({"trunk.6.conv"}, {"trunk.7"}, {"head"}),
            },
        ),
        Network(
            "inception",
            _inception,
            {
                "trunk.0.0": (
                    {"trunk.0.0"},
                    {"trunk.0.1"},
                    {"trunk.1.one.0", "trunk.1.three.0.0", "trunk.1.pool.1.0"},
                ),
                **{
                    f"trunk.{block}.{conv}": (
                        {f"trunk.{block}.{conv}"},
                        {f"trunk.{block}.{conv[:-1]}1"},
                        readers,
                    )
                    for block, after in (
                        (1, {"trunk.2.one.0", "trunk.2.three.0.0", "trunk.2.pool.1.0"}),
                        (2, {"head"}),
                    )
                    for conv, readers in (
                        ("one.0", after),
                        ("three.0.0", {f"trunk.{block}.three.1.0"}),
                        ("three.1.0", after),
                        ("pool.1.0", after),
                    )
                },
            },
        ),
    )
}
