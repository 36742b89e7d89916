"""The two small networks that the official code was run on, and the numbers it gave."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu

HERE = Path(__file__).parent


class VggLike(nn.Module):
    """Convolutions with and without bias, stride and padding of two kinds, two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.feature = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 24, (3, 2), stride=(2, 1), padding=(1, 0)),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 20),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.feature(x))


class BasicBlock(nn.Module):
    """Two convolutions around a shortcut; a shortcut that changes shape is 1×1 with batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        self.bn3: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(branch + self.bn3(self.downsample(x)))


class SmallResNet(nn.Module):
    """The official code's ResNet with 8, 12 and 16 channels and 2, 1 and 1 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
        self.layer2 = nn.Sequential(BasicBlock(8, 12, 2))
        self.layer3 = nn.Sequential(BasicBlock(12, 16, 2))
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(relu(self.bn(self.conv1(x))))))
        return self.linear(adaptive_avg_pool2d(x, 1).flatten(1))


NETWORKS = {"vgglike": VggLike, "resnet_small": SmallResNet}


@dataclass(frozen=True, eq=False)
class Golden:
    """What the official code gave for one network: arrays by name, and the rest as JSON."""

    network: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @classmethod
    def read(cls, network: str) -> Golden:
        with safe_open(HERE / f"golden_{network}.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(network, tensors, json.loads(file.metadata()["facts"]))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def inputs(self) -> Tensor:
        return self["inputs"].double()

    def model(self) -> nn.Module:
        """The network with its weights, in float64 and eval mode."""
        model = NETWORKS[self.network]().double().eval()
        found = {n.removeprefix("weights/"): t for n, t in self.tensors.items() if "weights/" in n}
        model.load_state_dict(found)
        return model

    def data(self, kind: str) -> list[tuple[Tensor, Tensor]]:
        """The batches in their order; the labels are the data's (emp) or were drawn once (true)."""
        size = self.facts["batch_size"]
        labels = self["labels" if kind == "emp" else "labels_sampled"]
        return list(zip(self.inputs.split(size), labels.split(size), strict=True))


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)
