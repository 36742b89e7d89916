"""The models every test runs over: small, of every kind of layer, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CONVOLUTIONS: dict[str, dict[str, object]] = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1, "bias": False},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "same": {"kernel_size": (2, 4), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "pointwise": {"kernel_size": 1},
    "pointwise strided": {"kernel_size": 1, "stride": 2, "bias": False},
    "pointwise padded": {"kernel_size": 1, "padding": 1},
    "wide stride": {"kernel_size": 2, "stride": 3},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    "replicate": {"kernel_size": 3, "padding": 1, "stride": 2, "padding_mode": "replicate"},
    "larger than the image": {"kernel_size": 7, "padding": 3},
}
"""Every geometry that a Conv2d can have, bar groups."""


@dataclass(frozen=True)
class Case:
    """A model with inputs and labels, in float64."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    classes: int
    positions: int = 1

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().double().eval()

    def data(self, examples: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.stack([self.inputs(generator) for _ in range(examples)])
        x = x.double() if x.is_floating_point() else x
        shape = (examples,) if self.positions == 1 else (examples, self.positions)
        return x, torch.randint(0, self.classes, shape, generator=generator)


def convolution(name: str, inputs: int = 3, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, **CONVOLUTIONS[name])  # type: ignore[arg-type]


class Residual(nn.Module):
    """Stem, a residual block with in-place activations and a strided shortcut, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(6, 8, 1, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.stem(x)))
        y = self.relu(self.bn2(self.conv1(x)))
        y = self.relu(self.conv2(y) + self.shortcut(x))
        return self.head(y.mean((2, 3)))


class Tokens(nn.Module):
    """Embedding, a mixing layer over features with two leading axes, a head a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.tanh(self.up(x)))
        x = x + x.cumsum(1) / 5  # tokens depend on earlier ones
        return self.head(self.norm(x))


class Mixed(nn.Module):
    """Convolutions, then their pixels as tokens, then one vector: conv, token and fc layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.token = nn.Linear(8, 7)
        self.fc = nn.Linear(7, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = torch.relu(self.down(x))
        x = self.depthwise(x).flatten(2).transpose(1, 2)
        x = torch.tanh(self.token(x)).mean(1)
        return self.head(torch.tanh(self.fc(x)))


class Shared(nn.Module):
    """A layer that runs twice, and one that is registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.twice = nn.Conv2d(5, 5, 3, padding=1)
        self.named = nn.Linear(5, 5)
        self.alias = self.named
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        x = torch.tanh(self.named(x.mean((2, 3))))
        return self.head(torch.tanh(self.alias(x)))


def _image(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 7, 6, generator=generator)


def _fc() -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6, bias=False), nn.Tanh(), nn.Linear(6, 4)
    )


def _convolutional(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return nn.Sequential(
            convolution(name), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)
        )

    return build


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("fc", _fc, lambda g: torch.randn(7, generator=g), 4),
        Case("tokens", Tokens, lambda g: torch.randint(0, 11, (5,), generator=g), 4, 5),
        Case("residual", Residual, _image, 5),
        Case("mixed", Mixed, _image, 4),
        Case("shared", Shared, _image, 4),
        *(Case(f"conv {name}", _convolutional(name), _image, 4) for name in CONVOLUTIONS),
    )
}
